#!/usr/bin/env bash
# What only a GPU can say, in one command of under 9 minutes: tests of kernels, step engines and cache, then the benchmarks, most important
# first. Usage: bash scripts/gpu_check.sh [OUT_FOLDER]. Every stage's output and every figure is in OUT_FOLDER as soon as it is known;
# summary.txt, written last, fits a page. Exit code: 0, 1 where a stage failed, 2 without a GPU.
# Needs no network: Python with torch, triton, timm and pytest; what a missing package prevents is listed as not run.
set -uo pipefail
out=$(realpath -m "${1:-outputs/gpu_check}")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
LIMIT=525 # seconds in all
python=${PYTHON:-python}
command -v "$python" > /dev/null || python=python3
if ! "$python" -c 'import torch' 2> /dev/null && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "gpu_check: no GPU that torch can use here: nothing was checked" >&2
    exit 2
fi
mkdir -p "$out"
stages=$out/stages.txt
: > "$stages"
status=0

left() { echo $((LIMIT - SECONDS)); }

stage() { # NAME SECONDS COMMAND...: its output in NAME.txt, one line about it in stages.txt
    local name=$1 limit=$2 start=$SECONDS code=0 verdict
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 5 ]; then
        echo "$name: not run: no time left" | tee -a "$stages"
        return
    fi
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.txt" 2>&1 || code=$?
    case $code in
        0) verdict=passed ;;
        124 | 130 | 137) verdict="cut off after ${limit} s" ;;
        *) verdict="failed (exit $code)" ;;
    esac
    [ $code -eq 0 ] || status=1
    echo "$name: $verdict, $((SECONDS - start)) s. $(grep -E '(passed|failed|error|wrote|^ERROR)' "$out/$name.txt" | tail -n 1 | cut -c1-150)" | tee -a "$stages"
}

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader
    git describe --always --dirty 2> /dev/null || true
} > "$out/machine.txt" 2>&1
if ! "$python" -c 'import fastirt.kernels' 2> /dev/null; then
    stage install 60 "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
fi

tests() { # NAME SECONDS FILES...
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$python" -m pytest -p no:cacheprovider -rs -v --tb=short "$@"
}
bench() { # PART SECONDS FLAGS...
    local part=$1 limit=$2
    shift 2
    stage "bench-$part" "$limit" "$python" -m benchmarks "$part" --out "$out/results.jsonl" "$@"
}

tests test-engine 110 tests/test_engine.py tests/test_step.py
tests test-cache 50 tests/test_cache.py tests/kernels/test_gather.py
tests test-kernels 110 tests/kernels --deselect tests/kernels/test_aot.py::test_all_compile_for_sm_80_90_and_100_without_a_fault
bench step 130 --batch-size 64
bench loss 60 --rows 64 256 --slots 59551
bench cache 25
bench attention 20
tests test-gpu 60 tests/test_gpu.py tests/test_profiling.py
bench train 70
stage bench-step-256 60 "$python" -m benchmarks step --out "$out/results.jsonl" --batch-size 256 --repeats 3 \
    --only "+ bf16 autocast" "+ torch.compile" "+ CUDA graph" "public recipe"
bench retrieval 40 --repeats 3
bench input 40 --repeats 3 --pictures 240

{
    echo "# gpu_check"
    cat "$out/machine.txt"
    echo
    cat "$stages"
    echo
    echo "## Not run for want of a package or of time"
    cat "$out"/stages.txt "$out"/test-*.txt "$out"/bench-*.txt 2> /dev/null | grep -E '^SKIPPED|not run:' | sed 's/^ *//' | cut -c1-160 | sort | uniq -c | sort -rn | head -n 20
    echo
    echo "## Failures"
    cat "$out"/test-*.txt 2> /dev/null | grep -E '^(FAILED|ERROR) ' | cut -c1-200 | head -n 20
    echo
    echo "## Figures"
    cat "$out"/bench-*.txt 2> /dev/null | grep -E '^(ceilings|step|loss|cache|attention|train|retrieval|input) +' | cut -c1-170 | head -n 70
} > "$out/summary.txt"
cat "$out/summary.txt"
exit $status
