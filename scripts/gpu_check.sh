#!/usr/bin/env bash
# All checks that need a GPU, in under 9 minutes: tests of kernels, step engines and cache, and the
# benchmarks, most important first.
#   bash scripts/gpu_check.sh [OUT_FOLDER]
# OUT_FOLDER gets log.txt (all output), results.jsonl (the figures), machine.txt, and summary.txt
# (one or two pages, updated after every stage). Exit code: 0, 1 if a stage failed or was cut off, 2
# without a GPU. Needs Python with torch, triton, timm and pytest, and no network; parts that miss
# another package are listed as not run.
set -uo pipefail
out=$(realpath -m "${1:-outputs/gpu_check}")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
LIMIT=${LIMIT:-525} # seconds in all
python=
for candidate in "${PYTHON:-}" python python3 .venv/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "gpu_check: torch finds no usable GPU: nothing was checked" >&2
    exit 2
fi
mkdir -p "$out"
log=$out/log.txt
: > "$log"
stages=()
status=0
deadline=15 # of the stage, in seconds since the start; time that a stage leaves goes to the next

summarize() {
    {
        echo "# gpu_check"
        cat "$out/machine.txt"
        echo
        printf '%s\n' "${stages[@]}"
        echo
        echo "## Not run"
        { printf '%s\n' "${stages[@]}" && cat "$log"; } | grep -E '^SKIPPED|not run:' | sed 's/^ *//' | cut -c1-160 | sort | uniq -c | sort -rn | head -n 40
        echo
        # pytest's list, and each test's line, which is all that a killed stage prints
        echo "## Failures"
        grep -aE '^(FAILED|ERROR) |::.* (FAILED|ERROR)( |$)|^[A-Za-z_.]+(Error|Exception|Interrupt)\b' "$log" | cut -c1-200 | awk '!seen[$0]++' | head -n 40
        echo
        echo "## Figures"
        grep -aE '^(self-check|ceilings|step|loss|cache|attention|products|train|retrieval|input) +' "$log" | grep -v 'not run:' | cut -c1-170 | head -n 100
    } > "$out/summary.txt"
}

stage() { # NAME SECONDS COMMAND...: run it and add a line to the summary
    local name=$1 start=$SECONDS code=0 limit before verdict result
    deadline=$((deadline + $2))
    [ "$deadline" -gt "$LIMIT" ] && deadline=$LIMIT
    limit=$((deadline - SECONDS))
    shift 2
    if [ "$limit" -lt 5 ]; then
        stages+=("$name: not run: no time left")
    else
        printf '\n=== %s\n' "$name" >> "$log"
        before=$(wc -c < "$log")
        timeout --signal=INT --kill-after=8 "$limit" "$@" >> "$log" 2>&1 || code=$?
        case $code in
            0) verdict=passed ;;
            124 | 130 | 137) verdict="cut off after ${limit} s" ;;
            *) verdict="failed (exit $code)" ;;
        esac
        [ $code -eq 0 ] || status=1
        result=$(tail -c +$((before + 1)) "$log" | grep -aE '(passed|failed|errors?|skipped)\b.* in [0-9]|^ERROR|^wrote' | tail -n 1 | cut -c1-150)
        stages+=("$name: $verdict, $((SECONDS - start)) s. $result")
    fi
    echo "${stages[-1]}"
    summarize
}

{
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader
    git describe --always --dirty
    "$python" --version
} > "$out/machine.txt" 2>&1
paths=$(mktemp -d)
trap 'rm -rf "$paths"' EXIT
installed() { "$python" -c 'import fastirt.kernels' 2> /dev/null; }
installed || timeout 60 "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index --editable . >> "$log" 2>&1
if ! installed; then # where pip may not install: let `fastirt.kernels` be found in ./kernels
    echo "import fastirt; fastirt.__path__.append('$PWD')" > "$paths/sitecustomize.py"
    export PYTHONPATH=$paths:$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

tests() { # NAME SECONDS FILES AND FLAGS...
    local name=$1 limit=$2
    shift 2
    stage "test-$name" "$limit" "$python" -m pytest -p no:cacheprovider -rsfE -vv --tb=short "$@"
}
bench() { # NAME SECONDS PARTS AND FLAGS...
    local name=$1 limit=$2
    shift 2
    stage "bench-$name" "$limit" "$python" -m benchmarks "$@" --out "$out/results.jsonl"
}

side_by_side() { # NAME SECONDS FILES AND FLAGS...: the tests in as many processes as there are cores
    local name=$1 limit=$2 processes
    processes=$(nproc)
    shift 2
    stage "test-$name" "$limit" bash scripts/side_by_side.sh "$((processes > 16 ? 16 : processes))" \
        "$python" -m pytest -p no:cacheprovider -rsfE -vv --tb=short "$@"
}

# In order of worth. tests/repository/test_gpu_check.py adds the seconds up.
# The results are kept for the stages below. It ends before the stage does, so that a kernel that hangs is named.
stage self-check 35 "$python" -c '
import sys, torch
from fastirt.objective.self_check import keep, run_checks
results = run_checks("cuda:0", limit=30)
keep(torch.device("cuda:0"), results)
for name, (status, detail) in results.items():
    print(f"self-check {name:20} {status} {detail}")
sys.exit(any(status in ("failed", "unchecked") for status, _ in results.values()))'
compiled_here="--ignore tests/kernels/test_aot.py --ignore tests/kernels/test_gates.py" # without a GPU: minutes
side_by_side smoke 30 tests/kernels tests/step/test_engine.py $compiled_here \
    -k "cuda_graph or no_wait or page_locked or without_a_memory or a_captured_step or up_to_the_error"
bench step-loss 95 step loss --batch-size 64 --only "+ CUDA graph" --rows 64 --slots 59551 --dtype tf32 bf16 --repeats 5
bench attention-products 25 attention products
bench step-more 100 step --batch-size 64 --repeats 5 --only "+ CUDA graph" "graph, bf16 weights" "+ torch.compile" \
    "public recipe" "+ fused loss" "+ bf16 autocast" "eager fp32" "graph, bf16 memory" "graph, momentum twin"
bench cache-retrieval 30 cache retrieval --repeats 3
side_by_side kernels 85 tests/kernels/test_values.py tests/kernels/test_gather.py tests/kernels/test_parts.py
side_by_side gpu 40 tests/step/test_gpu.py tests/loading/test_image_cache.py tests/step/test_train_step.py tests/training/test_saving.py \
    -k "test_gpu and not input_wait or test_image_cache and not training_ends or on_the_kernels or snapshot"
tests ranks 25 tests/distributed/test_on_gpu.py tests/step/test_gpu.py -k "test_on_gpu or input_wait" # alone: they take times
bench train-input 40 train input --repeats 2 --steps 120 --images 480
side_by_side kernels-edges 5 tests/kernels/test_edges.py tests/kernels/test_torch.py tests/kernels/test_counts.py tests/kernels/test_precision.py # in what is left
stages+=("bench-step-256: not run: python -m benchmarks step --batch-size 256")
stages+=("bench-max-autotune: not run: minutes of compiling: python -m benchmarks step --batch-size 64 --only '+ CUDA graph' 'graph, max-autotune'")

summarize
cat "$out/summary.txt"
exit $status
