"""What can be read from pocket images without a network."""
