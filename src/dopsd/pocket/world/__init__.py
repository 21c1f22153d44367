"""The drawn world that the pocket model knows: scenes, outlines, captions."""
