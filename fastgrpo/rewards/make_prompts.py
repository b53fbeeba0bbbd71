"""`python -m fastgrpo.rewards.make_prompts`: the same as `fastgrpo make-prompts`."""

from fastgrpo.commands.make_prompts import main

if __name__ == "__main__":
    main()
