"""Cuts: going on from one gives the very bits of the whole execution, and there is none where that could not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.structure.cuts import entered, executed, holds, watched


class Skip(nn.Module):
    """The output of the first layer is read again by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        first = self.first(x)
        return self.head(self.last(F.relu(self.middle(first)) + first).mean((2, 3)))


class Shared(nn.Module):
    """One layer and one norm at two places, another weight that is used past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.twice, self.end = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(self.twice(self.begin(x)))
        x = F.conv2d(self.drop(x), self.end.weight.flip(2), padding=1)
        return self.head(self.end(self.norm(self.twice(x))).mean((2, 3)))


class Sized(nn.Module):
    """The number of rows is that of the images, kept from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(192, 4)

    def forward(self, x):
        rows = x.shape[0]
        return self.head(self.act(self.body(x)).reshape(rows, -1))


class InPlace(nn.Module):
    """What comes to the block is changed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1))
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.block(self.body(x)).mean((2, 3)))


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 3), nn.Linear(3, 4)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return self.head(x if x.sum() > 0 else -x)


class Draws(Looks):
    def forward(self, x):
        return self.head(F.dropout(self.body(x).mean((2, 3)), 0.5, training=True))


class Counts(Looks):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x).mean((2, 3)) * self.calls)


class Leaves(Looks):
    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return self.head(x * float(len(x.tolist())))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), Turned(), layer, Mean(), nn.Linear(8, 4))


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


NETWORKS = {
    "chain": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4)
    ),
    "residual": lambda: resnet_cifar(num_classes=4, in_shape=(3, 8, 8), depth=8, widths=[4, 8, 8]),
    "skip": Skip, "shared": Shared, "sized": Sized, "in place": InPlace, "attention": attention,
}  # fmt: skip
OPAQUE = {"looks": Looks, "draws": Draws, "counts": Counts, "leaves": Leaves}


def made(name: str, networks=NETWORKS) -> nn.Module:
    torch.manual_seed(0)
    model = networks[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def standing(model: nn.Module) -> dict[str, object]:
    images = torch.randn(3, 3, 8, 8)
    return {cut.module: cut for cut in executed(model, images[:1]).cuts if holds(model, cut, images)}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_what_lies_behind_a_cut_gives_the_bits_of_the_whole(name):
    model, images = made(name), torch.randn(7, 3, 8, 8)
    found = standing(model)
    assert found
    for cut in found.values():
        came = {cut.module: []}
        with watched(model, [cut], came):
            wanted = model(images)
        with entered(model, cut) as entry:
            entry.given = came[cut.module][0]
            assert torch.equal(model(images[:1]), wanted), cut.module
        assert torch.equal(model(images), wanted)  # nothing is left behind


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_change_behind_a_cut_needs_nothing_in_front_of_it(name):
    """Each parameter is changed alone: the cuts in front of its first use still give what the whole gives."""
    model, images = made(name), torch.randn(5, 3, 8, 8)
    run, found = executed(model, images[:1]), standing(model)
    for parameter, value in model.named_parameters():
        cuts = [cut for cut in found.values() if cut.at < run.place([parameter])]
        came = {cut.module: [] for cut in cuts}
        with watched(model, cuts, came):
            model(images)
        before = value.clone()
        value.mul_(1.5).add_(0.1)
        wanted = model(images)
        for cut in cuts:
            with entered(model, cut) as entry:
                entry.given = came[cut.module][0]
                assert torch.equal(model(images[:1]), wanted), (parameter, cut.module)
        value.copy_(before)


def test_there_is_no_cut_that_something_reaches_across():
    assert set(standing(made("skip"))) == {"first", "last", "head"}
    assert set(standing(made("shared"))) == {"begin", "end", "head"}
    assert {"layer1.0", "layer2.0", "layer3.0"} <= set(standing(made("residual")))
    followed = {cut.module for cut in executed(made("residual"), torch.randn(1, 3, 8, 8)).cuts}
    assert not any(".conv" in name or ".bn" in name for name in followed)  # the shortcut goes past them


def test_there_is_no_cut_that_code_does_not_agree_with():
    assert set(standing(made("sized"))) == {"head"}
    assert set(standing(made("in place"))) == {"body", "block.1", "head"}


def test_a_weight_that_is_used_past_its_module_counts_where_it_is_used():
    run = executed(made("shared"), torch.randn(1, 3, 8, 8))
    end = next(cut for cut in run.cuts if cut.module == "end")
    assert run.place(["end.weight"]) < end.at < run.place(["end.bias"])
    assert run.place(["norm.weight", "end.bias"]) < end.at
    assert run.place(["no.such.parameter"]) == -1 < 0 < run.place([])


@pytest.mark.parametrize("name", OPAQUE)
def test_a_network_that_cannot_be_followed_has_no_cuts(name):
    assert not executed(made(name, OPAQUE), torch.randn(1, 3, 8, 8)).cuts


def test_following_leaves_no_trace():
    model = made("residual").train()
    modes = [module.training for module in model.modules()]
    executed(model, torch.randn(1, 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
