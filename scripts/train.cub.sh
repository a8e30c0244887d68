#!/usr/bin/env bash
# Reproduce the published rows on cub200: the public re-implementation's four (recipe `unofficial`),
# then the paper's four.
#   bash scripts/train.cub.sh [DATA_PATH] [FLAGS OF fastirt train]
set -euo pipefail
data=$(realpath -m "${1:-/data/CUB_200_2011}")
shift || true
. "$(dirname "$0")/setup.sh"

row() { # NAME FLAGS...
    local name=$1
    shift
    fastirt train --dataset cub200 --data-path "$data" --rank 1 2 4 8 --output-dir "outputs/cub200/$name" --resume "$@"
}
small=deit_small_patch16_224
distilled=deit_small_distilled_patch16_224

for recipe in unofficial paper; do
    row "$recipe-irt-o" --recipe "$recipe" --model $small --max-iter 0 "$@"
    row "$recipe-irt-l" --recipe "$recipe" --model $small --max-iter 2000 --lambda-reg 0 "$@"
    row "$recipe-irt-r" --recipe "$recipe" --model $small --max-iter 2000 --lambda-reg 0.7 "$@"
    row "$recipe-irt-r-distilled" --recipe "$recipe" --model $distilled --max-iter 2000 --lambda-reg 0.7 "$@"
done
