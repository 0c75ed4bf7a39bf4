"""Compresses image classifiers: `python compress.py --help`."""

import sys

from qlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
