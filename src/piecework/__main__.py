"""`python -m piecework`, which imports nothing from the current directory, though `-m` puts that on the path."""

import os
import sys

if __name__ == "__main__":
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != package:
        del sys.path[0]

    from piecework.cli.main import entry

    entry()
