"""``python -m jlora``: the command line."""

import sys

from jlora._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
