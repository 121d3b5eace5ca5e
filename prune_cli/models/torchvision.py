"""Any classification network of torchvision by its name, with or without its pretrained weights."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from prune_cli.errors import CheckpointError, ConfigError, first_line, nearest
from prune_cli.files.fitting import fit_weights
from prune_cli.files.weights import read_state_dict
from prune_cli.models.arguments import check_classes_and_shape, check_runs, mark_new, set_in_channels

_AUXILIARY = re.compile(r"(AuxLogits|aux1|aux2)\.")
# densenets were saved when module names could hold a dot: denselayer1.norm.1 is now denselayer1.norm1
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")


def torchvision(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    name: str,
    pretrained: bool | str = False,
) -> nn.Module:
    """Builds a classification network of torchvision; auxiliary classifiers are left out.

    Args:
        num_classes: number of outputs. Where it differs from that of pretrained weights, the last layer is
            new.
        in_shape: (channels, height, width) of the input. ViT and MaxViT are built for this size; with another
            number of channels than 3 the first convolution is new.
        name: as in `torchvision.models.list_models()`, such as `resnet50` or `vit_b_16`.
        pretrained: False, True for torchvision's default weights, or the name of one set, such as
            `IMAGENET1K_V1`. Looked up in PyTorch's hub folder, else downloaded there.

    Raises:
        ConfigError: if there is no such network or set of weights, or the network does not take this input.
        CheckpointError: if the weights can't be downloaded or are damaged.
    """
    channels, height, width = shape = check_classes_and_shape("torchvision", num_classes, in_shape)
    names = zoo.list_models(module=zoo)
    if name not in names:
        raise ConfigError(f"torchvision has no classification network {name!r}{nearest(str(name), names)}")
    weights = _weights_named(name, pretrained)
    if weights is not None and channels != 3:
        raise ConfigError(f"torchvision: pretrained weights take 3 channels, the images have {channels}")
    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # their weights come from TensorFlow and expect its input range
        arguments |= {
            "aux_logits": False,
            "init_weights": weights is None,
            "transform_input": weights is not None,
        }
    elif name.startswith("vit_"):
        if height != width:
            raise ConfigError(f"torchvision: {name} takes square images, these are {height}x{width}")
        arguments["image_size"] = height
    elif name.startswith("maxvit_"):
        arguments["input_size"] = (height, width)
    try:
        model: nn.Module = zoo.get_model_builder(name)(**arguments)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"torchvision: {name} can't be built for inputs of {shape}: {reason}") from error
    if channels != 3:
        set_in_channels(model, channels)
    check_runs(f"torchvision: {name}", model, shape)
    if weights is not None:
        _load_pretrained(model, weights, num_classes)
    return model


def _weights_named(name: str, pretrained: bool | str) -> Any:
    if pretrained is False:
        return None
    sets = zoo.get_model_weights(name)
    wanted = "DEFAULT" if pretrained is True else str(pretrained)
    if wanted not in sets.__members__:
        raise ConfigError(f"torchvision: {name} has no weights {wanted!r}{nearest(wanted, sets.__members__)}")
    return sets[wanted]


def _load_pretrained(model: nn.Module, weights: Any, num_classes: int) -> None:
    """Loads the file of `weights`; the last layer stays new if it has another number of classes."""
    trained_classes = len(weights.meta["categories"])
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    fresh: dict[str, None] = {}
    path = _downloaded(weights.url)
    for key, tensor in read_state_dict(path).items():
        key = _DOTTED.sub(r"\1\2", key)
        if _AUXILIARY.match(key):
            continue
        is_old_head = key in own and tensor.shape[:1] == (trained_classes,) and own[key].shape[:1] == (num_classes,)
        if is_old_head and tensor.shape != own[key].shape:
            state[key], fresh[key.rpartition(".")[0]] = own[key], None
        else:
            state[key] = tensor
    fit_weights(model, state, str(path))
    if fresh:
        mark_new(model, list(fresh))


def _downloaded(url: str) -> Path:
    """Returns the file of `url` in the hub folder, downloaded and checked against the hash in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), match.group(1) if match else None, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash is another one
        reason = first_line(error)
        raise CheckpointError(f"no pretrained weights ({reason}): put {url} at {path}") from error
    return path
