"""Where features are taken, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prune_cli.distillation.features import Taps, pairs, stage_ends
from prune_cli.errors import ConfigError
from prune_cli.models.lenet import lenet5, lenet_300_100
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.torchvision import torchvision
from prune_cli.models.vgg import vgg

COLOUR = {"num_classes": 10, "in_shape": (3, 32, 32)}


class Wrapped(nn.Module):
    """A network behind a normalisation, as users build it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm2d(3), net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.norm(images))


class Odd(nn.Module):
    """Modules that cannot be tapped: one that is not called, one that gives a pair, one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2)
        self.lstm, self.fc = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.pool(self.conv(images)))
        return self.fc(self.lstm(maps.flatten(2).transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (resnet_cifar(depth=20, **COLOUR), ["layer1", "layer2", "layer3"]),
        (Wrapped(resnet_cifar(depth=8, shortcut="B", **COLOUR)), ["net.layer1", "net.layer2", "net.layer3"]),
        (vgg(depth=11, **COLOUR), [f"features.{n}" for n in (2, 6, 13, 20, 27)]),
        (lenet5(num_classes=10, in_shape=(1, 8, 8)), ["conv1", "conv2"]),
        (lenet_300_100(num_classes=10, in_shape=(1, 8, 8)), []),
        (Odd(), ["conv"]),
    ],
    ids=["resnet20", "wrapped", "vgg11", "lenet5", "lenet_300_100", "odd"],
)
def test_auto_takes_the_ends_of_the_stages(model, ends):
    shape = (1, 8, 8) if hasattr(model, "fc2") else (3, 32, 32)
    assert stage_ends(model.train(), torch.zeros(2, *shape)) == ends
    assert all(not module._forward_hooks and module.training for module in model.modules())


def test_auto_on_networks_whose_blocks_change_the_size_inside():
    images, shape = torch.zeros(2, 3, 64, 64), {"num_classes": 10, "in_shape": (3, 64, 64)}
    assert stage_ends(torchvision(name="resnet50", **shape), images) == ["relu", "layer1", "layer2", "layer3", "layer4"]
    found = stage_ends(torchvision(name="mobilenet_v2", **shape), images)
    assert found == [*(f"features.{number}" for number in (1, 3, 6, 13)), "features"]


def test_taps_give_the_last_call_of_modules_and_only_inside_a_call():
    model, images = Odd(), torch.randn(2, 3, 32, 32)
    with Taps(model, ["conv", "pool", "other"]) as taps:
        logits, taken = taps(model, images)
        assert torch.equal(logits, model(images))
        assert not taps.taken, "a call that is not to the taps, as in evaluation, leaves nothing"
    assert taken.keys() == {"conv", "pool"}
    torch.testing.assert_close(taken["pool"], model.pool(model.pool(model.conv(images))))
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError), Taps(model, ["conv"]):
        raise ZeroDivisionError
    assert not model.conv._forward_hooks, "also after an error"


def test_names_and_pairs():
    student, teacher = resnet_cifar(depth=8, **COLOUR), Wrapped(resnet_cifar(depth=20, **COLOUR))
    images = torch.zeros(2, 3, 32, 32)

    def found(features):
        return pairs(features, student, teacher, images, "distillation")

    assert found("auto") == {f"layer{n}": f"net.layer{n}" for n in (1, 2, 3)}
    assert found({"layer3": "net.layer3", "linear": "net.linear"}) == {"layer3": "net.layer3", "linear": "net.linear"}
    assert list(pairs(("layer2", "layer1"), student, student, images, "distillation")) == ["layer2", "layer1"]
    with pytest.raises(ConfigError, match=r"features: the student has no module 'layre3'; did you mean .*'layer3'"):
        found({"layre3": "net.layer3"})
    with pytest.raises(ConfigError, match=r"features: the teacher has no module 'layer3'"):
        found(("layer3",))
    with pytest.raises(ConfigError, match=r"finds layer1, layer2, layer3 in the student and conv in the teacher"):
        pairs("auto", student, Odd(), images, "distillation")
    with pytest.raises(ConfigError, match=r"finds none in the student .*distillation\.terms\.a\.features=\[NAME"):
        pairs("auto", nn.Flatten(), nn.Flatten(), images, "distillation.terms.a")


def test_modules_without_a_tensor_are_refused():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"the student never calls its module 'other'"):
        pairs(("other",), Odd(), Odd(), images, "distillation")
    with pytest.raises(ConfigError, match=r"the student's 'lstm' gives a tuple, not a tensor"):
        pairs(("lstm",), Odd(), Odd(), images, "distillation")
