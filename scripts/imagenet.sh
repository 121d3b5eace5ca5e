#!/usr/bin/env bash
# ImageNet from torchvision's weights on all GPUs of this machine. The first argument is a recipe, the rest are overrides;
# `batch_size` is of all processes together. After a crash of one process the run goes on from the store, and so does the
# same command after a crash of all.
#   scripts/imagenet.sh resnet18_imagenet_patdnn dataset.root=/data/imagenet
#   for kind in irre m4n2 mixed_nm patdnn stripe filter; do scripts/imagenet.sh vgg16_imagenet_$kind dataset.root=...; done
set -euo pipefail
name=${1:?usage: scripts/imagenet.sh RECIPE [key=value ...]}
shift
gpus=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec torchrun --nproc-per-node="$gpus" --rdzv-backend=c10d --rdzv-endpoint=localhost:0 --max-restarts=3 \
    -m prune_cli run recipe="$name" "$@"
