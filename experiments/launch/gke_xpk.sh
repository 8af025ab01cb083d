#!/usr/bin/env bash
# The same tw command on every host of a slice in GKE, by XPK: gke_xpk.sh sft configs/sft/X.gin
# The image holds the checkout at /tw_jax and tw; a disk of all hosts is attached to the cluster at
# MOUNT (xpk storage attach ... --auto-mount=true), and runs/ is a folder of it.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${IMAGE:?docker image with tw_jax and its tpu extra}"
NAME=${NAME:-tw-$(date +%m%d-%H%M)}
TPU_TYPE=${TPU_TYPE:-v5p-32}  # 16 chips, 4 hosts
MOUNT=${MOUNT:-/mnt/tw}
RESTARTS=${RESTARTS:-5}       # the same command goes on from the last checkpoint

words=$(printf '%q ' "${@:?a verb and its config}")
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices=1 --max-restarts="$RESTARTS" --docker-image="$IMAGE" \
  --command="cd /tw_jax && ln -sfn $MOUNT/runs runs && tw $words --hosts"
