"""`python -m csdraft.cli` is the command `csdraft`."""

import sys

from csdraft.cli import main

if __name__ == "__main__":
    sys.exit(main())
