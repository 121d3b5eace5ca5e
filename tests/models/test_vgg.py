from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.errors import ConfigError
from prune_cli.measure.cost import cost
from prune_cli.models.vgg import cfg_of, dense_cfg, vgg


def test_sizes_are_those_of_the_papers() -> None:
    published = {11: 9_231_114, 13: 9_416_010, 16: 14_728_266, 19: 20_040_522}
    for depth, params in published.items():
        with torch.device("meta"):
            model = vgg(num_classes=10, in_shape=(3, 32, 32), depth=depth)
        assert sum(p.numel() for p in model.parameters()) == params
    with torch.device("meta"):
        dense = cost(vgg(num_classes=10, in_shape=(3, 32, 32)), (3, 32, 32))
    assert round(dense.macs / 1e6, 1) == 313.2


def test_names_are_the_usual_ones() -> None:
    with torch.device("meta"):
        model = vgg(num_classes=10, in_shape=(3, 32, 32))
    convs = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert convs[:4] == ["features.0", "features.3", "features.7", "features.10"]
    assert model.state_dict()["classifier.weight"].shape == (10, 512)
    assert "features.0.bias" in model.state_dict()
    with torch.device("meta"):
        model = vgg(num_classes=10, in_shape=(3, 32, 32), bias=False)
    assert "features.0.bias" not in model.state_dict()


@pytest.mark.parametrize("in_shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (2, 1, 1), (3, 9, 5)])
def test_takes_any_input_size(in_shape: tuple[int, int, int]) -> None:
    model = vgg(num_classes=7, in_shape=in_shape, depth=None, cfg=[4, "M", 5, "M", 6, "M", 6, "M", 6, "M"])
    assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 7)


def test_poolings_of_even_maps_are_the_usual_ones() -> None:
    model = vgg(num_classes=2, in_shape=(1, 8, 8), depth=None, cfg=[3, "M"])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.features[3](x), torch.nn.functional.max_pool2d(x, 2))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.just("M")), max_size=8), st.integers(1, 9))
def test_cfg_round_trip(rest: list[int | str], first: int) -> None:
    cfg = [first, *rest]
    model = vgg(num_classes=3, in_shape=(2, 4, 4), depth=None, cfg=cfg)
    assert cfg_of(model) == cfg
    assert model.eval()(torch.zeros(1, 2, 4, 4)).shape == (1, 3)


def test_pruned_cfg_of_a_depth() -> None:
    # network slimming with ratios by sensitivity, VGG-16 on CIFAR-10
    cfg = [20, 61, "M", 109, 128, "M", 231, 192, 116, "M", 77, 26, 26, "M", 26, 26, 26, "M"]
    model = vgg(num_classes=10, in_shape=(3, 32, 32), depth=16, cfg=cfg)
    assert cfg_of(model) == cfg
    assert model.classifier.in_features == 26


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 12}, "depth is 12; there is 11, 13, 16, 19"),
        ({"depth": None}, "give depth"),
        ({"cfg": [64, 64, "M"]}, "3 entries and does not follow VGG-16"),
        ({"cfg": dense_cfg(16)[:-1]}, "no 'M' at the end"),
        ({"depth": None, "cfg": []}, "no convolution"),
        ({"depth": None, "cfg": ["M"]}, "no convolution"),
        ({"depth": None, "cfg": [64, 0]}, r"cfg\[1\] is 0"),
        ({"depth": None, "cfg": [64, True]}, r"cfg\[1\] is True"),
        ({"depth": None, "cfg": [64, "m"]}, r"cfg\[1\] is 'm'"),
        ({"depth": None, "cfg": [64, 1.5]}, r"cfg\[1\] is 1.5"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_shape": (3, 32)}, "in_shape is"),
        ({"in_shape": (3, 32, 0)}, "in_shape is"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        vgg(**{"num_classes": 10, "in_shape": (3, 32, 32), **arguments})
    assert "\n" not in str(caught.value)


def test_cfg_of_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a VGG"):
        cfg_of(torch.nn.Linear(2, 2))
