"""Train a model by online reinforcement learning.

    deepspeed fastgrpo/train.py --config configs/tiny_shapes.yaml        all GPUs of a node (or one CPU process)
    fastgrpo train --config configs/tiny_shapes.yaml                     one process
    ... --set rollout.num_steps=8 --set seed=1                           change keys of the configuration

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from fastgrpo.config.reference import describe
from fastgrpo.reporting.runlog import write_atomically
from fastgrpo.reporting.text import are_shares
from fastgrpo.validation import Config, ConfigError, differences, dump_config, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.epilog = "keys of the configuration:\n" + describe()
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. seed=1")
    parser.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: the architecture with random weights, for speed"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher


def train(arguments: argparse.Namespace) -> int:
    """Run to the end and print the result; the exit status."""
    try:
        overrides = [*arguments.set, *(["model.random_weights=true"] if arguments.random_weights else [])]
        config = load_config(arguments.config, overrides)
        check_folder(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # After the configuration is known to be good: these take seconds to load.
    from fastgrpo.engine.zero import finish, start
    from fastgrpo.rewards import RewardUnavailable
    from fastgrpo.trainer import Trainer

    device = start()
    try:
        trainer = Trainer(config, int(os.environ["WORLD_SIZE"]), device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RewardUnavailable as error:
        return stopped(error, "nothing was begun")
    if trainer.engine.rank == 0:
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output / "config.yaml", dump_config(config))
    try:
        summary, status = trainer.run(), 0
    except RewardUnavailable as error:
        summary, status = {}, stopped(error, f"the state after iteration {trainer.saved} is saved")
    if summary:
        print(table(summary))
        print(f"report: {config.output / 'report.html'}")
    trainer.engine.close()
    del trainer
    finish()
    return status


def stopped(error: Exception, state: str) -> int:
    """Say why a run stopped that can go on; its exit status, "try again later" by the convention of sysexits.h."""
    print(f"stopped: {error}\n{state}; when the reward is there again, the same command goes on", file=sys.stderr)
    return 75


def check_folder(config: Config) -> None:
    """Refuse a folder that holds a run of another configuration; only the number of iterations may have changed."""
    path = config.output / "config.yaml"
    changed = differences(load_config(path), config, but=("iterations",)) if path.exists() else []
    if changed:
        raise ConfigError(
            f"output = {config.output}: holds a run of another configuration ({'; '.join(changed)}); "
            "choose another folder with --set output=... or remove it"
        )


def table(summary: dict) -> str:
    """Accuracy before and after, by category."""
    rows = [(tag, summary["base"][tag], summary["final"][tag]) for tag in summary["base"]]
    rows.append(("overall", summary["base_accuracy"], summary["final_accuracy"]))
    width = max(len(tag) for tag, *_ in rows)
    lines = [f"{'':{width}}     base  trained   change"]
    style = ".1%" if are_shares(score for _, *scores in rows for score in scores) else ".4g"
    lines += [f"{tag:{width}}  {base:7{style}}  {final:7{style}}  {final - base:+7{style}}" for tag, base, final in rows]
    seconds, images = summary["train_seconds"], summary["images"]
    lines.append(
        f"{images} images in {summary['iterations']} iterations, {seconds / 60:.1f} minutes, seed {summary['seed']}"
    )
    return "\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return train(parser.parse_args(argv))
