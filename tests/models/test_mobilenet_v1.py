from __future__ import annotations

import pytest
import torch

from prune_cli.errors import ConfigError
from prune_cli.measure.cost import cost
from prune_cli.models.mobilenet_v1 import mobilenet_v1


@pytest.mark.parametrize(
    ("width", "params", "macs"), [(1.0, 4.2, 569), (0.75, 2.6, 325), (0.5, 1.3, 149), (0.25, 0.5, 41)]
)
def test_sizes_are_those_of_the_paper(width: float, params: float, macs: float) -> None:
    with torch.device("meta"):
        model = mobilenet_v1(num_classes=1000, in_shape=(3, 224, 224), width=width, stem="imagenet")
        dense = cost(model, (3, 224, 224))
    assert (round(dense.params / 1e6, 1), round(dense.macs / 1e6)) == (params, macs)


@pytest.mark.parametrize("in_shape", [(3, 32, 32), (1, 8, 8), (1, 1, 1)])
def test_runs_on_any_size(in_shape: tuple[int, int, int]) -> None:
    model = mobilenet_v1(num_classes=4, in_shape=in_shape, width=0.01)
    assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 4)


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf"), True])
def test_refuses_widths(width: float) -> None:
    with pytest.raises(ConfigError, match="factor above 0"):
        mobilenet_v1(num_classes=10, in_shape=(3, 32, 32), width=width)
