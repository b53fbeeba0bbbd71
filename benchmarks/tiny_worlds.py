"""The headline on a tiny world: base and trained accuracy over several seeds, each a run as `make train` does it.

    python benchmarks/tiny_worlds.py                 seeds 0, 1, 2 one after the other; ends in one JSON line
    python benchmarks/tiny_worlds.py --config configs/tiny_text.yaml --seeds 0

Writes results/NAME.json, results/NAME.png (reward while training, accuracy by category) and results/NAME_samples.png (base
above trained, for the same prompts and the same noise), named after the configuration.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = 8  # samples in the picture


def train(config: Path, seed: int, output: Path, settings: list[str]) -> dict:
    """One run under the DeepSpeed launcher, its progress bar on the terminal; its summary."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), str(ROOT / "fastgrpo" / "train.py"), "--config", str(config)]
    for setting in (f"seed={seed}", f"output={output}", *settings):
        command += ["--set", setting]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(runs: list[Path], summaries: list[dict], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run, summary in zip(runs, summaries, strict=True):
        metrics = rows(run / "metrics.jsonl")
        left.plot([row["iteration"] for row in metrics], [row["reward"] for row in metrics], label=f"seed {summary['seed']}")
    left.set(xlabel="iteration", ylabel="training reward", title="Reward of the rollouts")
    left.legend(frameon=False)
    categories = list(summaries[0]["base"])
    places = np.arange(len(categories))
    for shift, key, color in ((-0.2, "base", "#9aa5b1"), (0.2, "final", "#2f6fdb")):
        values = np.array([[summary[key][c] for c in categories] for summary in summaries])
        spread = [values.mean(0) - values.min(0), values.max(0) - values.mean(0)]
        right.bar(places + shift, values.mean(0), 0.38, yerr=spread, color=color, label=key, capsize=3)
    right.set_xticks(places, [c.replace("_", "\n") for c in categories])
    right.set(ylim=(0, 1), title=f"Held-out accuracy, mean and range of {len(runs)} seeds")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_samples(run: Path, path: Path) -> None:
    """The first samples of the base above those of the trained model, with their prompts."""
    folders = sorted(folder for folder in (run / "samples").iterdir() if folder.is_dir())
    prompts = json.loads((run / "samples" / "prompts.json").read_text(encoding="utf-8"))
    width, height = Image.open(folders[0] / "000.png").size
    figure, axes = plt.subplots(2, COLUMNS, figsize=(1.5 * COLUMNS, 3 * height / width + 0.5), layout="constrained")
    for row, (folder, name) in enumerate(((folders[0], "base"), (folders[-1], "trained"))):
        for i, axis in enumerate(axes[row]):
            axis.imshow(Image.open(folder / f"{i:03d}.png"), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                words = prompts[i]["prompt"].split()
                half = (len(words) + 1) // 2
                axis.set_title(" ".join(words[:half]) + "\n" + " ".join(words[half:]), fontsize=8)
        axes[row][0].set_ylabel(name)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_shapes.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=None, help="where the runs are kept; otherwise runs/NAME_seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    config, name = args.config.resolve(), args.config.stem
    folder = (args.runs or ROOT / "runs" / f"{name}_seeds").resolve()
    runs = [folder / str(seed) for seed in args.seeds]
    summaries = [train(config, seed, run, args.set) for seed, run in zip(args.seeds, runs, strict=True)]
    RESULTS.mkdir(exist_ok=True)
    draw(runs, summaries, RESULTS / f"{name}.png")
    draw_samples(runs[0], RESULTS / f"{name}_samples.png")
    text = json.dumps({"settings": args.set, "runs": summaries}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    keys = ("seed", "base_accuracy", "final_accuracy", "train_seconds")
    print(json.dumps([{key: summary[key] for key in keys} for summary in summaries]))


if __name__ == "__main__":
    main()
