#!/usr/bin/env bash
# Check that two revisions train bit-identically: bash scripts/compare_losses.sh REV_A REV_B [STEPS]
# Both draw the demo set and train its first steps: with both engines of a CPU, with and without
# momentum encoder, on one and two ranks, with and without cache. The script compares the images,
# the losses of each step, all tensors of the last checkpoint, and the metrics. Exit code 1 if
# anything differs. Takes about 15 minutes on two CPU cores.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
[ $# -ge 2 ] || { echo "usage: bash scripts/compare_losses.sh REV_A REV_B [STEPS]" >&2; exit 2; }
steps=${3:-16}
work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

runs() { # FOLDER of a revision: train every combination
    cd "$1"
    export PYTHONPATH=$1/code
    python -m fastirt demo data --classes 40 --views 6 --workers 1 > log.txt 2>&1
    for ranks in 1 2; do for engine in eager compile; do for momentum in 0 0.99; do for cache in none host; do
        flags="--dataset demo --data-path data --method irt-r --device cpu --num-workers 1 --engine $engine --cache $cache
            --encoder-momentum $momentum --max-iter $steps --save-freq $steps --logging-freq 1 --batch-size 16 --m-per-class 4
            --memory-start 4 --warmup-iter 2 --drop-path 0.1 --output-dir runs/$engine,momentum=$momentum,ranks=$ranks,cache=$cache"
        start="python"
        [ "$ranks" = 1 ] || start="python -m torch.distributed.run --nproc_per_node=$ranks --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
        $start -m fastirt train $flags >> log.txt 2>&1 || { tail -n 20 log.txt >&2; return 1; }
    done; done; done; done
}

started=()
for side in a b; do
    revision=$1
    shift
    mkdir -p "$work/$side/code"
    git archive "$revision" | tar -x -C "$work/$side/code"
    ln -s ../kernels "$work/$side/code/fastirt/kernels" # as the installation places it
    (runs "$work/$side") &
    started+=($!)
done
for process in "${started[@]}"; do wait "$process"; done

python - "$work/a" "$work/b" << 'P'
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file

a, b = map(Path, sys.argv[1:])
LOSSES = ("step", "lr", "loss", "contrastive_batch", "contrastive_memory", "koleo", "grad_norm")


def images(side):
    return {str(path.relative_to(side)): path.read_bytes() for path in sorted((side / "data").rglob("*")) if path.is_file()}


def losses(run):
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name in LOSSES} for row in rows if "loss" in row]


def tensors(run):
    last = max((run / "checkpoints").glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
    return {name: (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8)) for name, value in load_file(last).items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in ((one[name], other[name]) for name in one)
    )


different = images(a) != images(b)
print(f"demo images: {'DIFFERENT' if different else 'equal'}, {len(images(a))} files")
for run in sorted(path.name for path in (a / "runs").iterdir()):
    one, other = (side / "runs" / run for side in (a, b))
    losses_a, losses_b = losses(one), losses(other)
    equal = {
        "losses": losses_a == losses_b,
        "weights and state": same(tensors(one), tensors(other)),
        "metrics": json.loads((one / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text()),
    }
    different |= not all(equal.values()) or not losses_a
    verdicts = ", ".join(f"{part} {'equal' if value else 'DIFFERENT'}" for part, value in equal.items())
    print(f"{run}: {len(losses_a)} steps to loss {losses_a[-1]['loss']:.6f}: {verdicts}")
sys.exit(different)
P
