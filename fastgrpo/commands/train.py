"""Train a model by online reinforcement learning.

    deepspeed fastgrpo/train.py --config configs/tiny_shapes.yaml        all GPUs of a node (or one CPU process)
    fastgrpo train --config configs/tiny_shapes.yaml                     one process
    ... --set rollout.num_steps=8 --set seed=1                           change keys of the configuration

A run that was stopped goes on from its last checkpoint when the same command is given again, or `fastgrpo resume`.
"""

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence

from fastgrpo.commands import print_anything
from fastgrpo.commands.arguments import add_set, path
from fastgrpo.commands.errors import shown
from fastgrpo.config.keys import Config
from fastgrpo.config.reference import describe
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.validation import check_folder, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = "keys of the configuration:\n" + describe()
    parser.add_argument("--config", type=path, required=True, metavar="FILE", help="YAML configuration, see configs/")
    add_set(parser, "seed=1")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="take the architecture with random weights, without a checkpoint, to measure speed",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end and prints the result."""
    overrides = [*arguments.set, *(["model.random_weights=true"] if arguments.random_weights else [])]
    return train(load_config(arguments.config, overrides))


def train(config: Config) -> int:
    """Trains to the end and prints the result; returns the exit status: see `fastgrpo.endings`."""
    check_folder(config)
    # After the configuration is known to be good: these take seconds to load.
    from fastgrpo.endings import ending_of, said, tells
    from fastgrpo.engine.ranks import finish, start
    from fastgrpo.rewards.calling import BadScores, RewardError
    from fastgrpo.trainer import Trainer

    rank = 0
    try:
        ranks = start()
        rank = ranks.rank
        trainer = Trainer(config, ranks=ranks)
        summary = trainer.run()
    except KeyboardInterrupt:  # before the run began, which then heeds it itself
        print("stopped by SIGINT; nothing was begun", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        ending = ending_of(error)
        if ending is None:
            raise
        if tells(error, rank):
            if isinstance(error, RewardError) and not isinstance(error, BadScores) and error.__cause__ is not None:
                traceback.print_exception(error.__cause__)  # of the reward's own code, which only it explains
            print(said(ending, error), file=sys.stderr)
        # Without leaving the group: other ranks may be lost, or waiting for this one.
        return ending.status
    if summary:
        print(summary_table(summary))
        print(f"report: {RunFolder(config.output).report}")
    trainer.close()
    del trainer
    finish()
    return 0


def summary_table(summary: dict) -> str:
    """Lines of text: the accuracy before and after, by category, and what it took."""
    rows = [(tag, summary["base"][tag], summary["final"][tag]) for tag in summary["base"]]
    rows.append(("overall", summary["base_accuracy"], summary["final_accuracy"]))
    width = max(len(tag) for tag, *_ in rows)
    lines = [f"{'':{width}}     base  trained   change"]
    for tag, base, final in rows:
        style = ".1%" if tag in summary["percent"] else ".4g"
        lines.append(f"{tag:{width}}  {base:7{style}}  {final:7{style}}  {final - base:+7{style}}")
    seconds, images = summary["train_seconds"], summary["images"]
    lines.append(
        f"{images} images in {summary['iterations']} iterations, {seconds / 60:.1f} minutes, seed {summary['seed']}"
    )
    return "\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    print_anything()
    return shown(run, parser.parse_args(argv))
