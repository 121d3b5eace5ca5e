from __future__ import annotations

import pytest
import torch

from prune_cli.errors import ConfigError
from prune_cli.models.lenet import lenet5, lenet_300_100


def test_sizes_are_those_of_the_papers() -> None:
    mlp = lenet_300_100(num_classes=10, in_shape=(1, 28, 28))
    cnn = lenet5(num_classes=10, in_shape=(1, 28, 28))
    assert sum(p.numel() for p in mlp.parameters()) == 266_610
    assert sum(p.numel() for p in cnn.parameters()) == 431_080


@pytest.mark.parametrize("in_shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 4, 4), (1, 16, 16), (1, 15, 20)])
def test_runs_on(in_shape: tuple[int, int, int]) -> None:
    for model in (
        lenet5(num_classes=4, in_shape=in_shape, widths=(3, 4, 5)),
        lenet_300_100(num_classes=4, in_shape=in_shape, widths=[6, 7]),
    ):
        assert model(torch.randn(2, *in_shape)).shape == (2, 4)


def test_refuses() -> None:
    with pytest.raises(ConfigError, match="4x4 or more"):
        lenet5(num_classes=10, in_shape=(1, 3, 8))
    with pytest.raises(ConfigError, match="3 positive integers"):
        lenet5(num_classes=10, in_shape=(1, 8, 8), widths=(20, 50))
    with pytest.raises(ConfigError, match="2 positive integers"):
        lenet_300_100(num_classes=10, in_shape=(1, 8, 8), widths=(20, 0))
