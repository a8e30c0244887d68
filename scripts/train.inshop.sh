#!/usr/bin/env bash
# Reproduce the published rows on inshop: the public re-implementation's four (recipe `unofficial`),
# then the paper's four.
#   bash scripts/train.inshop.sh [DATA_PATH] [FLAGS OF fastirt train]
set -euo pipefail
data=$(realpath -m "${1:-/data/In-shop}")
shift || true
. "$(dirname "$0")/setup.sh"

row() { # NAME FLAGS...
    local name=$1
    shift
    fastirt train --dataset inshop --data-path "$data" --rank 1 10 20 30 --output-dir "outputs/inshop/$name" --resume "$@"
}
small=deit_small_patch16_224
distilled=deit_small_distilled_patch16_224

for recipe in unofficial paper; do
    row "$recipe-irt-o" --recipe "$recipe" --model $small --max-iter 0 "$@"
    row "$recipe-irt-l" --recipe "$recipe" --model $small --max-iter 35000 --m 2 --memory-ratio 0.2 --encoder-momentum 0.999 --lambda-reg 0 "$@"
    row "$recipe-irt-r" --recipe "$recipe" --model $small --max-iter 35000 --m 2 --memory-ratio 0.2 --encoder-momentum 0.999 --lambda-reg 0.7 "$@"
    row "$recipe-irt-r-distilled" --recipe "$recipe" --model $distilled --max-iter 35000 --m 2 --memory-ratio 0.2 --encoder-momentum 0.999 --lambda-reg 0.7 "$@"
done
