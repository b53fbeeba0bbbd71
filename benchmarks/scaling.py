"""How an iteration's time grows with ranks: a model of compute and communication, checked against runs, then extrapolated.

    python benchmarks/scaling.py              runs with 1, 2 and 4 CPU ranks; writes results/scaling_DEVICE.{json,png}

For N images an iteration on W ranks, U optimiser steps, G bytes of gradient in float32 and C ranks that really run at once:

    T(W) = N c k(W) / min(W, C)  +  U (2 log2(W) a + 2 (W - 1) / W G / b)

c is measured with one rank; k, what ranks lose to each other's use of memory and caches, by C runs of one rank at the same
time that know nothing of each other (k = 1 for one rank, and on GPUs, which share neither); a (seconds a message) and b
(bytes a second) by all-reduces of two sizes between two ranks. So runs with 2 and 4 ranks test the model, none of them
having gone into it. CPU ranks get one thread each.

For GPUs nothing was measured: c, a and b are assumptions, printed with the result, for LoRA on SD3.5-M at 512 px.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, finish, pyplot
from tqdm import tqdm

from fastgrpo.measure import DEVICE

SETTINGS = ["iterations=5", "rollout.groups=8", "rollout.group_size=8", "rollout.batch_size=8", "evaluation.images=10",
            "evaluation.batch_size=10", "evaluation.samples=1", "evaluation.num_steps=2", "evaluation.every=0"]  # fmt: skip
IMAGES = 64
PROBE_BYTES = (1 << 12, 1 << 24)
# Assumed, not measured: images a second of a whole iteration on one GPU, seconds a message, bytes a second between GPUs.
GPU = {"images_per_second": 10.0, "latency": 20e-6, "bandwidth": 40e9, "gradient_bytes": 18.8e6 * 4, "images": 1152}


def launch(ranks: int, arguments: list[str]) -> str:
    return finished(begin(ranks, arguments))


def begin(ranks: int, arguments: list[str]) -> subprocess.Popen:
    places = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))  # packages may be carried on it
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen) -> str:
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}:\n{output}{errors}")
    return output


def iteration_seconds(ranks: int, config: Path, copies: int = 1) -> float:
    """Of a run, or the mean of several that run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"run{i}" for i in range(copies)]
        runs = []
        for output in outputs:
            options = [part for setting in (*SETTINGS, f"output={output}") for part in ("--set", setting)]
            runs.append(begin(ranks, [str(ROOT / "fastgrpo" / "train.py"), "--config", str(config), *options]))
        for run in runs:
            finished(run)
        found = [
            [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for output in outputs
        ]
    # The first iteration warms up.
    return statistics.mean(statistics.median(sum(row["seconds"].values()) for row in rows[1:]) for rows in found)


def probe() -> None:
    """Run by each of two ranks: seconds of an all-reduce of each size."""
    dist.init_process_group("gloo")
    seconds = []
    for size in PROBE_BYTES:
        tensor = torch.zeros(size // 4)
        times = []
        for _ in range(20):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        seconds.append(statistics.median(times))
    if dist.get_rank() == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


def communication(ranks: int, latency: float, bandwidth: float, size: float) -> float:
    """Seconds of one all-reduce."""
    return 2 * math.log2(ranks) * latency + 2 * (ranks - 1) / ranks * size / bandwidth if ranks > 1 else 0.0


def trained_bytes(config: Path) -> int:
    from fastgrpo.models import load_model
    from fastgrpo.validation import load_config

    settings = load_config(config)
    model = load_model("sd3", path=settings.model.path, dtype=torch.float32, device=torch.device("cpu"), max_text_tokens=1)
    lora = settings.model.lora
    model.add_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return 4 * sum(p.numel() for p in model.transformer.parameters() if p.requires_grad)


def gpu_rows() -> list[dict[str, Any]]:
    rows = []
    for ranks in (1, 8, 64, 512):
        row: dict[str, Any] = {"ranks": ranks}
        for name, images in (("same_images", GPU["images"]), ("images_with_ranks", GPU["images"] / 8 * ranks)):
            share = math.ceil(images / ranks)
            compute = share / GPU["images_per_second"]
            talk = 2 * communication(ranks, GPU["latency"], GPU["bandwidth"], GPU["gradient_bytes"])
            ideal = images / ranks / GPU["images_per_second"]
            row[name] = {"seconds": round(compute + talk, 3), "efficiency": round(ideal / (compute + talk), 4)}
        rows.append(row)
    return rows


def draw(measured: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> Any:
    plt = pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ranks = [row["ranks"] for row in measured]
    left.plot(ranks, [row["predicted_seconds"] for row in measured], color="#9aa5b1", marker="s", label="model")
    left.plot(ranks, [row["seconds"] for row in measured], color="#2f6fdb", marker="o", linestyle="none", label="measured")
    left.set(xlabel="CPU ranks", ylabel="seconds an iteration", ylim=(0, None), title="Checked")
    left.set_xticks(ranks)
    left.legend(frameon=False)
    ranks = [row["ranks"] for row in predicted]
    for name, label in (("same_images", "1,152 images in all"), ("images_with_ranks", "144 images a GPU")):
        right.plot(ranks, [row[name]["efficiency"] for row in predicted], marker="o", label=label)
    right.set(xscale="log", xlabel="GPUs", ylabel="efficiency", ylim=(0, 1.05), title="Extrapolated, from assumptions")
    right.set_xticks(ranks, ranks)
    right.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe()
        return
    if DEVICE.type == "cuda":
        parser.error("this checks the model with CPU ranks: hide the GPU with CUDA_VISIBLE_DEVICES=")
    small, large = json.loads(launch(2, [str(Path(__file__)), "--probe"]).splitlines()[-1])
    latency = small / 2
    bandwidth = PROBE_BYTES[1] / max(large - small, 1e-9)
    gradient, cores = trained_bytes(arguments.config), len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    for ranks in tqdm(arguments.ranks, desc="ranks"):
        rows.append({"ranks": ranks, "seconds": round(iteration_seconds(ranks, arguments.config), 4)})
    alone = rows[0]["seconds"] * rows[0]["ranks"] if rows[0]["ranks"] == 1 else None
    if alone is None:
        parser.error("--ranks must begin with 1, from which the cost of an image is taken")
    together = iteration_seconds(1, arguments.config, copies=cores) / alone
    for row in rows:
        talk = 2 * communication(row["ranks"], latency, bandwidth, gradient)
        contention = 1.0 if row["ranks"] == 1 else together
        row["predicted_seconds"] = round(alone * contention / min(row["ranks"], cores) + talk, 4)
        row["error"] = round(row["predicted_seconds"] / row["seconds"] - 1, 4)
    fitted = {
        "contention": round(together, 4), "latency_s": latency, "bandwidth_bytes_s": bandwidth,
        "gradient_bytes": gradient, "cores": cores,
    }  # fmt: skip
    predicted = gpu_rows()
    finish("scaling", {"images": IMAGES, "fitted": fitted, "rows": rows, "gpu_assumptions": GPU, "gpu": predicted},
           draw(rows, predicted))  # fmt: skip


if __name__ == "__main__":
    main()
