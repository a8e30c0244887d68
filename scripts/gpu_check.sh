#!/usr/bin/env bash
# What only a GPU can show: the kernels' tests on it, the GPU tests of the trainer, and the loss benchmark.
# Usage: bash scripts/gpu_check.sh [OUT_FOLDER]. Uses the Python at hand where it has fastirt, else .venv.
set -uo pipefail
out=$(realpath -m "${1:-outputs/gpu_check}")
cd "$(dirname "$0")/.."
python -c 'import fastirt.kernels' 2>/dev/null || . scripts/setup.sh
python -c 'import torch; assert torch.cuda.is_available(), "no GPU here"' || exit 1
mkdir -p "$out"
status=0
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
python -m pytest tests/kernels -p no:cacheprovider 2>&1 | tee "$out/kernels.txt" | tail -n 40 || status=1
python -m pytest tests/test_gpu.py -p no:cacheprovider 2>&1 | tee "$out/trainer.txt" | tail -n 40 || status=1
python -m benchmarks loss --out "$out/loss.json" 2>&1 | tee "$out/loss.txt" || status=1
exit $status
