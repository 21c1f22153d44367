"""The pocket world: images that can be read, and a small few-step model of them on which methods
are measured."""
