"""The drawn world that the pocket model was trained on: scenes, captions, data sets."""
