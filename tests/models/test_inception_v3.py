from __future__ import annotations

import pytest
import torch

from prune_cli.errors import ConfigError
from prune_cli.measure.cost import cost
from prune_cli.models.inception_v3 import inception_v3


def test_size_is_that_of_torchvision_without_the_auxiliary_classifier() -> None:
    with torch.device("meta"):
        dense = cost(inception_v3(num_classes=1000, in_shape=(3, 299, 299), draw_weights=False), (3, 299, 299))
    assert dense.params == 23_834_568
    assert round(dense.macs / 1e9, 2) == 5.71


def test_smallest_input_and_one_channel() -> None:
    model = inception_v3(num_classes=4, in_shape=(1, 75, 75), draw_weights=False)
    with torch.no_grad():
        assert model(torch.randn(2, 1, 75, 75)).shape == (2, 4)
    with pytest.raises(ConfigError, match="75x75 or more"):
        inception_v3(num_classes=4, in_shape=(3, 74, 99))
    with pytest.raises(ConfigError, match="dropout"):
        inception_v3(num_classes=4, in_shape=(3, 75, 75), dropout=1.5)
