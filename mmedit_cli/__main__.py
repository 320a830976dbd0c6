"""`python -m mmedit_cli` is the same program as `mmedit`."""

import sys

from mmedit_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
