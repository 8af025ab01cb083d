#!/usr/bin/env bash
# P-GRPO with mean-centred and with std-normalised advantages, three seeds each, from one model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=experiments/pgrpo_normalisation/results
mkdir -p $results
for seed in 0 1 2; do
  for normalise in mean std; do
    workdir=runs/pgrpo_normalisation/$normalise.$seed
    tw pgrpo configs/pgrpo/normalisation.gin --set "Pgrpo.workdir='$workdir'" \
      --set "Pgrpo.normalise='$normalise'" --set Pgrpo.seed=$seed --set Sampler.seed=$((seed * 1000000))
    cp $workdir/metrics.jsonl $results/$normalise.$seed.jsonl
  done
done
