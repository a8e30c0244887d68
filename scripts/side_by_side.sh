#!/usr/bin/env bash
# Run pytest in N processes that share its tests: bash scripts/side_by_side.sh N PYTEST_COMMAND...
# So kernels are compiled on N cores. Prints the output of one process after the other, also on
# SIGINT, which ends them all. Exit code: 0, or that of a process with a failed test.
set -uo pipefail
count=$1
shift
logs=$(mktemp -d)
pids=()
finish() {
    kill -KILL "${pids[@]}" 2> /dev/null
    wait 2> /dev/null
    cat "$logs"/*
    rm -rf "$logs"
    exit "$1"
}
trap 'finish 130' INT TERM
for i in $(seq "$count"); do
    "$@" --shard "$i/$count" > "$logs/$(printf %03d "$i")" 2>&1 &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    ended=$?
    [ $ended = 0 ] || [ $ended = 5 ] || code=$ended # 5: more processes than tests
done
finish $code
