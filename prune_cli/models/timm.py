"""Any image classifier of timm (the optional dependency `prune-cli[timm]`) by its name."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from prune_cli.errors import CheckpointError, ConfigError, first_line, nearest
from prune_cli.models.arguments import check_classes_and_shape, check_runs, mark_new


def timm(*, num_classes: int, in_shape: tuple[int, int, int], name: str, pretrained: bool = False) -> nn.Module:
    """Builds a network of timm with a new last layer of `num_classes` outputs.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; networks of a fixed size are built for this one.
        name: as in `timm.list_models()`, such as `resnet50d` or `deit_tiny_patch16_224`.
        pretrained: whether to load timm's weights, from the Hugging Face cache or by download.

    Raises:
        ConfigError: if timm is not installed, has no such network, or the network does not take this input.
        CheckpointError: if the weights can't be downloaded.
    """
    channels, height, width = shape = check_classes_and_shape("timm", num_classes, in_shape)
    try:
        library = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError("timm is not installed; run: pip install 'prune-cli[timm]'") from error
    if not library.is_model(name):
        raise ConfigError(f"timm has no network {name!r}{nearest(str(name), library.list_models())}")
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    defaults = library.get_pretrained_cfg(name)
    if defaults is not None and defaults.fixed_input_size:
        arguments["img_size"] = (height, width)
    model = _created(library, name, arguments, f"inputs of {shape}")
    check_runs(f"timm: {name}", model, shape)
    if not pretrained:
        return model
    try:
        model = library.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        where = getattr(defaults, "hf_hub_id", None) or getattr(defaults, "url", None) or name
        raise CheckpointError(
            f"no pretrained weights of {name} ({reason}): get the file of {where} and give model.weights=PATH"
            " with model.pretrained=false"
        ) from error
    head = getattr(defaults, "classifier", None)
    if head and getattr(defaults, "num_classes", num_classes) != num_classes:
        mark_new(model, [head] if isinstance(head, str) else list(head))
    return model


def _created(library: Any, name: str, arguments: dict[str, Any], inputs: str) -> nn.Module:
    try:
        return library.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"timm: {name} can't be built for {inputs}: {reason}") from error
