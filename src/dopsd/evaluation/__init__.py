"""What a reader sees of a run: pages with pictures, curves and tables."""
