"""Criteria of gradients against autograd by explicit loops, and the conservation of synaptic flow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli.criteria import gradients
from prune_cli.criteria.criterion import LayerView
from prune_cli.criteria.flow import synaptic_flow
from prune_cli.criteria.statistics import collect
from prune_cli.errors import ConfigError
from tests.criteria.test_weights import Residual


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    ).double()
    model[1].running_mean.normal_()
    return model


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def data(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.double)
    return images, torch.randint(3, (count,), generator=generator)


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data()
    return list(zip(images.split(size), labels.split(size), strict=True))


def slopes(model: nn.Module, name: str, size: int) -> list[Tensor]:
    """Gradients of each batch's mean loss, by plain backward passes in eval mode."""
    model.eval()
    found = []
    for images, labels in batches(size):
        model.zero_grad()
        loss(model, images, labels).backward()
        found.append(model.get_parameter(name).grad.clone())
    model.zero_grad()
    return found


def score(model: nn.Module, name: str, criterion, need: str, size: int = 4) -> Tensor:
    found = collect(model, batches(size), (need,), loss, data()[0][:1])[name]
    return criterion(LayerView(name, model.get_parameter(name).detach(), None, torch.Generator(), found))


@pytest.mark.parametrize("name", ["0.weight", "3.weight", "6.weight"])
def test_taylor_sums_squares_over_batches(name):
    model = network()
    weight = model.get_parameter(name).detach()
    expected = sum((gradient * weight) ** 2 for gradient in slopes(model, name, 4))
    assert torch.allclose(score(model, name, gradients.taylor, "taylor"), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["0.weight", "3.weight", "6.weight"])
def test_taylor_group_squares_the_sum_over_a_filter(name):
    model = network()
    weight = model.get_parameter(name).detach()
    expected = [
        sum(float((gradient[f] * weight[f]).sum()) ** 2 for gradient in slopes(model, name, 4))
        for f in range(len(weight))
    ]
    got = score(model, name, gradients.taylor_group, "taylor_filter")
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert float(got.min()) > 1e-12  # not the 0 that a norm over the batch would make of it


def test_taylor_gate_is_the_slope_of_a_gate_behind_the_norm():
    model = network().eval()
    gate = torch.ones(1, 4, 1, 1, dtype=torch.double, requires_grad=True)
    expected = torch.zeros(4, dtype=torch.double)
    for images, labels in batches(4):
        value = F.cross_entropy(model[2:](model[:2](images) * gate), labels)
        expected += torch.autograd.grad(value, gate)[0].flatten() ** 2
    assert torch.allclose(score(model, "0.weight", gradients.taylor_gate, "taylor_gate"), expected, rtol=1e-9)
    assert score(model, "3.weight", gradients.taylor_gate, "taylor_gate").tolist() == [0] * 5


@pytest.mark.parametrize("size", [1, 3, 10])
def test_obd_has_the_same_per_image_gradients_whatever_the_batches(size):
    model = network()
    weight = model.get_parameter("3.weight").detach()
    fisher = sum(gradient**2 for gradient in slopes(model, "3.weight", 1)) / 10
    got = score(model, "3.weight", gradients.obd, "fisher", size)
    assert torch.allclose(got, weight**2 * fisher / 2, rtol=1e-9)


@pytest.mark.parametrize("size", [3, 10])
def test_snip_takes_the_gradient_over_all_images(size):
    model = network()
    (gradient,) = slopes(model, "3.weight", 10)
    expected = (gradient * model.get_parameter("3.weight").detach()).abs()
    assert torch.allclose(score(model, "3.weight", gradients.snip, "gradient", size), expected, rtol=1e-9)


def hessian_by_gradient(model: nn.Module, name: str, temperature: float) -> Tensor:
    """H g of the whole Hessian over one weight, in eval mode."""
    images, labels = data()
    model.eval()
    weight = model.get_parameter(name).detach()

    def value(candidate: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, {name: candidate}, images) / temperature, labels)

    gradient = torch.func.grad(value)(weight).flatten()
    hessian = torch.func.hessian(value)(weight).reshape(len(gradient), len(gradient))
    return (hessian @ gradient).view_as(weight)


@pytest.mark.parametrize("size", [3, 10])
def test_grasp_is_the_weight_times_hessian_times_gradient(size):
    """Of one weight alone, so that the Hessian is small; logits are divided by 200."""
    model = network()
    expected = model.get_parameter("3.weight").detach() * hessian_by_gradient(model, "3.weight", 200.0)
    found = collect(model, batches(size), ("hessian_gradient",), loss, data()[0][:1], names=["3.weight"])["3.weight"]
    view = LayerView("3.weight", model.get_parameter("3.weight").detach(), None, torch.Generator(), found)
    assert torch.allclose(gradients.grasp(view), expected, rtol=1e-7, atol=1e-14 * 1e-3)
    assert expected.abs().max() > 1e-12


def test_grasp_scores_are_half_of_what_the_squared_gradient_norm_loses_to_first_order():
    """Along each weight towards zero, the gradient norm of all weights; what is kept is what it would lose most with."""
    model, names = network(), ["0.weight", "3.weight", "6.weight"]
    found = collect(model, batches(10), ("hessian_gradient",), loss, data()[0][:1], names=names)
    images, labels = data()
    model.eval()

    def norm() -> Tensor:
        value = F.cross_entropy(model(images) / 200, labels)
        slopes = torch.autograd.grad(value, [model.get_parameter(name) for name in names], create_graph=True)
        return sum(slope.square().sum() for slope in slopes)

    turning = torch.autograd.grad(norm(), [model.get_parameter(name) for name in names])
    for name, slope in zip(names, turning, strict=True):
        weight = model.get_parameter(name).detach()
        view = LayerView(name, weight, None, torch.Generator(), found[name])
        assert torch.allclose(gradients.grasp(view), weight * slope / 2, rtol=1e-7, atol=1e-16)


def test_grasp_refuses_networks_that_return_something_else_than_logits():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return self.inner(images), None

    def first(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images)[0], labels)

    with pytest.raises(ConfigError, match="returns a tuple"):
        collect(Pair(), batches(4), ("hessian_gradient",), first, data()[0][:1], names=["inner.3.weight"])


def test_grasp_goes_through_fused_attention():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 4, 8, dropout=0.1, batch_first=True), nn.Flatten(),
                          nn.Linear(192, 3)).double()  # fmt: skip
    found = collect(model, batches(4), ("hessian_gradient",), loss, data()[0][:1], names=["1.linear1.weight"])
    assert found["1.linear1.weight"]["hessian_gradient"].any()


@pytest.mark.parametrize("need", ["gradient", "hessian_gradient"])
def test_norms_by_the_batch_are_those_of_training_and_leave_their_own_statistics(need):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    by_batch = collect(model, batches(10), (need,), loss, data()[0][:1], norms="batch", names=["0.weight"])
    running = collect(model, batches(10), (need,), loss, data()[0][:1], names=["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(by_batch["0.weight"][need], running["0.weight"][need], rtol=1e-3)
    if need == "gradient":
        model.train()
        loss(model, *data()).backward()
        assert torch.allclose(by_batch["0.weight"][need], model.get_parameter("0.weight").grad, rtol=1e-9)


def test_norms_by_the_batch_need_more_than_one_value_per_channel():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(ConfigError, match=r"more than 1 value.*calibration\.batch_size"):
        collect(model, batches(1), ("gradient",), loss, data()[0][:1], norms="batch")
    assert model[2].running_mean is not None


def test_weights_that_the_loss_does_not_depend_on_score_nothing():
    model = network()
    model.add_module("spare", nn.Linear(2, 2).double())
    forward = nn.Sequential(*[model[i] for i in range(7)])
    found = collect(model, batches(4), ("taylor", "fisher"), lambda _, x, y: loss(forward, x, y), data()[0][:1])
    assert not found["spare.weight"]["taylor"].any() and not found["spare.weight"]["fisher"].any()


# -------------------------------------------------------------------------------------------- synaptic flow


def flows(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return synaptic_flow(model, image, names)


def test_flow_is_conserved_from_layer_to_layer():
    model = network().float()
    image = data()[0][:1].float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = flows(model, image)
    assert [float(value.sum()) for value in found.values()] == pytest.approx([1.0] * 3, rel=1e-9)
    assert all(float(value.min()) >= 0 for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(flows(model, image * 5 - 2), found)  # data-free: only the shape counts
    assert not any(module._forward_hooks for module in model.modules())


def test_flow_by_the_formula_on_two_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first, second = model[0].weight.detach().abs().double(), model[2].weight.detach().abs().double()
    total = (second @ first).sum()
    found = flows(model, torch.zeros(1, 3))
    for i in range(4):
        for j in range(3):
            assert float(found["0.weight"][i, j]) == pytest.approx(float(second[:, i].sum() * first[i, j] / total))
    assert torch.allclose(found["2.weight"], second * first.sum(1) / total)


def test_a_shortcut_takes_its_part_of_the_flow():
    torch.manual_seed(0)
    found = {name: float(value.sum()) for name, value in flows(Residual(), torch.zeros(1, 3, 8, 8)).items()}
    assert found["stem.weight"] == pytest.approx(1) and found["head.weight"] == pytest.approx(1)
    assert found["inner.weight"] == pytest.approx(found["outer.weight"])
    assert 0 < found["inner.weight"] < 1


def test_masked_weights_carry_no_flow_and_a_cut_network_is_refused():
    model = network().float()
    with torch.no_grad():
        model[3].weight[2] = 0
    image = data()[0][:1].float()
    assert not flows(model, image)["3.weight"][2].any()
    with torch.no_grad():
        model[3].weight.zero_()
    with pytest.raises(ConfigError, match=r"flow through the network is 0\.0.*choose"):
        flows(model, image)


def test_operators_that_turn_flow_around_are_refused():
    class Falling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).neg().exp())

    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"flow.*up\.weight is negative; choose"):
        flows(Falling(), torch.zeros(1, 4))
