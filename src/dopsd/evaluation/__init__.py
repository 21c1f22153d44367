"""What a text encoder sees of a run: pages with images, curves and tables."""
