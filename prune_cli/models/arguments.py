"""What every builder checks before it builds anything: classes, input shape, choices and positive widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from prune_cli.errors import ConfigError, first_line, nearest


def is_positive_int(value: object) -> bool:
    """Whether `value` is an integer of at least 1 (`True` is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_classes_and_shape(
    model: str, num_classes: int, in_shape: Sequence[int], min_side: int = 1
) -> tuple[int, int, int]:
    """Returns `in_shape` as the tuple (channels, height, width).

    Args:
        model: name used in the message.
        num_classes: number of outputs, at least 1.
        in_shape: three positive integers.
        min_side: smallest height and width that the network takes, in pixels.

    Raises:
        ConfigError: if a number is not positive or the input is smaller than `min_side`.
    """
    if not is_positive_int(num_classes):
        raise ConfigError(f"{model}: num_classes is {num_classes!r}, not a positive integer")
    shape = tuple(in_shape)
    if len(shape) != 3 or not all(is_positive_int(size) for size in shape):
        raise ConfigError(f"{model}: in_shape is {list(shape)}, not (channels, height, width)")
    if min(shape[1:]) < min_side:
        raise ConfigError(
            f"{model}: images of {shape[1]}x{shape[2]} pixels are too small, it takes {min_side}x{min_side} or more"
        )
    return shape[0], shape[1], shape[2]


def check_choice(model: str, key: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a `value` of `key` that is not one of `choices`.

    Raises:
        ConfigError: with the nearest or all legal values.
    """
    choices = list(choices)
    if value in choices and not isinstance(value, bool):
        return
    if all(isinstance(choice, str) for choice in choices):
        raise ConfigError(f"{model}: {key} is {value!r}{nearest(str(value), choices)}")
    raise ConfigError(f"{model}: {key} is {value!r}; there is " + ", ".join(map(str, choices)))


def check_widths(model: str, key: str, widths: Sequence[int], count: int) -> None:
    """Refuses `widths` that are not `count` positive integers.

    Raises:
        ConfigError: if there are more or fewer, or one is not a positive integer.
    """
    if isinstance(widths, str) or len(widths) != count or not all(map(is_positive_int, widths)):
        raise ConfigError(f"{model}: {key} is {widths!r}, not {count} positive integers")


def check_runs(model_name: str, model: nn.Module, in_shape: tuple[int, int, int]) -> None:
    """Runs one input of `in_shape` through the network by shapes alone (device `meta`).

    For networks of other libraries, whose smallest input is written nowhere.

    Raises:
        ConfigError: with the first line of what went wrong.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            functional_call(model, shapes, (torch.empty(1, *in_shape, device="meta"),))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
        reason = first_line(error)
        raise ConfigError(f"{model_name} does not take inputs of {tuple(in_shape)}: {reason}") from error
    finally:
        model.train(training)


NEW = "__new_layers__"


def mark_new(model: nn.Module, names: Sequence[str]) -> None:
    """Notes which modules of a pretrained network have fresh weights, for `new_layers`."""
    setattr(model, NEW, tuple(names))


def new_layers(model: nn.Module) -> tuple[str, ...]:
    """The modules of a pretrained network that its builder gave fresh weights, such as a head for other classes."""
    return getattr(model, NEW, ())


def set_in_channels(model: nn.Module, channels: int) -> None:
    """Replaces the first convolution in place by a new one for `channels` channels, otherwise alike."""
    name, conv = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    replacement = nn.Conv2d(
        channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
        bias=conv.bias is not None,
    )
    model.set_submodule(name, replacement)
