from __future__ import annotations

import pytest
import torch

from prune_cli.errors import ConfigError
from prune_cli.models.wide_resnet import wide_resnet


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [
        (16, 1, 0.18),
        (16, 2, 0.69),
        (16, 4, 2.75),
        (28, 10, 36.48),
        (40, 1, 0.56),
        (40, 2, 2.24),
        (40, 4, 8.95),
    ],
)
def test_sizes_are_those_of_the_paper(depth: int, width: int, millions: float) -> None:
    with torch.device("meta"):
        model = wide_resnet(num_classes=10, in_shape=(3, 32, 32), depth=depth, width=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("in_shape", [(3, 32, 32), (1, 8, 8), (1, 1, 1)])
def test_runs_on_any_size(in_shape: tuple[int, int, int]) -> None:
    model = wide_resnet(num_classes=4, in_shape=in_shape, depth=10, width=1)
    assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 4)


def test_names_and_dropout() -> None:
    model = wide_resnet(num_classes=4, in_shape=(3, 8, 8), depth=10, width=2, dropout=0.5)
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.0.bn2.weight", "fc.bias"} <= set(model.state_dict())
    x = torch.randn(8, 3, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"depth": 20}, "6 n \\+ 4"), ({"width": 0}, "width is 0"), ({"dropout": 1.0}, "not in \\[0, 1\\)")],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wide_resnet(**{"num_classes": 10, "in_shape": (3, 32, 32), **arguments})
