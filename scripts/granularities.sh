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
sweep() { # NAME overrides: one granularity at one size, three seeds
    local name=$1
    shift
    prune run -m recipe=resnet20_cifar10_irre model.weights="$weights" dataset=image_folder dataset.root="$images" \
        finetune.epochs=2 finetune.optimizer.lr=0.02 \
        lr_schedule@finetune.lr_schedule=cosine seed=0,1,2 hydra.sweep.dir="$sweeps/$name" "$@"
}
sweep dense__0 'stages=[finetune]' "$@"
for criterion in l1 random; do
    for ratio in 0.75 0.5 0.875; do
        pruned=('stages=[prune,finetune]' criterion=$criterion)
        part=granularity.ratio=$ratio
        left=$(python -c "print(1 - $ratio)")
        sweep element_${criterion}_$ratio "${pruned[@]}" granularity=element $part granularity.scope=layer "$@"
        sweep stripe_${criterion}_$ratio "${pruned[@]}" granularity=stripe granularity.scope=layer $part "$@"
        sweep pattern_${criterion}_$ratio "${pruned[@]}" granularity=pattern $part granularity.units.pattern_set=fixed5 "$@"
        sweep filter_${criterion}_$ratio "${pruned[@]}" granularity=filter granularity.scope=layer "granularity.budget={params: $left}" "$@"
        sweep n_m_${criterion}_$ratio "${pruned[@]}" granularity=n_m $part granularity.units.m=$(python -c "print(8 if $ratio > 0.8 else 4)") "$@"
    done
done
python - "$sweeps" <<'PYTHON'
import sys
from pathlib import Path

import pandas

frames = []
for path in sorted(Path(sys.argv[1]).glob("*/results.csv")):
    granularity, criterion, ratio = path.parent.name.rsplit("_", 2)
    frames.append(pandas.read_csv(path).assign(granularity=granularity, ratio=float(ratio), criterion=criterion))
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
