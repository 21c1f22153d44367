"""The recipe: its schema, reading it from YAML, and a commented starter recipe."""
