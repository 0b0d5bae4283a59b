#!/usr/bin/env bash
# Runs the linter and the fast tests; needs only Python. With --all, runs every test, after installing
# PyTorch, the TPU compiler and the metrics' dependencies. Tests that compare the metrics' networks
# with PyTorch's also need `pip install --group references`, see pyproject.toml.
# Further arguments are passed to pytest, e.g. launch/test.sh -k packing
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
