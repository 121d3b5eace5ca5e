"""The shared pass: additive, bounded, and the network is as before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_cli.criteria.needs import NEEDS
from prune_cli.criteria.statistics import collect
from prune_cli.errors import ConfigError

MEASURED = frozenset(name for name, need in NEEDS.items() if need.from_images or need.source == "flow")
EVERYTHING = tuple(sorted(MEASURED))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3, groups=2),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.full_like(model[6].weight, 7)
    model[1].eval()
    return model


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def batches(count: int = 9, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


IMAGE = torch.zeros(1, 3, 8, 8)


def test_the_network_is_as_before():
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = [(module, module.training) for module in model.modules()]
    rng = torch.get_rng_state()
    with torch.no_grad():  # also for a caller that has switched gradients off
        found = collect(model, batches(), EVERYTHING, loss, IMAGE)
    assert set(found) == {"0.weight", "4.weight", "6.weight"}
    assert all(set(values) == MEASURED for values in found.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert before == [(module, module.training) for module in model.modules()]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] + [True] * 7
    assert torch.equal(model[6].weight.grad, torch.full_like(model[6].weight, 7))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "6.weight")
    assert torch.equal(rng, torch.get_rng_state())


def test_the_network_is_as_before_also_after_an_error():
    model = network()

    def broken(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        collect(model, batches(), ("taylor", "mean"), broken, IMAGE)
    assert model.training and not model[1].training and model[3].training
    assert not model[0].weight.requires_grad or model[0].weight.grad is None
    assert torch.backends.mha.get_fastpath_enabled()


def test_only_what_is_needed_is_done():
    calls = []

    def counted(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return loss(model, images, labels)

    collect(network(), batches(), ("mean", "rank"), counted, IMAGE)
    assert calls == []
    collect(network(), batches(), ("taylor", "gradient", "taylor_gate"), counted, IMAGE)
    assert calls == [True] * 3  # one pass for all of them
    assert collect(network(), iter(()), ("norm", "n_keep"), counted, IMAGE)["0.weight"] == {}


def test_shares_of_several_processes_add_up_to_the_whole():
    """Two runs over half of the batches, their sums added, against one run over all.

    Products with the Hessian take the gradient of all images, which each run must have heard of: tests/runs/test_processes.
    """
    needs = tuple(need for need in EVERYTHING if need not in ("synaptic_flow", "hessian_gradient"))
    model, everything = network().double(), [(images.double(), labels) for images, labels in batches(12, 4)]
    whole = collect(model, everything, needs, loss, IMAGE.double())
    parts: list[list[Tensor]] = []
    for share in (everything[:1], everything[1:]):
        parts.append([])
        collect(model, share, needs, loss, IMAGE.double(), reduce=lambda value: parts[-1].append(value.clone()))
    left = iter(zip(*parts, strict=True))
    together = collect(
        model, everything[:1], needs, loss, IMAGE.double(), reduce=lambda value: value.copy_(sum(next(left)))
    )
    for name, values in whole.items():
        for need, value in values.items():
            torch.testing.assert_close(together[name][need], value, msg=f"{name} {need}")


def test_no_activation_outlives_its_pass():
    """Tensors of the size of activations that are alive when a pass begins: as many in the last as in the first."""
    made: list[weakref.ref] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(
                weakref.ref(leaf) for leaf in tree_leaves(result) if torch.is_tensor(leaf) and leaf.numel() > 999
            )
            return result

    alive = []

    def stream():
        for pair in batches(40, 8):
            gc.collect()
            alive.append(sum(reference() is not None for reference in made))
            yield pair

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(),
                          nn.Linear(64, 3))  # fmt: skip
    with Made():
        needs = ("mean", "not_positive", "rank", "input_norm", "taylor", "gradient", "fisher", "taylor_gate")
        collect(model, stream(), needs, loss, IMAGE)
    assert len(made) > 50
    assert len(alive) == 5 and len(set(alive[1:])) == 1 and alive[-1] <= 6  # the batch itself and what views it


class Fickle(nn.Module):
    """Runs otherwise on images that are not all 0."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        there = bool(x.any())
        hidden = self.one(x.exp() if there and self.how == "before" else x)
        hidden = hidden if there and self.how == "behind" else hidden.relu()
        hidden = self.two(hidden) if there and self.how == "again" else hidden
        return self.two(hidden).mean((2, 3))


@pytest.mark.parametrize("how", ["behind", "again"])
def test_a_network_that_runs_otherwise_on_images_is_refused(how):
    with pytest.raises(ConfigError, match=r"other operators.*choose"):
        collect(Fickle(how), batches(), ("mean",), loss, IMAGE)


def test_a_network_that_runs_otherwise_where_nothing_is_measured_is_measured():
    model = Fickle("before")
    images = batches(5, 5)[0][0]
    with torch.no_grad():
        expected = model.one(images.exp()).relu().double().mean((0, 2, 3))
    torch.testing.assert_close(collect(model, batches(5, 5), ("mean",), loss, IMAGE)["one.weight"]["mean"], expected)


def test_a_batch_of_one_is_measured_too():
    whole = collect(network().eval(), batches(9, 9), ("mean", "input_norm"), loss, IMAGE)
    split = collect(network().eval(), batches(9, 4), ("mean", "input_norm"), loss, IMAGE)  # 4 + 4 + 1
    for name in whole:
        for need in whole[name]:
            torch.testing.assert_close(split[name][need], whole[name][need])


def test_everything_in_the_table_is_measured_or_known_otherwise():
    assert set(NEEDS) - MEASURED == {"norm", "n_keep", "movement"}
    assert all(need.take is not None for need in NEEDS.values() if need.is_statistic)
    assert all(need.name == name for name, need in NEEDS.items())
