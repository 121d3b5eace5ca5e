"""Penalties by hand and by autograd, and which norms and units they touch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.models.resnet import resnet
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.vgg import vgg
from prune_cli.regularisers.groups import CHOSEN, Slices, group_lasso, growing, magnitudes, shrinkage
from prune_cli.regularisers.norm_scales import inner_scales, norm_scales, scales
from prune_cli.structure.follow import analyse

IMAGE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """A stem, one residual block and a linear layer: an inner family of 5 units and a coupled one of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner, self.norm1 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.outer, self.norm2 = nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4, 10)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.outer(torch.relu(self.norm1(self.inner(x))))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@given(st.floats(1e-5, 0.01), st.floats(0.01, 1.0))
@settings(max_examples=20, deadline=None)
def test_one_step_with_only_the_penalty_moves_each_scale_towards_zero(strength, lr):
    model = Block().double()
    with torch.no_grad():
        model.norm1.weight[0] = 0
    penalty = norm_scales(model, IMAGE.double(), strength=strength, norms="all")
    before = {name: scale.detach().clone() for name, scale in scales(model).items()}
    zero_gradients(model)
    penalty.add(0, {})
    torch.optim.SGD(model.parameters(), lr=lr).step()
    for name, scale in scales(model).items():
        torch.testing.assert_close(before[name] - scale, lr * strength * before[name].sign(), rtol=1e-6, atol=1e-12)
    assert model.norm1.weight[0] == 0
    assert all(not grad.any() for name, grad in gradients(model).items() if name not in before)


@pytest.mark.parametrize(
    ("depth", "every", "inner"),
    # Inner: conv1 of 8 basic blocks; conv1 and conv2 of 16 bottlenecks, and the stem, whose only reader projects.
    [(18, 20, 8), (34, 36, 16), (50, 53, 33)],
)
def test_inner_and_all_norms_of_residual_networks(depth, every, inner):
    model = resnet(num_classes=10, in_shape=(3, 32, 32), depth=depth)
    image = torch.zeros(1, 3, 32, 32)
    chosen = inner_scales(model, image)
    assert (len(scales(model)), len(chosen)) == (every, inner)
    assert all(".bn1." in name or ".bn2." in name or name == "bn1.weight" for name in chosen)
    zero_gradients(model)
    norm_scales(model, image, strength=1.0, norms="inner").add(0, {})
    assert {name for name, grad in gradients(model).items() if grad.any()} == set(chosen)


def test_the_mode_is_recorded_only_where_the_network_has_both_kinds_of_norms():
    residual = resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=8, widths=(4, 4, 8))
    plain = vgg(num_classes=10, in_shape=(3, 32, 32), depth=11)
    image = torch.zeros(1, 3, 32, 32)
    assert [norm_scales(residual, image, strength=1, norms=mode).norms for mode in ("all", "inner")] == ["all", "inner"]
    assert [norm_scales(plain, image, strength=1, norms=mode).norms for mode in ("all", "inner")] == [None, None]
    assert len(inner_scales(plain, image)) == len(scales(plain)) == 8


def written_group_lasso(model: Block, alpha: float) -> Tensor:
    """The penalty as in the paper, unit by unit from the layers' own attributes."""
    columns = model.head.weight.view(10, 4, 4)  # each channel is four positions of the flattened map
    inner = [
        [model.inner.weight[k], model.inner.bias[k], model.norm1.weight[k], model.norm1.bias[k],
         model.outer.weight[:, k]] for k in range(5)
    ]  # fmt: skip
    coupled = [
        [model.stem.weight[k], model.stem.bias[k], model.norm.weight[k], model.norm.bias[k],
         model.outer.weight[k], model.norm2.weight[k], model.norm2.bias[k], model.inner.weight[:, k],
         columns[:, k]] for k in range(4)
    ]  # fmt: skip
    total = torch.zeros(())
    for family in (inner, coupled):
        energies = [sum((part.square().sum() for part in unit), torch.zeros(())) for unit in family]
        low, high = min(energies).item(), max(energies).item()
        for energy in energies:
            total = total + 2 ** (alpha * (high - energy.item()) / (high - low)) * energy
    return total


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_group_lasso_is_the_gradient_of_the_written_penalty(alpha):
    model = Block()
    model.zero_grad()
    (0.3 * written_group_lasso(model, alpha)).backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    zero_gradients(model)
    group_lasso(model, IMAGE, strength=0.3, alpha=alpha).add(0, {})
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected.get(name, torch.zeros_like(grad)), rtol=1e-4, atol=1e-5)
    assert "head.bias" not in expected  # the classes are no units


def test_shrinkage_by_hand():
    gamma = shrinkage(torch.tensor([9.0, 1.0, 3.0, 2.0, 5.0, 5.0]), [torch.tensor([1, 2, 3]), torch.tensor([4, 5])], 4)
    assert gamma.tolist() == [0, 16, 1, 4, 1, 1]


def test_energies_count_every_slice():
    model = Block()
    plan = analyse(model, IMAGE)
    energies = Slices(model, plan).energies()
    (inner,) = (family for family in plan.families if family.name == "inner")
    first = [model.inner.weight[0], model.inner.bias[0], model.norm1.weight[0], model.norm1.bias[0]]
    expected = sum(part.square().sum() for part in (*first, model.outer.weight[:, 0]))
    torch.testing.assert_close(energies[inner.units[0]], expected)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.0), (4, 0.0), (5, 0.1), (9, 0.1), (10, 0.2), (14, 0.2), (15, 0.25), (1000, 0.25)]
)
def test_growing_factor_by_hand_on_the_units_of_least_magnitude(step, factor):
    model = Block()
    penalty = growing(model, IMAGE, ratio=0.5, delta=0.1, every=5, ceiling=0.25)
    memory: dict[str, Tensor] = {}
    penalty.add(0, memory)  # chooses
    weak = model.inner.weight.detach().abs().flatten(1).sum(1).argsort()[:2].tolist()
    zero_gradients(model)
    with torch.no_grad():
        model.inner.weight.neg_()  # the choice stays, also when the weights change
        model.inner.weight[weak] *= 100
    penalty.add(step, memory)
    mine = torch.zeros(5)
    mine[weak] = factor
    torch.testing.assert_close(model.norm1.weight.grad, mine * model.norm1.weight)
    torch.testing.assert_close(model.inner.bias.grad, mine * model.inner.bias)


def test_growing_on_all_units_chooses_when_the_factor_is_reached():
    model = Block()
    plan = analyse(model, IMAGE)
    penalty = growing(model, IMAGE, ratio=0.5, delta=0.1, every=2, ceiling=1.0, choose_at=0.2)
    memory: dict[str, Tensor] = {}
    zero_gradients(model)
    penalty.add(3, memory)
    assert not memory
    torch.testing.assert_close(model.norm1.weight.grad, 0.1 * model.norm1.weight)
    with torch.no_grad():
        model.inner.weight[3:] *= 1e-3  # what counts are the weights at the time of the choice
        model.stem.weight[1:3] *= 1e-3
        model.outer.weight[1:3] *= 1e-3
    zero_gradients(model)
    penalty.add(4, memory)
    families = {family.name: family.units for family in plan.families}
    chosen = np.flatnonzero(memory[CHOSEN].numpy()).tolist()
    assert sorted(chosen) == sorted([*families["inner"][[3, 4]], *families["stem"][[1, 2]]])
    torch.testing.assert_close(model.norm1.weight.grad, torch.tensor([0, 0, 0, 0.2, 0.2]) * model.norm1.weight)
    assert magnitudes(model, plan)[families["inner"][0]] == pytest.approx(model.inner.weight[0].abs().sum().item())


@pytest.mark.parametrize(
    "regulariser",
    [
        functools.partial(group_lasso, strength=1.0),
        functools.partial(growing, ratio=0.5, delta=0.1, every=1, ceiling=1),
        functools.partial(norm_scales, strength=1.0),
    ],
)
def test_networks_without_what_is_penalised_are_refused(regulariser):
    with pytest.raises(ConfigError, match="choose another"):
        regulariser(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10)), IMAGE)


def test_a_choice_that_never_comes_is_refused():
    with pytest.raises(ConfigError, match="never reached"):
        growing(Block(), IMAGE, ratio=0.5, delta=0.1, every=1, ceiling=0.1, choose_at=0.5)
