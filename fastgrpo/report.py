"""`python -m fastgrpo.report RUN`: the same as `fastgrpo report RUN`."""

import sys

from fastgrpo.reporting.report import main

if __name__ == "__main__":
    sys.exit(main())
