#!/usr/bin/env bash
# What searches are worth: LeNet-5 on digits at a part of its MACs by one shot and by every search, the same trainings before
# and after, three seeds. Candidates are scored on a fifth of the training images. netadapt is there without its short
# trainings, so that all have the same number of epochs.
#   scripts/searches.sh [overrides]        e.g. 'granularity.budget={macs: 0.1}'
set -euo pipefail
export PRUNE_RECIPES=$(mktemp -d)
trap 'rm -r "$PRUNE_RECIPES"' EXIT
mkdir "$PRUNE_RECIPES/schedule"
sed 's/^short_epochs: 1/short_epochs: 0/' "$(dirname "$0")/../recipes/schedule/netadapt.yaml" \
    >"$PRUNE_RECIPES/schedule/netadapt_scored.yaml"
prune run -m recipe=quickstart granularity=filter 'granularity.budget={macs: 0.15}' dataset.val=0.2 latency=false \
    seed=0,1,2 \
    schedule=one_shot,sensitivity,netadapt_scored,simulated_annealing,amc,optuna "$@"
