#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes, for a machine without a network.
#
#   bash benchmarks/gpu_suite.sh [seconds] [phase ...]           500 seconds and all phases, see gpu_suite.py
#   REHEARSE=1 OUT=/tmp/out bash benchmarks/gpu_suite.sh         the same lines on a CPU, with tiny models
#
# Installs the wheels in .whl/ first, where there are any (prepare_wheels.sh). Everything found lies in $OUT, in at most 8 files.
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-/tmp/gpu_suite}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" || exit 1

paths=$PWD:$PWD/kernels:$PWD/benchmarks
if [ "${REHEARSE:-}" = 1 ]; then
  # Without torch.compile, which takes minutes on a CPU.
  export CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
elif ! nvidia-smi -L; then
  echo "error: there is no GPU here; REHEARSE=1 runs the suite on a CPU with tiny models" >&2
  exit 1
elif ls .whl/*.whl >/dev/null 2>&1; then
  site=${TMPDIR:-/tmp}/site
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl ||
    echo "warning: the wheels were not installed; what needs none of them goes on" >&2
  paths=$paths:$site
  export PATH=$site/bin:$PATH
  # Launchers and tests set a PYTHONPATH of their own for the processes they start, which a .pth outlasts.
  packages=$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')
  echo "$site" >"$packages/gpu_suite.pth" || echo "warning: no .pth in $packages: tests that start processes will fail" >&2
fi
export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo # there may be no interface but the loopback
# One place for all phases and the processes they start: what one has compiled the next one finds.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/gpu_suite_inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/gpu_suite_triton}
exec "$PYTHON" benchmarks/gpu_suite.py "$@"
