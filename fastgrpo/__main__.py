"""`python -m fastgrpo COMMAND`: the same as `fastgrpo COMMAND`."""

import sys

from fastgrpo.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
