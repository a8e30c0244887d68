#!/usr/bin/env bash
# Train on several nodes: run this on each node with the same arguments, in any order.
#   NODES=2 HEAD=host-of-the-first:29500 bash scripts/train.nodes.sh \
#       --method irt-r --dataset sop --data-path /data/SOP --output-dir /shared/run --resume
# NODES     number of nodes
# HEAD      host:port of one node, for the rendezvous
# RANKS     processes per node (default: one per GPU)
# JOB       name of this launch, the same on all nodes (default: fastirt)
# RESTARTS  automatic restarts of a failed job (default: 3 with --resume or JOB, else 0)
# --output-dir must be a folder shared by all nodes; with --resume a stopped job continues.
set -euo pipefail
: "${NODES:?set NODES to the number of nodes}" "${HEAD:?set HEAD to host:port of the first node}"
if ! command -v fastirt > /dev/null; then . "$(dirname "$0")/setup.sh"; fi
: "${RANKS:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
# Time for the last checkpoint if this torchrun has the flag (its default is 30 seconds).
shutdown=()
if python -m torch.distributed.run --help | grep -q -e --shutdown-timeout; then shutdown=(--shutdown-timeout=100); fi
if [ -z "${RESTARTS:-}" ]; then
    RESTARTS=0
    if [ -n "${JOB:-}" ] || [[ " $* " == *" --resume"* ]]; then RESTARTS=3; fi
fi
exec python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" \
    --rdzv-id="${JOB:-fastirt}" --max-restarts="$RESTARTS" "${shutdown[@]}" -m -- fastirt train "$@"
