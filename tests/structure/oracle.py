"""A judge of small networks that shares no code with the engine's own check.

It sets to zero, in a copy of the dense network, whatever `Lineage.kept` leaves out, and executes both plainly: on the
example, on other values, scaled and turned around, and on another batch size. It cannot judge norms over channels, which see
those zeros.
"""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_cli.structure import reference, surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from prune_cli.structure.lineage import Shrunk


def masked(model: nn.Module, shrunk: Shrunk) -> nn.Module:
    """The dense network without what is gone; of a direction and a magnitude the magnitude alone."""
    dense = copy.deepcopy(model)
    named = dict(dense.named_parameters(remove_duplicate=False))
    for name, axes in shrunk.lineage.kept.items():
        length = re.sub(r"(parametrizations\.weight\.original)1$", r"\g<1>0", re.sub(r"weight_v$", "weight_g", name))
        for axis, kept in axes.items() if name in named else ():
            if length != name and length in named and axis == 0:
                continue
            gone = sorted(set(range(named[name].shape[axis])) - set(kept))
            with torch.no_grad():
                named[name].index_fill_(axis, torch.tensor(gone), 0.0)
    return dense


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    args = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    with torch.no_grad():
        out = model(**args) if isinstance(args, dict) else model(*args) if isinstance(args, tuple) else model(args)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def inputs_like(example: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    yield example
    for batch in (len(example), 3):
        for scale in (1.0, 4.0, -0.2):
            yield scale * torch.randn((batch, *example.shape[1:]), generator=generator, dtype=example.dtype)
    yield -example


def judged(model: nn.Module, shrunk: Shrunk, many: Sequence[Any]) -> None:
    """Asserts that small and masked network agree on all the inputs."""
    dense, small = masked(model, shrunk), copy.deepcopy(shrunk.model)
    for number, inputs in enumerate(many):
        for a, b in zip(call(dense, inputs), call(small, inputs), strict=True):
            assert a.shape == b.shape, number
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda text, n=number: f"input {n}: {text}")


def shrunk_and_judged(model: nn.Module, example: Any, many: Sequence[Any] | None = None, ratio: float = 0.5) -> Shrunk:
    """Prunes, and asks the engine's own check as well as this one; the dense network stays bit for bit."""
    before = copy.deepcopy(model.state_dict())
    with limited(60):
        plan = analyse(model, example)
        keep = lowest_units(plan, np.random.default_rng(3).random(plan.size), ratio)
        shrunk = surgery.remove_units(model, plan, keep)
    assert reference.difference(model, shrunk, example) < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    judged(model, shrunk, list(inputs_like(example)) if many is None else many)
    return shrunk


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """An error after so many seconds of CPU time, where something would go on for ever."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"still running after {seconds} CPU seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Body(nn.Module):
    """Layers and integers by name, and a function that uses them."""

    def __init__(self, function: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)
