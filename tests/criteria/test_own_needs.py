"""A statistic of one's own, from its function to the pruned network, without touching the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli import shrink
from prune_cli.config.nodes import resolve
from prune_cli.criteria.criterion import Criterion, LayerView
from prune_cli.criteria.needs import GradientSample, Need, OutputSample, channel_mean, plain_sum
from prune_cli.criteria.statistics import collect
from prune_cli.errors import ConfigError
from prune_cli.selection import requirements

IMAGE = torch.zeros(1, 3, 8, 8)


def _squares(outputs: OutputSample) -> tuple[Tensor, int]:
    others = [axis for axis in range(outputs.values.dim()) if axis != outputs.axis]
    return outputs.values.square().sum(others), outputs.values.numel() // outputs.values.shape[outputs.axis]


def energy() -> Need:
    """Mean square of a channel's outputs: (channels,)."""
    return Need("energy", "outputs", "channel", _squares, channel_mean)


def energetic(view: LayerView) -> Tensor:
    return view.statistics["energy"]


def _absolute(sample: GradientSample) -> tuple[Tensor, int]:
    return (sample.gradient * sample.weight).abs(), 1


SENSITIVE = Need("sensitive", "gradient", "weight", _absolute, plain_sum, any_inputs=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8), torch.arange(6) % 4) for _ in range(3)]


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def test_it_is_measured_and_decides_which_channels_go():
    model, images = network(), torch.cat([images for images, _ in batches()])
    by_hand = model[0](images).relu().square().mean((0, 2, 3))
    criterion = Criterion(energetic, "channel", needs=(energy(),))
    assert requirements.needs_images(criterion)
    found = collect(model, batches(), criterion.needs, loss, IMAGE)
    torch.testing.assert_close(found["0.weight"]["energy"], by_hand)
    small = shrink(model, IMAGE, 0.5, criterion=criterion, batches=batches())
    kept = torch.sort(by_hand.topk(4).indices).values
    assert torch.equal(small[0].weight, model[0].weight[kept])


def test_an_option_file_names_it_by_a_target():
    node = {
        "score": {"_target_": f"{__name__}.energetic", "_partial_": True},
        "level": "channel",
        "needs": [{"_target_": f"{__name__}.energy"}, "n_keep"],
    }
    criterion = resolve(node, "criterion", Criterion)
    assert [need.name for need in criterion.entries] == ["energy", "n_keep"]


def test_needs_of_the_loss_alone_go_with_any_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.two(self.one(first + second).relu())

    torch.manual_seed(0)
    pair, target = (torch.randn(4, 5), torch.randn(4, 5)), torch.tensor([0, 1, 2, 0])
    model = Two()
    by_hand = torch.autograd.grad(F.cross_entropy(model(*pair), target), model.one.weight)[0] * model.one.weight
    criterion = Criterion(lambda view: view.statistics["sensitive"], needs=(SENSITIVE,))
    small = shrink(
        model,
        pair,
        0.5,
        criterion=criterion,
        batches=[(pair, target)],
        loss=lambda model, inputs, target: F.cross_entropy(model(*inputs), target),
    )
    kept = torch.sort(by_hand.abs().sum(1).topk(3).indices).values
    assert torch.equal(small.one.weight, model.one.weight[kept])


def test_a_name_that_is_not_in_the_table_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no 'taylor_filtre'; did you mean 'taylor_filter'"):
        Criterion(energetic, "channel", needs=("taylor_filtre",))


def test_a_statistic_of_another_shape_than_it_says_is_refused():
    wrong = Need("energy", "outputs", "channel", lambda outputs: (outputs.values.sum(), 1))
    with pytest.raises(ConfigError, match=r"'energy' of 0.weight has shape \(\).*channel"):
        collect(network(), batches(), (wrong,), loss, IMAGE)
