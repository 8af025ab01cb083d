#!/usr/bin/env bash
# Compiles every config of configs/aot/; what each printed last goes to results/CONFIG.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=experiments/aot/results
mkdir -p "$results"
for config in configs/aot/*.gin; do
  name=$(basename "$config" .gin)
  tw aot "$config" | tee /dev/stderr | tail -n 1 > "$results/$name.new"
  mv "$results/$name.new" "$results/$name.json"
done
