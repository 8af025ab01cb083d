#!/usr/bin/env bash
# The same tw command on every host of a Cloud TPU slice, detached: tpu_vm.sh sft configs/sft/X.gin
# Its output is ~/tw.log of each host; experiments/launch/tpu_vm.sh stop saves and ends the run.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
FOLDER=${FOLDER:-/mnt/tw/tw_jax}  # the checkout, on a disk that all hosts mount
TW=${TW:-\$HOME/venv/bin/tw}      # on every host's own disk

everywhere() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${1:?a verb and its config, or stop}" = stop ]; then
  # SIGTERM to any host is enough: all of them save after the same step.
  everywhere 'kill -TERM "$(cat ~/tw.pid)"'
else
  words=$(printf '%q ' "$@")
  # Process 0 alone keeps compiled programs, so the others look for them on the shared disk.
  everywhere "cd $FOLDER && export JAX_COMPILATION_CACHE_DIR=$FOLDER/runs/xla &&
    { nohup $TW $words --hosts > ~/tw.log 2>&1 < /dev/null & echo \$! > ~/tw.pid; }"
fi
