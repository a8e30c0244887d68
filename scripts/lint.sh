#!/usr/bin/env bash
# Check style, unused code and types in seconds: bash scripts/lint.sh [--fix]
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --fix ]; then
    python -m ruff check --fix .
    python -m ruff format .
else
    python -m ruff check .
    python -m ruff format --check .
fi
python -m mypy
