#!/usr/bin/env bash
# Install, draw the demo set, evaluate IRT_O, train IRT_L and IRT_R, and print a table of all runs;
# a page shows them with images: outputs/quickstart/report.html.
# A second run continues or reuses the first; delete outputs/quickstart to train again.
set -euo pipefail
extras=none
. "$(dirname "$0")/setup.sh"
data=data/demo
out=outputs/quickstart
mkdir -p "$out"
echo "device: $(python -c 'import torch; print("GPU" if torch.cuda.is_available() else "CPU")')"
fastirt demo "$data"

done_already() { [ -f "$out/$1/metrics.json" ]; }
run() { # NAME FLAGS...: skips a finished run; with --resume an unfinished one continues
    local name=$1
    shift
    done_already "$name" || fastirt train --dataset demo --data-path "$data" --output-dir "$out/$name" "$@"
}

done_already colour-histogram || python -m fastirt.demo.baseline "$data" "$out/colour-histogram"
run irt-o --method irt-o > /dev/null
# The runs are small: one thread each, in parallel, is fastest on a CPU with two cores.
export OMP_NUM_THREADS=1
run irt-l --method irt-l --resume --num-workers 1 > "$out/irt-l.log" 2>&1 &
left=$!
trap 'kill "$left" 2>/dev/null || true; wait' EXIT
run irt-r --method irt-r --resume --num-workers 1
wait $left || { tail -n 20 "$out/irt-l.log" >&2; exit 1; }
echo
runs=("$out/colour-histogram" "$out/irt-o" "$out/irt-l" "$out/irt-r")
fastirt report "${runs[@]}"
echo
fastirt report "${runs[@]}" --html "$out/report.html" 2> "$out/report.log" || { tail -n 20 "$out/report.log" >&2; exit 1; }
echo "To look at queries, neighbors and failures, open file://$PWD/$out/report.html in a browser."
