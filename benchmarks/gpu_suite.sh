#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes: the kernels' tests, then the benchmarks, whose results lie in
# benchmarks/results/ under the device's name. Goes on after a failure, and says at the end what failed.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=.:kernels HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || { echo "no GPU here" >&2; exit 1; }

failed=()
run() {
  echo "== $*"
  timeout 300 "$@" || failed+=("$*")
}
run python -m pytest -q tests/test_philox.py tests/test_sde_step.py tests/test_transition.py tests/test_rollout.py tests/test_graph.py tests/test_lora.py
run python benchmarks/kernel_speed.py
run python benchmarks/rollout_speed.py --batches 1 2 9 24 --guidance 1 --fp8
run python benchmarks/iteration_speed.py --rounds 3

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
