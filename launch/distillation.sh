#!/usr/bin/env bash
# Distils the quickstart's teacher with LADD and ADD, three seeds each, and tabulates the results.
# Needs the outputs of launch/quickstart.sh in runs/quickstart. Takes about an hour on two CPU cores.
# If interrupted, run it again to resume; delete runs/distillation to start over.
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
python launch/seeds_table.py $run/eval-{0,1,2}/summary.json
