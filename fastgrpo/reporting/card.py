"""The model card of a run, README.md in a repository: what was trained and how, the scores before and after, how to load it.

    text = model_card(read_run(folder), config, name="me/sd3-ocr", base=None, pipeline="StableDiffusion3Pipeline", task=...)

It says what the run's files say, and of paths no more than the last name, as the rest is of this machine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fastgrpo.config.keys import Config
from fastgrpo.config.sizes import Size, training_sizes
from fastgrpo.reporting.run_folder import LORAS
from fastgrpo.reporting.saved_run import SavedRun
from fastgrpo.reporting.text import score_text
from fastgrpo.version import __version__

# What `load_lora_weights` has to be told of a network beside the folder.
LOADING = {"transformer": "", "transformer_2": f', weight_name="{LORAS["transformer_2"]}", load_into_transformer_2=True'}


def model_card(
    run: SavedRun, config: Config, *, name: str, base: str | None, pipeline: str, task: str, networks: Sequence[str]
) -> str:
    """name: of the repository. base: of the base model on the Hub, if it is known. pipeline: its class in diffusers.

    task: what the Hub calls what it does, such as text-to-image. networks: those that were trained, by diffusers' names.
    """
    data: dict[str, Any] = {
        "library_name": "diffusers", "tags": ["reinforcement-learning", "flow-grpo", "fastgrpo"],
        "pipeline_tag": task,
    }  # fmt: skip
    if base is not None:
        data |= {"base_model": base, "base_model_relation": "adapter" if config.model.train == "lora" else "finetune"}
    what = "A LoRA" if config.model.train == "lora" else "All weights of the transformer"
    parts = [
        f"---\n{ModelCardData(**data)}\n---",
        f"# {name.rpartition('/')[2]}",
        f"{what} for {base or _last(config.model.path)}, trained by online reinforcement learning "
        f"({config.objective.name}) with fastgrpo {__version__} to raise the reward "
        f"{_rewards(config.reward.train)}.",
        "## Scores", _scores(run, config),
        "## Training", _training(run, config),
        "## Use", _use(config, name, base, pipeline, networks),
        "The licence of the base model holds for what was trained on it.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _last(path: Path) -> str:
    return f"`{path.resolve().name}`"


def _rewards(rewards: str | dict[str, float]) -> str:
    named = {rewards: 1.0} if isinstance(rewards, str) else rewards
    if len(named) == 1:
        return f"`{_without_place(next(iter(named)))}`"
    return " + ".join(f"{weight:g} x `{_without_place(name)}`" for name, weight in named.items())


def _without_place(reward: str) -> str:
    """The name of a reward, of a file of one's own without its folder."""
    return reward.rpartition("/")[2]


def _scores(run: SavedRun, config: Config) -> str:
    before, after = run.accuracies()
    if not before or not after:
        return "It was not evaluated before and after training, so there are no scores."
    evaluation, same = config.evaluation, config.reward.train == config.reward.eval
    start = "base" if config.model.lora.path is None else f"start ({_last(config.model.lora.path)})"
    rows = [
        f"| {name} | {_cell(run, name, before)} | {_cell(run, name, after)} |" for name in dict.fromkeys([*before, *after])
    ]
    last = run.evaluations[-1]
    return "\n".join([
        f"| {'reward' if same else 'another reward'} `{_rewards(config.reward.eval).strip('`')}` | {start} | trained |",
        "|---|---|---|", *rows, "",
        f"Measured by the run itself after iteration {last['iteration']}: {last.get('images', 'some')} images of held-out "
        f"prompts (`{config.prompts.eval.name}`), {evaluation.num_steps} steps, guidance {evaluation.guidance_scale:g}, the "
        f"same noise before and after. {'This is the reward that was trained on.' if same else ''}".rstrip(),
    ])  # fmt: skip


def _cell(run: SavedRun, name: str, scores: dict[str, float]) -> str:
    return score_text(scores[name], run.in_percent(name)) if name in scores else ""


def _training(run: SavedRun, config: Config) -> str:
    model, rollout = config.model, config.rollout
    own = Size(model.height, model.width, model.num_frames)
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    of = "" if run.summary.get("status") == "finished" else f" of {config.iterations}: the run has not finished"
    lora = f"rank {model.lora.rank}" + (f", from {_last(model.lora.path)}" if model.lora.path else "")
    facts = {
        "iterations": f"{done}{of}",
        "images": f"{done * rollout.groups * rollout.group_size:,}, in groups of {rollout.group_size}",
        "prompts": f"`{config.prompts.train.name}`",
        "trained": f"a LoRA of {lora}" if model.train == "lora" else "every weight",
        "transformer": None if model.transformer is None else f"{_last(model.transformer)} in place of the base's",
        "expert": None if model.experts == "both" else f"that for {model.experts} noise alone",
        "rollout": f"{rollout.num_steps} steps, {rollout.sampler}, guidance {rollout.guidance_scale:g}",
        "negative prompt": model.negative_prompt or None,
        "KL": f"beta {config.objective.beta:g}",
        "learning rate": f"{config.update.learning_rate:g}",
        "size": ", ".join(map(str, training_sizes(config) if rollout.sizes else [own])) or "the model's own",
        "seed": config.seed,
        "device": run.summary.get("device"),
    }
    rows = (f"| {key} | {value} |" for key, value in facts.items() if value is not None)
    return "\n".join(["| | |", "|---|---|", *rows])


def _use(config: Config, name: str, base: str | None, pipeline: str, networks: Sequence[str]) -> str:
    if config.model.name == "bagel":
        return "`fastgrpo sample --lora` draws with it; `fastgrpo export --format merged` writes it into BAGEL's own file."
    load = [f'pipeline = {pipeline}.from_pretrained("{base or "the base model"}", torch_dtype=torch.bfloat16)']
    if config.model.train == "lora":
        load += [f'pipeline.load_lora_weights("{name}"{LOADING[network]})' for network in networks]
    else:
        parts = "".join(f", {network}={network}" for network in networks)
        load = [
            *(
                f'{network} = AutoModel.from_pretrained("{name}", subfolder="{network}", torch_dtype=torch.bfloat16)'
                for network in networks
            ),
            f"{load[0][:-1]}{parts})",
        ]
    names = f"AutoModel, {pipeline}" if config.model.train == "full" else pipeline
    return "\n".join(["```python", "import torch", f"from diffusers import {names}", "", *load, "```"])
