#!/usr/bin/env bash
# One node's share of a job on several: run it on each node with the same arguments, in any order.
#   NODES=2 HEAD=host-of-the-first:29500 bash scripts/train.nodes.sh --dataset sop --data-path /data/SOP --output-dir /shared/run --resume
# NODES  how many nodes                                   HEAD      host:port of one of them, where they meet
# RANKS  processes a node (default: one a GPU)             RESTARTS  how often a failed job starts again by itself (default 3 with --resume,
#                                                                    or with a JOB of this launch alone, else 0)
# JOB    a name that the nodes of one job share (default: fastirt)
# --output-dir must be a folder that all nodes see; with --resume a job that was stopped goes on.
set -euo pipefail
: "${NODES:?set NODES to the number of nodes}" "${HEAD:?set HEAD to host:port of the first node}"
if ! command -v fastirt > /dev/null; then . "$(dirname "$0")/setup.sh"; fi
: "${RANKS:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
# Time for the last checkpoint, where this torchrun has the flag; without it 30 seconds.
patience=()
if python -m torch.distributed.run --help | grep -q -e --shutdown-timeout; then patience=(--shutdown-timeout=100); fi
if [ -z "${RESTARTS:-}" ]; then
    RESTARTS=0
    if [ -n "${JOB:-}" ] || [[ " $* " == *" --resume"* ]]; then RESTARTS=3; fi
fi
exec python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" \
    --rdzv-id="${JOB:-fastirt}" --max-restarts="$RESTARTS" "${patience[@]}" -m -- fastirt train "$@"
