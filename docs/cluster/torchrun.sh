#!/usr/bin/env bash
# The same run by torchrun: start this on every machine with the same MASTER, NNODES and RUN_ID.
#   MASTER=node0:29500 NNODES=2 RUN_ID=big docs/cluster/torchrun.sh model=reflectrm backbone=hf ...
set -euo pipefail
: "${MASTER:?host:port of one of the machines}" "${NNODES:?number of machines}"
: "${RUN_ID:?name of the run, the same on all machines}"
DEVICES=${DEVICES:-8}

# torchrun hides the exit code of a run that was asked to end (75) behind its own; so started again
# by --max-restarts it goes on from its checkpoint. The time-out is for finishing a step.
exec torchrun --nnodes="$NNODES" --nproc-per-node="$DEVICES" \
  --rdzv-backend=c10d --rdzv-endpoint="$MASTER" --rdzv-id="$RUN_ID" \
  --max-restarts="${RESTARTS:-0}" --shutdown-timeout=120 \
  train.py trainer=slurm trainer.num_nodes="$NNODES" trainer.devices="$DEVICES" \
  run_id="$RUN_ID" resume=auto "$@"
