"""Command line of the trainer: `python -m train`, installed as `kandinsky5-train`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
