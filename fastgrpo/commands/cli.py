"""The console script: `fastgrpo train`, `plan`, `bench`, `eval`, `sample`, `report` and `serve-reward`.

fastgrpo plan --config configs/sd3_compressibility.yaml              what a run will need, before a machine is rented
fastgrpo bench --config configs/sd3_compressibility.yaml --random-weights     what this machine does with it
fastgrpo eval runs/tiny_shapes                                       the trained model on the held-out prompts
fastgrpo eval runs/tiny_shapes --base                                the model it started from
fastgrpo eval runs/tiny_shapes --prompts a.txt --reward tiny_shapes --reward jpeg_compressibility --table
fastgrpo sample runs/tiny_shapes --prompt "two red circles" --output circles.png
fastgrpo report runs/tiny_shapes                                     write report.html anew
fastgrpo serve-reward --reward tiny_shapes --port 8000               score images for runs on other machines
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgrpo.commands.plan import add_arguments as add_plan_arguments
from fastgrpo.commands.plan import run as run_plan
from fastgrpo.commands.train import add_arguments, train
from fastgrpo.config.schema import apply_override
from fastgrpo.rewards import RewardUnavailable
from fastgrpo.validation import Config, ConfigError, load_config

if TYPE_CHECKING:
    from fastgrpo.policy import Model


def load_run(run: Path, base: bool, overrides: Sequence[str] = ()) -> "tuple[Config, Model]":
    """A run's configuration and its model, with the trained LoRA unless `base`."""
    import torch

    from fastgrpo.models import configured_model

    config = load_config(run / "config.yaml", overrides)
    model = configured_model(config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not base:
        model.load_trained(run)
    return config, model


def evaluate(arguments: argparse.Namespace) -> int:
    """Scores of a saved run: a line of JSON for each prompt file, or one table, a row a file and category."""
    from fastgrpo.data.embeddings import Embeddings
    from fastgrpo.data.prompts import INPUT, load_prompts
    from fastgrpo.evaluation import Evaluator
    from fastgrpo.policy import Policy
    from fastgrpo.reporting.text import Row, scores_by_reward, table
    from fastgrpo.rewards import load_rewards

    asked = [f"reward.eval={json.dumps(dict.fromkeys(arguments.reward, 1))}"] if arguments.reward else []
    config, model = load_run(arguments.run, arguments.base, [*arguments.set, *asked])
    settings, reward = config.evaluation, config.reward
    (rewards,) = load_rewards(reward.eval, device=model.device, settings=reward.settings, frames=reward.frames)
    rows: list[Row] = []
    for path in arguments.prompts or [config.prompts.eval]:
        evaluator = Evaluator(
            model=model, embeddings=Embeddings(model), prompts=load_prompts(path, INPUT if model.image_conditioned else ()),
            reward=rewards,
            num_steps=arguments.steps or settings.num_steps, batch_size=settings.batch_size,
            guidance_scale=settings.guidance_scale if arguments.guidance is None else arguments.guidance,
            seed=config.seed if arguments.seed is None else arguments.seed,
        )  # fmt: skip
        row = {"prompts": str(path), **evaluator.accuracy(Policy(model), arguments.images or settings.images)}
        rows += scores_by_reward(path.stem, row, rewards.names)
        if not arguments.table:
            print(json.dumps(row), flush=True)
    if arguments.table:
        print(table(rows))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Images of a saved run for given prompts, as one picture."""
    import torch

    from fastgrpo.data.embeddings import Embeddings
    from fastgrpo.data.prompts import ImagePrompt
    from fastgrpo.policy import Policy
    from fastgrpo.records import SAMPLE
    from fastgrpo.reporting.runlog import as_pictures, save_grid
    from fastgrpo.sampling.generate import generate

    config, model = load_run(arguments.run, arguments.base)
    settings = config.evaluation
    if model.image_conditioned and arguments.input is None:
        raise ValueError(f"{config.model.name} edits images: give one with --input")
    asked = [ImagePrompt(p, arguments.input) if model.image_conditioned else p for p in arguments.prompt]
    prompts = [prompt for prompt in asked for _ in range(arguments.images)]
    images = generate(
        model, Policy(model), Embeddings(model), prompts, torch.arange(len(prompts)), stream=SAMPLE,
        seed=arguments.seed, num_steps=arguments.steps or settings.num_steps,
        guidance_scale=settings.guidance_scale if arguments.guidance is None else arguments.guidance,
    )  # fmt: skip
    save_grid(arguments.output, as_pictures(images).permute(0, 2, 3, 1).cpu().numpy())
    print(arguments.output)
    return 0


def report(arguments: argparse.Namespace) -> int:
    from fastgrpo.reporting.report import write_report

    print(write_report(arguments.run))
    return 0


def serve_reward(arguments: argparse.Namespace) -> int:
    """A reward behind HTTP."""
    import os

    import torch

    try:
        from fastgrpo.rewards.serving.service import make_service, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'fastgrpo[serve]'") from None

    settings: dict = {}
    for setting in arguments.settings:
        apply_override(settings, setting, "--settings")
    token = os.environ.get(arguments.token_env) if arguments.token_env else None
    if arguments.token_env and not token:
        raise ValueError(f"--token-env {arguments.token_env}: this environment variable is not set")
    service = make_service(
        arguments.reward, device="cuda" if torch.cuda.is_available() else "cpu", settings=settings, token=token,
        max_images=arguments.max_images, max_bytes=arguments.max_bytes,
    )  # fmt: skip
    serve(service, arguments.host, arguments.port)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """What a run will need."""
    return run_plan(arguments, load_config(arguments.config, arguments.set))


def bench(arguments: argparse.Namespace) -> int:
    """What this machine does with a configuration."""
    from fastgrpo.commands.bench import run  # the trainer and all that it needs

    return run(arguments)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--base", action="store_true", help="without the trained LoRA")
    parser.add_argument("--steps", type=int, help="ODE steps; else the run's own")
    parser.add_argument("--guidance", type=float, help="guidance scale; else the run's own")


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML configuration, see configs/")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    command.add_argument("--random-weights", action="store_true", help="no checkpoint: the architecture with random weights")
    command.add_argument("--iterations", type=int, default=3, help="whole iterations, the first warms up; 0: none")
    command.add_argument(
        "--forms", nargs="*", metavar="FORM", help="of rollouts alone: eager, captured, compiled, 'captured, compiled'"
    )
    command.add_argument("--batches", type=int, nargs="+", help="images of such a rollout; else the configuration's, and 1")
    command.add_argument("--rounds", type=int, default=5, help="timed rollouts of each form")
    command.add_argument("--json", type=Path, metavar="FILE", help="else bench_CONFIGURATION_DEVICE.json, here")


def _serve_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--reward", required=True, help="a name, module:function or module:Class")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all of the machine's")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--token-env", metavar="NAME", help="environment variable with the token that clients must send")
    command.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="what the reward is made with")
    command.add_argument("--max-images", type=int, default=64, help="of a request, and of requests scored together")
    command.add_argument("--max-bytes", type=int, default=1 << 28, help="of a request's pixels")
    command.set_defaults(function=serve_reward)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastgrpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{train,plan,bench,eval,sample,report,serve-reward}")
    command = commands.add_parser("train", help="train a model")
    add_arguments(command)
    command.set_defaults(function=train)

    command = commands.add_parser("plan", help="parameters, memory, FLOPs and expected speed of a run")
    add_plan_arguments(command)
    command.set_defaults(function=plan)

    command = commands.add_parser("bench", help="images a second, MFU and memory on this machine, measured")
    _bench_arguments(command)
    command.set_defaults(function=bench)

    command = commands.add_parser("eval", help="accuracy of a run on its held-out prompts")
    _run_arguments(command)
    command.add_argument("--prompts", type=Path, action="append", help="another prompt file; may be given more than once")
    command.add_argument("--reward", action="append", help="instead of the run's own; may be given more than once")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, say reward.settings.NAME.path=..."
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a line for each prompt file (as without this)")
    form.add_argument("--table", action="store_true", help="prompt files and their categories by reward")
    command.add_argument("--images", type=int, help="how many images, over all categories")
    command.add_argument("--seed", type=int, help="of the noise; else the run's own")
    command.set_defaults(function=evaluate)

    command = commands.add_parser("sample", help="draw images")
    _run_arguments(command)
    command.add_argument("--prompt", action="append", required=True, help="may be given more than once")
    command.add_argument("--images", type=int, default=4, help="for each prompt")
    command.add_argument("--input", type=Path, help="the image to edit, for models that do")
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    command.add_argument("--output", type=Path, default=Path("samples.png"), help="the picture to write")
    command.set_defaults(function=sample)

    command = commands.add_parser("report", help="write a run's report.html anew")
    command.add_argument("run", type=Path, help="folder of a run")
    command.set_defaults(function=report)

    _serve_arguments(commands.add_parser("serve-reward", help="score images for runs on other machines"))

    arguments = parser.parse_args(argv)
    try:
        return arguments.function(arguments)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RewardUnavailable as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 75
