"""`python -m dopsd.cli`: the same as the command `dopsd`."""

from dopsd.cli.app import app

if __name__ == "__main__":
    app(prog_name="dopsd")
