#!/usr/bin/env bash
# Run pytest in N processes that share its tests: bash scripts/side_by_side.sh N PYTEST_COMMAND...
# So kernels are compiled on N cores. Prints the output of one process after the other, also on
# SIGINT, which ends them all with what they have started, and the sum of their results. Exit code:
# 0, or that of a process with a failed test.
set -uo pipefail
count=$1
shift
logs=$(mktemp -d)
pids=()
export TORCHINDUCTOR_COMPILE_THREADS=1
finish() {
    for pid in "${pids[@]}"; do
        kill -KILL -- "-$pid" 2> /dev/null # the whole session of the process
    done
    cat "$logs"/*
    # pytest's last line: "1 failed, 2 passed in 0.03s"
    grep -haE '^[0-9]+ (passed|failed|skipped|error|deselected)' "$logs"/* | grep -oE '[0-9]+ (passed|failed|error|skipped)' |
        awk -v processes="$count" '
            { sum[$2] += $1 }
            END {
                split("failed error passed skipped", words)
                for (i = 1; i <= 4; i++) if (words[i] in sum) printf "%d %s, ", sum[words[i]], words[i]
                print "in " processes " processes"
            }'
    rm -rf "$logs"
    exit "$1"
}
trap 'finish 130' INT TERM
for i in $(seq "$count"); do
    setsid "$@" --shard "$i/$count" > "$logs/$(printf %03d "$i")" 2>&1 &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    ended=$?
    [ $ended = 0 ] || [ $ended = 5 ] || code=$ended # 5: more processes than tests
done
pids=()
finish $code
