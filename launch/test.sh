#!/usr/bin/env bash
# Runs the tests on a machine that has nothing but Python: the fast ones, or with --all every one,
# for which PyTorch, the TPU compiler, and all that metrics need are installed too. Those that compare
# networks of metrics with PyTorch's want `pip install --group references` besides, see
# pyproject.toml. Further arguments go to pytest: launch/test.sh -k packing
set -euo pipefail
source "$(dirname "$0")/environment.sh"

ruff check --quiet .
ruff format --quiet --check .

arguments=(-n "${TEST_PROCESSES:-2}" --dist worksteal)
if [[ "${1:-}" == --all ]]; then
  shift
  arguments+=(-m "")
  install_extra convert aot eval ocr faces
fi
JAX_PLATFORMS=cpu python -m pytest -q "${arguments[@]}" "$@"
