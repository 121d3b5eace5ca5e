#!/usr/bin/env bash
# One trained CIFAR ResNet-20, five granularities at a half, a quarter and an eighth of the weights, three seeds: one shot,
# then 2 epochs. Beside them the same choices at random, and the dense network after the same epochs. Writes a table of
# means and deviations over the seeds, granularities.csv, in the working directory.
#   scripts/granularities.sh WEIGHTS FOLDER_OF_IMAGES [overrides]
set -euo pipefail
weights=$1 images=$2
shift 2
sweeps=outputs/granularities
rm -rf "$sweeps"
sweep() { # NAME overrides: one granularity at one size, by magnitude and at random
    local name=$1
    shift
    prune run -m recipe=resnet20_cifar10_irre model.weights="$weights" dataset=image_folder dataset.root="$images" \
        finetune.epochs=2 finetune.optimizer.lr=0.02 \
        lr_schedule@finetune.lr_schedule=cosine seed=0,1,2 hydra.sweep.dir="$sweeps/$name" "$@"
}
pruned=('stages=[prune,finetune]' criterion=l1,random)
sweep dense_0 'stages=[finetune]' "$@"
for ratio in 0.5 0.75 0.875; do
    sweep element_$ratio "${pruned[@]}" granularity=element granularity.scope=layer granularity.ratio=$ratio "$@"
    sweep stripe_$ratio "${pruned[@]}" granularity=stripe granularity.ratio=$ratio "$@"
    sweep pattern_$ratio "${pruned[@]}" granularity=pattern granularity.units.pattern_set=fixed5 granularity.ratio=$ratio "$@"
    sweep filter_$ratio "${pruned[@]}" granularity=filter "granularity.budget={params: $(python -c "print(1 - $ratio)")}" "$@"
    sweep n_m_$ratio "${pruned[@]}" granularity=n_m granularity.units.m=$(python -c "print(8 if $ratio > 0.8 else 4)") granularity.ratio=$ratio "$@"
done
python - "$sweeps" <<'PYTHON'
import sys
from pathlib import Path

import pandas

frames = []
for path in sorted(Path(sys.argv[1]).glob("*/results.csv")):
    granularity, _, ratio = path.parent.name.rpartition("_")
    frame = pandas.read_csv(path)
    criterion = frame.groupby("job").criterion.ffill().fillna("")  # of the whole job, not of its prune stage alone
    frames.append(frame.assign(granularity=granularity, ratio=float(ratio), criterion=criterion))
rows = pandas.concat(frames)
before = rows[rows.stage == "prune"].groupby(["granularity", "ratio", "criterion"]).acc1.mean().rename("acc1_pruned")
after = rows[rows.stage == "finetune"].groupby(["granularity", "ratio", "criterion"])
table = after.acc1.agg(acc1="mean", std="std", seeds="count").join(before)
for name in ("ratio_total", "bytes_stored", "latency_ms_b1", "latency_ms_b64"):
    if name in rows:
        table[name] = after[name].median()
table.round(4).to_csv("granularities.csv")
print(table.round(3).to_string())
PYTHON
