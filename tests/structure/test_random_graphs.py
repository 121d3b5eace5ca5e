"""Random networks, and a search for what no list of networks has: every choice shrinks them exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.structure.networks import conv, example, halve, randomise, shuffle


# ------------------------------------------------------------------------------------ random graphs
class Graph(nn.Module):
    """A random directed graph of image operators."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps, self.layers, widths = steps, nn.ModuleList(), [4]
        self.stem = conv(3, 4)
        for kind, first, second in steps:
            a, b = widths[first % len(widths)], widths[second % len(widths)]
            layer: nn.Module = nn.Identity()
            width = a
            if kind == "conv":
                width = 4 + 2 * (second % 4)
                layer = conv(a, width, 3)
            elif kind == "bn":
                layer = nn.BatchNorm2d(a)
            elif kind == "depthwise":
                layer = conv(a, a, 3, groups=a)
            elif kind == "grouped":
                layer = conv(a, a, 1, groups=2)
            elif kind == "cat":
                width = a + b
            elif kind == "split":
                width = a // 2 if a % 2 == 0 else a
            elif kind == "add":
                layer = conv(b, a, 1)
            self.layers.append(layer)
            widths.append(width if width % 2 == 0 else a)
            if width % 2:  # keep every width even, so that groups of two fit
                self.layers[-1] = conv(width, a, 1)
        self.head = conv(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for (kind, first, second), layer in zip(self.steps, self.layers, strict=True):
            a, b = values[first % len(values)], values[second % len(values)]
            if kind == "cat":
                a = torch.cat([a, b], 1)
            elif kind == "split" and a.shape[1] % 2 == 0:
                left, right = a.chunk(2, 1)
                a = left * right.sigmoid()
            elif kind == "shuffle":
                a = shuffle(a, 2)
            elif kind == "relu":
                a = F.relu(a)
            values.append(a + layer(b) if kind == "add" else layer(a))
        return self.head(values[-1])


KINDS = ["conv", "bn", "add", "cat", "split", "depthwise", "shuffle", "grouped", "relu"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
       st.sampled_from([0.25, 0.5, 0.8]))  # fmt: skip
def test_random_graphs_shrink_exactly(steps: list[tuple[str, int, int]], ratio: float) -> None:
    halve(randomise(Graph(steps)), example(1, 3, 4, 4), ratio)  # which asserts
