#!/usr/bin/env bash
# Wheels for a machine with a GPU and no network, into .whl/, which git ignores and gpu_suite.sh installs from:
#
#   bash benchmarks/prepare_wheels.sh                        what images with torch, transformers and pytest commonly lack
#   bash benchmarks/prepare_wheels.sh diffusers hjson ...    these
#
# In the versions of constraints.txt, for Python $PYTHON_VERSION (3.12) on Linux x86-64. Nothing that a package needs comes along
# by itself: name it, or the machine's own is used.
set -e
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=(
  diffusers importlib_metadata lazy-importer
  peft ftfy wcwidth
  deepspeed hjson pydantic pydantic_core annotated-types typing-inspection
)

binary=()
for package in "${packages[@]}"; do
  if [ "$package" = deepspeed ]; then
    # It is published as source only. Without its compiled operations, of which the trainer uses none, it is plain Python.
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --constraint constraints.txt --wheel-dir .whl deepspeed
  else
    binary+=("$package")
  fi
done
if [ ${#binary[@]} -gt 0 ]; then
  platforms=()
  for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
  done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --constraint constraints.txt --dest .whl "${binary[@]}"
fi
du -sh .whl
ls .whl
