#!/usr/bin/env bash
# All tests, in a virtual environment of the project's own. Arguments go to pytest: bash scripts/test.sh tests/test_memory.py
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec python -m pytest "$@"
