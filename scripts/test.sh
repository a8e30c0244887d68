#!/usr/bin/env bash
# Run the tests in the project's virtual environment: bash scripts/test.sh [quick] [PYTEST_FLAGS]
# `quick`: without the tests that need Triton's interpreter, several ranks or the compiler.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

# The tests of HTML pages need a browser; without one they are skipped.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
install_chromium() {
    as_root timeout 100 apt-get update -qq && as_root timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
}
if ! command -v chromium chromium-browser google-chrome > /dev/null; then
    echo "installing chromium for the tests of HTML pages"
    install_chromium > /dev/null 2>&1 || echo "chromium cannot be installed here: the tests of HTML pages in a browser are skipped"
fi

if [ "${1:-}" = quick ]; then
    shift
    export OMP_NUM_THREADS=1 # two processes with two threads each take twice as long on two cores
    set -- -n 2 --dist loadfile -m "not (interpreter or ranks or compile or slow or sweep)" "$@"
elif [ $# = 0 ]; then
    # Two processes, but one for the tests that start several themselves.
    failed=0
    export OMP_NUM_THREADS=1
    python -m pytest -n 2 --dist loadfile --ignore tests/distributed || failed=1
    python -m pytest tests/distributed || failed=1
    exit $failed
fi
exec python -m pytest "$@"
