"""Training of the pocket model: architecture, corpus, stages."""
