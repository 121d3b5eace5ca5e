"""Recurrent layers by their first steps: further ones say nothing new, and there may be hundreds of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from prune_cli.structure.labels import Work

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
STEPS = 2  # the first one takes a state from elsewhere, the second one its own


def shorten(replaced: ExitStack, work: Callable[[], list[Work]]) -> None:
    """Lets the layers run on the first steps of a sequence, and repeats what they give.

    Args:
        replaced: takes back what is replaced here.
        work: the multiply-adds that are counted so far; those of the steps that ran become those of all.
    """
    for name in KINDS:
        replaced.enter_context(patch.object(torch._VF, name, _shortened(getattr(torch._VF, name), work)))


def _shortened(original: Callable[..., Any], work: Callable[[], list[Work]]) -> Callable[..., Any]:
    def layer(*args: Any) -> Any:
        packed = len(args) != 9 or not isinstance(args[3], bool)  # one axis of steps and sequences
        axis = 0 if packed or not args[8] else 1
        steps = args[0].shape[axis]
        if packed or steps <= STEPS:
            return original(*args)
        before = len(work())
        out, *states = original(args[0].narrow(axis, 0, STEPS), *args[1:])
        counted = work()
        counted[before:] = [replace(one, static=one.static * steps // STEPS) for one in counted[before:]]
        return (_repeated(out, steps, axis), *states)

    return layer


def _repeated(out: Tensor, steps: int, axis: int) -> Tensor:
    """The first step for all of them, in memory as the layer would leave it: step by step."""
    first = out.transpose(0, axis)[:1]
    return first.expand(steps, -1, -1).clone(memory_format=torch.contiguous_format).transpose(0, axis)
