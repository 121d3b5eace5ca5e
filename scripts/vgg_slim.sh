#!/usr/bin/env bash
# VGG, slimmed and trained from scratch: scripts/slim.sh with a recipe of this family. The first argument may be another
# recipe (vgg19_cifar10_slim, vgg19_cifar100_slim), the rest are overrides.
#   scripts/vgg_slim.sh vgg16_cifar10_slim dataset.root=data
set -euo pipefail
case ${1:-} in "" | *=*) set -- vgg16_cifar10_slim "$@" ;; esac
exec "$(dirname "$0")/slim.sh" "$@"
