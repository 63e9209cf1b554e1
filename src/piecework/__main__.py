"""`python -m piecework`."""

from piecework.cli.main import entry

if __name__ == "__main__":
    entry()
