"""The command line: each command parses its options, calls the package and prints the result."""
