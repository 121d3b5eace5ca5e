#!/usr/bin/env bash
# Filter pruning as a shell pipeline: train, prune, fine-tune, each its own command, beside random filters as the control
# arm. The first argument is the recipe, the rest are overrides.
#   scripts/filters.sh resnet56_cifar10_fpgm dataset.root=data
set -euo pipefail
name=${1:?usage: scripts/filters.sh RECIPE [key=value ...]}
shift
recipe=("recipe=$name" "$@")
prune run "${recipe[@]}" 'stages=[train]'
prune run "${recipe[@]}" 'stages=[train,prune]'
for criterion in "" criterion=random; do
    run=$(prune run "${recipe[@]}" 'stages=[train,prune,finetune]' $criterion | tail -n 1)
    cat "$run/results.csv"
done
