#!/usr/bin/env bash
# VGG-16 slimmed with a ratio per layer: train, sparsify, measure how sensitive each layer is, prune every layer by the
# largest ratio that is safe alone, fine-tune. The store carries the network from one command to the next. The first
# argument may be another recipe with a sparsify stage, the rest are overrides.
#   scripts/vgg_sensitivity.sh vgg16_cifar10_slim dataset.root=data
set -euo pipefail
case ${1:-} in "" | *=*) set -- vgg16_cifar10_slim "$@" ;; esac
recipe=("recipe=$1" "${@:2}")
run=$(prune run "${recipe[@]}" 'stages=[train,sparsify,sensitivity]' | tail -n 1)
ratios=$run/sensitivity/ratios_bn_scale.yaml
cat "$ratios"
run=$(prune run "${recipe[@]}" 'stages=[train,sparsify,prune,finetune]' granularity.scope=layer \
    "granularity.ratio_file=$ratios" | tail -n 1)
cat "$run/results.csv"
