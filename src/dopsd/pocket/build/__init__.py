"""How the pocket model was made: architecture, corpus and training stages."""
