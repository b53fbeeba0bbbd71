"""`python -m fastgrpo.rewards.make_prompts ...`: the same as `fastgrpo make-prompts ...`."""

import sys

from fastgrpo.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["make-prompts", *sys.argv[1:]]))
