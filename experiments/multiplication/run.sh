#!/usr/bin/env bash
# The demo's model before and after reinforcement, and its sequential twin: 900 steps each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=experiments/multiplication/results
mkdir -p $results
tw make configs/make/demo.gin
tw make configs/make/demo_sequential.gin
tw sft configs/sft/demo.gin
tw sft configs/sft/demo_sequential.gin
tw evaluate configs/evaluate/demo_sft.gin
tw evaluate configs/evaluate/demo_sequential.gin
tw pgrpo configs/pgrpo/demo.gin
tw evaluate configs/evaluate/demo.gin
cp runs/demo/before/summary.json $results/before.json
cp runs/demo/summary.json $results/after.json
cp runs/demo/sequential/summary.json $results/sequential.json
