from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import models as zoo

from prune_cli.errors import ConfigError
from prune_cli.measure.cost import cost
from prune_cli.models.resnet import cfg_of, dense_cfg, dense_projection, projection_of, resnet

RESNET18 = [[64], [64, 64], [64, 64], [128, 128], [128, 128], [256, 256], [256, 256], [512, 512], [512, 512]]


def test_dense_cfg() -> None:
    assert dense_cfg(18) == RESNET18
    assert dense_cfg(50)[:5] == [[64], [64, 64, 256], [64, 64, 256], [64, 64, 256], [128, 128, 512]]
    assert [len(dense_cfg(depth)) for depth in (18, 34, 50, 101, 152)] == [9, 17, 17, 34, 51]
    assert dense_projection(18) == [False, False, True, False, True, False, True, False]
    assert dense_projection(50)[0] is True


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.17), (34, 21.28), (50, 23.52), (101, 42.51), (152, 58.16)])
def test_cifar_sizes(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = resnet(num_classes=10, in_shape=(3, 32, 32), depth=depth)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_imagenet_stem_has_torchvisions_names_and_cfg(depth: int) -> None:
    with torch.device("meta"):
        model = resnet(num_classes=1000, in_shape=(3, 224, 224), depth=depth, stem="imagenet")
        theirs = zoo.get_model(f"resnet{depth}", weights=None)
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert cfg_of(theirs) == cfg_of(model) == dense_cfg(depth)
    assert projection_of(theirs) == projection_of(model) == dense_projection(depth)


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_stem_computes_what_torchvision_computes(depth: int) -> None:
    torch.manual_seed(0)
    theirs = zoo.get_model(f"resnet{depth}", weights=None, num_classes=6).eval()
    model = resnet(num_classes=6, in_shape=(3, 48, 48), depth=depth, stem="imagenet").eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(x), theirs(x))


def test_macs() -> None:
    with torch.device("meta"):
        small = cost(resnet(num_classes=10, in_shape=(3, 32, 32)), (3, 32, 32))
        large = cost(resnet(num_classes=1000, in_shape=(3, 224, 224), depth=50, stem="imagenet"), (3, 224, 224))
    assert (round(small.macs / 1e6, 1), round(large.macs / 1e9, 2)) == (555.4, 4.09)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_cfg_round_trip(data: st.DataObject) -> None:
    depth = data.draw(st.sampled_from([18, 50]))
    width = st.integers(1, 6)
    projection = dense_projection(depth)
    cfg = [[data.draw(width)]]
    for row, dense in enumerate(dense_cfg(depth)[1:]):
        inner = [data.draw(width) for _ in dense[:-1]]
        cfg.append([*inner, data.draw(width) if projection[row] else cfg[-1][-1]])
    model = resnet(num_classes=3, in_shape=(1, 8, 8), depth=depth, cfg=cfg)
    assert cfg_of(model) == cfg
    assert projection_of(model) == projection
    assert model.eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_projection_is_kept_where_widths_happen_to_match() -> None:
    cfg = [[256], *dense_cfg(50)[1:]]
    with torch.device("meta"):
        model = resnet(num_classes=10, in_shape=(3, 32, 32), depth=50, cfg=cfg)
    assert projection_of(model)[0] is True
    with torch.device("meta"):
        model = resnet(
            num_classes=10,
            in_shape=(3, 32, 32),
            depth=50,
            cfg=cfg,
            projection=[False, *dense_projection(50)[1:]],
        )
    assert projection_of(model)[0] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth is 20; there is 18, 34, 50, 101, 152"),
        ({"stem": "imagnet"}, "did you mean 'imagenet'"),
        ({"cfg": RESNET18[:-1]}, "8 rows, ResNet-18 has 9"),
        ({"cfg": [64, *RESNET18[1:]]}, r"cfg\[0\] is 64"),
        ({"cfg": [[64], [64, 64, 64], *RESNET18[2:]]}, r"cfg\[1\] is .* not 2 positive"),
        ({"cfg": [[64], [64, 0], *RESNET18[2:]]}, r"cfg\[1\]"),
        ({"cfg": [[32], *RESNET18[1:]]}, "layer1.0.*64 channels to 32"),
        ({"cfg": [*RESNET18[:-1], [512, 500]]}, "layer4.1.*500 channels to 512"),
        ({"projection": [True]}, "needs 8 true or false"),
        ({"projection": [0] * 8}, "needs 8 true or false"),
        ({"projection": [False] * 8}, "stride 2 and needs projection"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resnet(**{"num_classes": 10, "in_shape": (3, 32, 32), **arguments})


def test_cfg_of_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a ResNet"):
        projection_of(torch.nn.Linear(2, 2))
