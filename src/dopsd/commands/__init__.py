"""Commands of the front door that do not fit into cli.py; registered there."""
