#!/usr/bin/env bash
# Every benchmark once, on an otherwise idle machine; a line each in results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
for name in trie attention step rows sampler parity; do
  tw bench "$name" --json | tee /dev/stderr | tail -n 1 >> results/"${1:-cpu}".jsonl
done
