"""Metrics of pocket images, from pixels and without a network."""
