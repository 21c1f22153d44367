"""`python -m dopsd.cli`."""

from dopsd.cli.app import app

if __name__ == "__main__":
    app()
