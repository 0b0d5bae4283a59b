#!/usr/bin/env bash
# Compares autoencoders with and without a perceptual distance and a discriminator: three seeds each,
# on crops of photographs and on icons, judged by held-out images. About 40 minutes on two CPU cores.
# Needs the icons' data set in data/emoji (configs/README.md, "Icons").
# If interrupted, run it again to resume; delete runs/losses to start over.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
install_extra eval photographs

run=runs/losses
photographs=runs/rate_distortion/photographs_64
[[ -d $photographs ]] || python -m kontext_jax.data.build --source=photographs --size=64 \
  --num_train=4000 --num_validation=96 --output=$photographs

compare() { # NAME DATA RECIPE: trains and evaluates both, and prints a table
  local name=$1 data=$2 recipe=$3 seed
  for seed in 0 1 2; do
    python -m kontext_jax.train --config="$recipe" --config.seed=$seed --workdir=$run/$name/sharp-$seed
    python -m kontext_jax.train --config="$recipe" --config.seed=$seed --workdir=$run/$name/plain-$seed \
      --config.objective.perceptual.weight=0 --config.objective.adversarial.weight=0
    python -m kontext_jax.evaluate --workdir=$run/$name/eval-$seed \
      --config=configs/eval_autoencoder.py:$run/$name/plain-$seed,$run/$name/sharp-$seed \
      --config.cells[0].name=plain --config.cells[1].name=sharp --config.sets[0].path="$data"
  done
}

compare photographs $photographs configs/rate_distortion.py:kl_1e-4
compare icons data/emoji configs/emoji.py:autoencoder
for name in photographs icons; do
  printf '\n%s\n\n' $name
  python launch/seeds_table.py $run/$name/eval-{0,1,2}/summary.json
done
