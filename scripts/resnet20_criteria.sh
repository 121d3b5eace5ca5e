#!/usr/bin/env bash
# A trained CIFAR ResNet-20 at half its MACs by five criteria and three seeds: accuracy right after pruning, after
# estimating the norm statistics again, and after 10 epochs. The random arm shows what any choice would give.
#   scripts/resnet20_criteria.sh WEIGHTS FOLDER_OF_IMAGES [overrides]
set -euo pipefail
weights=$1 images=$2
shift 2
prune run -m recipe=resnet20_cifar10_filter 'stages=[prune,recalibrate,finetune]' model.weights="$weights" \
    dataset=image_folder dataset.root="$images" dataset.val=0 'granularity.budget={macs: 0.5}' \
    finetune.epochs=10 finetune.optimizer.lr=0.02 lr_schedule@finetune.lr_schedule=cosine \
    criterion=l1,fpgm,taylor,bn_scale,random seed=0,1,2 "$@"
