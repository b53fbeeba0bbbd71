"""Train a model by online reinforcement learning.

    deepspeed fastgrpo/train.py --config configs/tiny_shapes.yaml        all GPUs of a node (or one CPU process)
    fastgrpo train --config configs/tiny_shapes.yaml                     one process
    ... --set rollout.num_steps=8 --set seed=1                           change keys of the configuration

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from fastgrpo.commands import UNAVAILABLE, print_anything
from fastgrpo.commands.arguments import add_set, path
from fastgrpo.commands.errors import shown
from fastgrpo.config.reference import describe
from fastgrpo.reporting.run_folder import RunFolder
from fastgrpo.validation import ConfigError, check_folder, load_config


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
    config = load_config(arguments.config, overrides)
    check_folder(config)
    # After the configuration is known to be good: these take seconds to load.
    from fastgrpo.engine.ranks import finish, start
    from fastgrpo.finite import Diverged
    from fastgrpo.rewards import RewardUnavailable
    from fastgrpo.stopping import Stopped
    from fastgrpo.trainer import Trainer

    summary: dict = {}
    try:
        ranks = start()
        trainer = Trainer(config, ranks=ranks)
    except RewardUnavailable as error:
        return report_stop(error, "nothing was begun")
    except KeyboardInterrupt:
        print("stopped: nothing was begun", file=sys.stderr)
        return 128 + signal.SIGINT
    try:
        summary, status = trainer.run(), 0
    except RewardUnavailable as error:
        status = report_stop(error, f"the state after iteration {trainer.saved} is saved")
    except Stopped as error:
        status = 128 + error.number
        print(f"stopped {error}: {notes(error)}; the same command goes on", file=sys.stderr)
    except ConfigError as error:
        status = 2
        print(f"error: {error}", file=sys.stderr)
    except (Diverged, OSError) as error:
        # Its own ranks may be waiting for it: it ends without them.
        print(f"error: {error}; {notes(error)}", file=sys.stderr)
        return 1
    if summary:
        print(summary_table(summary))
        print(f"report: {RunFolder(config.output).report}")
    trainer.close()
    del trainer
    finish()
    return status


def notes(error: BaseException) -> str:
    """What a run that ended early says of its state."""
    return "; ".join(getattr(error, "__notes__", ["nothing was begun"]))


def report_stop(error: Exception, state: str) -> int:
    """Says why a run stopped that can go on; returns the exit status for that."""
    print(f"stopped: {error}\n{state}; when the reward is there again, the same command goes on", file=sys.stderr)
    return UNAVAILABLE


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
