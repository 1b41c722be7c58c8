"""``python -m leanstep`` is the command ``leanstep``."""

import sys

from leanstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
