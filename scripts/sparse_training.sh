#!/usr/bin/env bash
# LeNet-5 on digits with 10 % and 5 % of its weights after 20 epochs in all, by schedules that are sparse in different
# parts of them, three seeds. Prints a table of means and deviations over the seeds.
#   [SIZES=0.9,0.95] [SEEDS=0,1,2] scripts/sparse_training.sh [overrides]
set -euo pipefail
sweeps=outputs/sparse_training
sweep() { # NAME overrides: one arm at both sizes, three seeds
    local name=$1
    shift
    prune run -m recipe=quickstart granularity.ratio="${SIZES:-0.9,0.95}" seed="${SEEDS:-0,1,2}" latency=false \
        hydra.sweep.dir="$sweeps/$name" prune.batch_size=64 prune.optimizer.lr=0.05 lr_schedule@prune.lr_schedule=cosine \
        finetune.optimizer.lr=0.05 lr_schedule@finetune.lr_schedule=cosine "$@"
}
# one training, dense at first
gradual=(schedule.epochs=20 'stages=[prune]')
sweep one_shot "${gradual[@]}" schedule=iterative schedule.start=14 schedule.retrain_epoch=14 "$@"
sweep agp "${gradual[@]}" schedule=agp schedule.start=4 schedule.every=1 "$@"
sweep acdc "${gradual[@]}" schedule=acdc "$@"
sweep movement "${gradual[@]}" schedule=movement criterion=movement "$@"
# sparse from the beginning
sweep rigl "${gradual[@]}" schedule=rigl schedule.every=20 "$@"
sweep set "${gradual[@]}" schedule=set "$@"
before=(finetune.epochs=20 'stages=[prune,finetune]' schedule=before_training granularity.scope=global)
for criterion in random l1 snip grasp; do
    sweep before_$criterion "${before[@]}" schedule.rounds=1 criterion=$criterion prune.calibration.images=100 "$@"
done
sweep before_synflow "${before[@]}" criterion=synflow "$@"
python - "$sweeps" <<'PYTHON'
import sys
from pathlib import Path

import pandas

frames = []
for path in sorted(Path(sys.argv[1]).glob("*/results.csv")):
    rows = pandas.read_csv(path)
    rows["ratio"] = rows.ratio_requested.ffill()
    frames.append(rows[rows.stage == rows.stage.iloc[-1]].assign(arm=path.parent.name))
table = pandas.concat(frames).groupby(["arm", "ratio"]).acc1.agg(["mean", "std", "count"])
print(table.unstack().round(2).to_string())
PYTHON
