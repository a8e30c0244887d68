"""The command line as `python -m fastirt`."""

import sys

from fastirt.cli import main

if __name__ == "__main__":
    sys.exit(main())
