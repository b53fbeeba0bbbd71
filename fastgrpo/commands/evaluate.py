"""Scores of a saved run: a line of JSON for each prompt file, or one table with a row for each file and category.

fastgrpo eval runs/tiny_shapes                 on the run's held-out prompts
fastgrpo eval runs/tiny_shapes --base          of the model it started from
"""

import argparse
import json
from pathlib import Path

from fastgrpo.commands.saved_model import add_run_arguments, load_run
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import IMAGE_FIELD, load_prompts
from fastgrpo.engine.ranks import OneRank
from fastgrpo.evaluation import Evaluator
from fastgrpo.files import json_text
from fastgrpo.policy import Policy
from fastgrpo.reporting.text import Row, score_table, scores_by_reward
from fastgrpo.rewards import load_rewards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    add_run_arguments(parser)
    parser.add_argument(
        "--prompts", type=Path, action="append", help="another prompt file than the run's own; may be given more than once"
    )
    parser.add_argument("--reward", action="append", help="another reward than the run's own; may be given more than once")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, for example reward.settings.NAME.path=...",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each prompt file (the default)")
    form.add_argument("--table", action="store_true", help="print a table: prompt files and their categories by reward")
    parser.add_argument("--images", type=int, help="number of images over all categories (default: the run's own)")
    parser.add_argument("--seed", type=int, help="seed of the noise (default: the run's own)")


def run(arguments: argparse.Namespace) -> int:
    """Draws and scores the images of every prompt file."""
    reward_override = [f"reward.eval={json.dumps(dict.fromkeys(arguments.reward, 1))}"] if arguments.reward else []
    config, model = load_run(arguments.run, arguments.base, [*arguments.set, *reward_override])
    settings, reward = config.evaluation, config.reward
    (rewards,) = load_rewards(reward.eval, device=model.device, settings=reward.settings, frames=reward.frames)
    rows: list[Row] = []
    for path in arguments.prompts or [config.prompts.eval]:
        prompts = load_prompts(path, (IMAGE_FIELD,) if model.image_conditioned else ())
        evaluator = Evaluator(
            model=model, embeddings=Embeddings(model), prompts=prompts, reward=rewards,
            num_steps=arguments.steps or settings.num_steps, batch_size=settings.batch_size,
            guidance_scale=settings.guidance_scale if arguments.guidance is None else arguments.guidance,
            seed=config.seed if arguments.seed is None else arguments.seed,
            ranks=OneRank(device=model.device),
        )  # fmt: skip
        row = {"prompts": str(path), **evaluator.accuracy(Policy(model), arguments.images or settings.images)}
        rows += scores_by_reward(path.stem, row, rewards.names)
        if not arguments.table:
            print(json_text(row), flush=True)
    if arguments.table:
        print(score_table(rows))
    return 0
