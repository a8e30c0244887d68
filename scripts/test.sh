#!/usr/bin/env bash
# All tests, in a virtual environment of the project's own; `quick`: those without interpreter, ranks and compiler.
# Further arguments go to pytest: bash scripts/test.sh tests/objective/test_cross_batch_memory.py
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = quick ]; then
    shift
    export OMP_NUM_THREADS=1 # two processes on two cores
    set -- -n 2 --dist loadfile -m "not (interpreter or ranks or compile or slow or sweep)" "$@"
fi
exec python -m pytest "$@"
