"""`python -m fastgrpo.report RUN`: the same as `fastgrpo report RUN`."""

import sys

from fastgrpo.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
