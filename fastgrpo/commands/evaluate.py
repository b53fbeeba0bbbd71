"""Scores of a saved run: a line of JSON for each prompt file, or one table with a row for each file and category.

fastgrpo eval runs/tiny_shapes                 on the run's held-out prompts
fastgrpo eval runs/tiny_shapes --base          of the model it started from
fastgrpo eval --lora FILE_OR_FOLDER --model sd3 --path stable-diffusion-3.5-medium --prompts a.txt --reward ocr
"""

import argparse
import json

from fastgrpo.commands.arguments import check_set, of_type, path
from fastgrpo.commands.saved_model import add_run_arguments, asked_config, saved_model
from fastgrpo.commands.trust import add_trust, trusted
from fastgrpo.config.keys import ImageCount, Seed
from fastgrpo.config.schema import ConfigError
from fastgrpo.config.sizes import evaluation_size
from fastgrpo.data.embeddings import Embeddings
from fastgrpo.data.prompts import IMAGE_FIELD, check_input_images, check_not_empty, check_tags, load_prompts
from fastgrpo.engine.ranks import OneRank
from fastgrpo.evaluation import Evaluator
from fastgrpo.files import json_text
from fastgrpo.measure import DEVICE
from fastgrpo.models import model_class
from fastgrpo.parts import check_cut, check_guidance
from fastgrpo.policy import Policy
from fastgrpo.reporting.text import Row, score_table, scores_by_reward
from fastgrpo.rewards import load_rewards
from fastgrpo.rewards.scorer import Scorer

# The keys that --set may change: those of the trained model and of what it is drawn and scored with.
READ = (
    "model", "prompts.eval", "prompts.images_outside", "reward.eval", "reward.settings", "reward.frames", "reward.folder",
    "evaluation", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    add_run_arguments(parser, "reward.settings.NAME.path=...")
    parser.add_argument(
        "--prompts", type=path, action="append", help="another prompt file than the run's own; may be given more than once"
    )
    add_trust(parser)
    parser.add_argument("--reward", action="append", help="another reward than the run's own; may be given more than once")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON for each prompt file (the default)")
    form.add_argument("--table", action="store_true", help="print a table: prompt files and their categories by reward")
    parser.add_argument(
        "--images", type=of_type(ImageCount), help="number of images over all categories (default: the run's own)"
    )
    parser.add_argument("--seed", type=of_type(Seed), help="seed of the noise (default: the run's own)")


def run(arguments: argparse.Namespace) -> int:
    """Draws and scores the images of every prompt file."""
    check_set(arguments.set, READ, "eval")
    reward_override = [f"reward.eval={json.dumps(dict.fromkeys(arguments.reward, 1))}"] if arguments.reward else []
    config = asked_config(arguments, [*arguments.set, *reward_override])
    if arguments.model and not (arguments.prompts and arguments.reward):
        raise ConfigError("--model: says nothing of what to draw and how to score it: give --prompts and --reward too")
    if arguments.run is not None:
        config = trusted(config, arguments.run, trust=arguments.trust, named=arguments.reward or (), overrides=arguments.set)
    settings, reward = config.evaluation, config.reward
    family = model_class(config.model.name)
    fields = (IMAGE_FIELD,) if family.image_conditioned else ()
    files = {
        file: load_prompts(file, fields, images_outside=config.prompts.images_outside)
        for file in arguments.prompts or [config.prompts.eval]
    }
    (rewards,) = load_rewards(
        reward.eval, device=DEVICE, settings=reward.settings, frames=reward.frames, folder=reward.folder
    )
    for prompts in files.values():
        if fields:
            check_input_images(prompts, family.input_images, config.model.name)
        if family.empty_is_no_prompt:
            check_not_empty(prompts, config.model.name)
        check_tags(prompts)
        rewards.check(prompts.judged)
    model = saved_model(config, arguments)
    negative_prompt = config.model.negative_prompt
    size = evaluation_size(config)
    check_cut(model, *((prompts, rewards, [size]) for prompts in files.values()), negative_prompt=negative_prompt)
    guidance_scale = settings.guidance_scale if arguments.guidance is None else arguments.guidance
    check_guidance(model, "guidance", guidance_scale)
    rows: list[Row] = []
    for file, prompts in files.items():
        evaluator = Evaluator(
            model=model, embeddings=Embeddings(model, negative_prompt=negative_prompt), prompts=prompts, reward=rewards,
            scorer=Scorer(config.reward.timeout),
            num_steps=arguments.steps or settings.num_steps, batch_size=settings.batch_size, size=size,
            guidance_scale=guidance_scale,
            seed=config.seed if arguments.seed is None else arguments.seed,
            ranks=OneRank(device=model.device),
        )  # fmt: skip
        row = {"prompts": str(file), **evaluator.accuracy(Policy(model), arguments.images or settings.images)}
        rows += scores_by_reward(file.stem, row, rewards.names)
        if not arguments.table:
            print(json_text(row), flush=True)
    if arguments.table:
        print(score_table(rows, rewards.percent))
    return 0
