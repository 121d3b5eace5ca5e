#!/usr/bin/env bash
# VGG-16 on CIFAR-10 as a shell pipeline: train, prune with one-shot masks, fine-tune, evaluate, each its own command.
# The store carries the network from one command to the next: nothing is trained twice. Arguments are overrides.
#   scripts/vgg16_cifar10.sh dataset.root=data/cifar10
set -euo pipefail
recipe=(recipe=vgg16_cifar10_irre schedule=one_shot "$@")
prune run "${recipe[@]}" 'stages=[train]'
prune run "${recipe[@]}" 'stages=[train,prune]'
run=$(prune run "${recipe[@]}" 'stages=[train,prune,finetune]' finetune.epochs=50 | tail -n 1)
prune evaluate "$run"
cat "$run/results.csv"
