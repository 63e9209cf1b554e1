"""`python -m piecework`."""

import sys

from piecework.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
