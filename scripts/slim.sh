#!/usr/bin/env bash
# Network slimming as a shell pipeline, each step its own command: train a baseline, train on with sparse norms, prune,
# fine-tune; then the control: the pruned architecture from scratch. The store carries the network from one command to
# the next: nothing is trained twice. The first argument is the recipe, the rest are overrides.
#   scripts/slim.sh vgg16_cifar10_slim dataset.root=data
set -euo pipefail
name=${1:?usage: scripts/slim.sh RECIPE [key=value ...]}
shift
recipe=("recipe=$name" "$@")
stages=(train sparsify prune finetune)
case $name in vgg19_*) stages=(sparsify prune finetune) ;; esac # published without a baseline before it
done_so_far=""
for stage in "${stages[@]}"; do
    done_so_far=$done_so_far${done_so_far:+,}$stage
    run=$(prune run "${recipe[@]}" "stages=[$done_so_far]" | tail -n 1)
done
cat "$run/results.csv"
# Scratch-E and Scratch-B of "Rethinking the value of network pruning" (arXiv:1810.05270)
for budget in epochs compute; do
    scratch=$(prune run "${recipe[@]}" 'stages=[train]' "train.init=cfg:$run/prune/pruned.yaml" \
        "train.init_budget=$budget" | tail -n 1)
    cat "$scratch/results.csv"
done
