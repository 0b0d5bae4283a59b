#!/usr/bin/env bash
# From fifty steps to four, measured: LADD and ADD from the quickstart's teacher, three seeds each.
# Needs what launch/quickstart.sh leaves in runs/quickstart. Two CPU cores take about an hour.
# Stopped and started again, it goes on where it was; delete runs/distillation to start anew.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
install_extra eval

run=runs/distillation
python -m kontext_jax.encode --config=configs/distillation.py:ladd
for seed in 0 1 2; do
  for method in ladd add; do
    python -m kontext_jax.train --config=configs/distillation.py:$method \
      --config.seed=$seed --workdir=$run/$method-$seed
  done
  if [[ ! -f $run/eval-$seed/summary.json ]]; then
    python -m kontext_jax.evaluate --config=configs/eval_distillation.py:$seed \
      --workdir=$run/eval-$seed
  fi
done
python launch/distillation_table.py $run/eval-{0,1,2}/summary.json
