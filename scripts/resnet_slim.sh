#!/usr/bin/env bash
# ResNet, slimmed and trained from scratch: scripts/slim.sh with a recipe of this family. The first argument may be
# another recipe (resnet18_cifar10_slim_mode0, resnet50_cifar10_slim), the rest are overrides.
#   scripts/resnet_slim.sh resnet18_cifar10_slim_mode1 dataset.root=data
set -euo pipefail
case ${1:-} in "" | *=*) set -- resnet18_cifar10_slim_mode1 "$@" ;; esac
exec "$(dirname "$0")/slim.sh" "$@"
