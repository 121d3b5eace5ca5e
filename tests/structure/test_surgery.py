"""What must survive surgery: optimizer state, hooks, ties, modes, and the way back from a file."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.structure import reference
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from prune_cli.structure.plan import Plan
from prune_cli.structure.rebuild import rebuild
from prune_cli.structure.slicing import kept_indices, structured_masks
from prune_cli.structure.surgery import remove_units

torch.set_num_threads(1)


class Net(nn.Module):
    """Convolutions, a residual sum and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.body(x)).mean((2, 3)))


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 1.5)
    return model


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def plan_and_keep(model: nn.Module, ratio: float = 0.5, seed: int = 0) -> tuple[Plan, np.ndarray]:
    plan = analyse(model, images())
    return plan, lowest_units(plan, np.random.default_rng(seed).random(plan.size), ratio)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images(4)).square().sum().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_on_as_if_the_masked_network_had_been_trained(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](
        [
            {"params": [model.stem.weight, *model.norm.parameters()]},
            {"params": [*model.body.parameters(), *model.head.parameters()], "lr": 0.02},
        ]
    )
    for _ in range(3):
        step(model, optimizer)
    plan, keep = plan_and_keep(model)
    old = {
        n: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for n, p in model.named_parameters()
    }
    small = remove_units(model, plan, keep, optimizer).model
    kept = kept_indices(plan, keep)
    for n, parameter in small.named_parameters():
        for key, value in old[n].items():
            for axis, indices in kept.get(n, {}).items() if value.dim() else ():
                value = value.index_select(axis, torch.from_numpy(indices))
            assert torch.equal(optimizer.state[parameter][key], value)
    mine = {id(p) for p in small.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
    assert set(map(id, optimizer.state)) == mine
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    before = [p.clone() for p in small.parameters()]
    step(small, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


def test_a_training_step_of_the_small_network_equals_the_masked_one() -> None:
    model = network().eval()  # evaluation: batch statistics of removed channels play no part
    plan, keep = plan_and_keep(model)
    small = remove_units(model, plan, keep).model
    big, masks = copy.deepcopy(model), structured_masks(model, plan, keep)
    with torch.no_grad():
        for n, p in big.named_parameters():
            p.mul_(masks.get(n, torch.ones(())))
    for net in (big, small):
        net(images()).square().sum().backward()
    kept = kept_indices(plan, keep)
    for n, p in small.named_parameters():
        gradient = big.get_parameter(n).grad
        for axis, indices in kept.get(n, {}).items():
            gradient = gradient.index_select(axis, torch.from_numpy(indices))
        assert torch.allclose(p.grad, gradient, atol=1e-5)


def test_modes_requires_grad_gradients_hooks_and_names_survive() -> None:
    model = network()
    model.train()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    model(images()).sum().backward()
    calls: list[str] = []
    model.body.register_forward_hook(lambda *_: calls.append("body"))
    plan, keep = plan_and_keep(model)
    calls.clear()
    small = remove_units(model, plan, keep).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert small.body.weight.grad.shape == small.body.weight.shape
    assert small.norm.weight.grad is None and isinstance(small.stem.weight, nn.Parameter)
    calls.clear()
    small(images())
    assert calls == ["body"]
    assert (
        small.stem.out_channels,
        small.norm.num_features,
        small.body.in_channels,
        small.head.in_features,
    ) == (4,) * 4


def test_ties_stay_ties() -> None:
    model = network()
    model.body2 = nn.Conv2d(8, 8, 3, padding=1)
    model.body2.weight = model.body.weight
    plan, keep = plan_and_keep(model)
    small = remove_units(model, plan, keep).model
    assert small.body2.weight is small.body.weight
    assert plan.count(keep).params <= sum(p.numel() for p in small.parameters())


def test_what_is_removed_is_freed() -> None:
    model = network()
    plan, keep = plan_and_keep(model)
    small = remove_units(model, plan, keep).model
    watched = weakref.ref(model.stem.weight)
    del model
    gc.collect()
    assert watched() is None and small.stem.weight.untyped_storage().nbytes() == small.stem.weight.numel() * 4


def test_emptying_an_axis_is_refused() -> None:
    model = network()
    plan = analyse(model, images())
    keep = np.zeros(plan.size, dtype=bool)
    with pytest.raises(SurgeryError, match="nothing would be left"):
        remove_units(model, plan, keep)


def test_keep_of_another_length_is_refused() -> None:
    model = network()
    plan = analyse(model, images())
    with pytest.raises(SurgeryError, match="bools"):
        remove_units(model, plan, np.ones(3, dtype=bool))


def test_a_choice_that_breaks_a_literal_falls_back_to_less_pruning() -> None:
    class Literal(nn.Module):
        """Runs with 8 channels or 4, and no other number: the trial at one half does not notice."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(F.relu(self.a(x)))
            if x.shape[1] not in (8, 4):
                raise ValueError("eight or four channels")
            return self.c(x)

    model = Literal().eval()
    plan = analyse(model, images())
    assert len(plan.families) == 2
    keep = lowest_units(plan, None, 0.25)
    shrunk = remove_units(model, plan, keep)
    assert shrunk.model.a.out_channels == 6 and shrunk.model.b.out_channels == 8
    assert any("eight or four" in warning for warning in shrunk.plan.warnings)
    assert reference.difference(model, shrunk, images()) < 1e-5


def test_model_that_cannot_be_copied_is_refused() -> None:
    model = network()
    model.lock = (_ for _ in range(3))  # generators can't be copied
    plan = analyse(model, images())
    with pytest.raises(SurgeryError, match="can't be copied"):
        remove_units(model, plan, lowest_units(plan, None, 0.5))


def test_recurrent_layers_keep_running() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.b = (
                nn.Linear(3, 8),
                nn.GRU(8, 6, num_layers=2, bidirectional=True),
                nn.Linear(12, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.rnn(self.a(x))[0])

    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(4, 2, 3, dtype=torch.float64)
    plan = analyse(model, x)
    shrunk = remove_units(model, plan, lowest_units(plan, None, 0.5))
    assert reference.difference(model, shrunk, x) < 1e-10
    assert shrunk.model.a.out_features == 4 and shrunk.model.rnn.input_size == 4
    shrunk.model(x).sum().backward()


def test_attention_with_separate_projections_shrinks_with_its_embedding() -> None:
    class Attention(nn.Module):
        def __init__(self, dim: int, num_heads: int) -> None:
            super().__init__()
            self.num_heads, self.head_dim = num_heads, dim // num_heads
            self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q = self.q(x).reshape(b, n, self.num_heads, -1).permute(0, 2, 1, 3)
            k, v = self.kv(x).reshape(b, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), Attention(16, 2), nn.Linear(16, 3)).double().eval()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    plan = analyse(model, x)
    shrunk = remove_units(model, plan, lowest_units(plan, None, 0.5))
    attention = shrunk.model[1]
    assert attention.q.weight.shape == (8, 8) and attention.kv.weight.shape == (16, 8)
    assert attention.num_heads * attention.head_dim == 8
    assert reference.difference(model, shrunk, x) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_padded_shortcuts_follow_any_choice_of_channels(seed: int) -> None:
    """Shortcut A: zeros before and after the given channels go one by one, and the padding follows."""
    model = resnet_cifar(depth=8, num_classes=3, in_shape=(3, 8, 8), widths=(4, 8, 16)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    plan = analyse(model, x)
    keep = plan.everything()
    for number, family in enumerate(plan.families):
        order = np.random.default_rng([seed, number]).permutation(family.units)
        keep[order[: len(order) // 2]] = False
    small = remove_units(model, plan, keep)
    assert (small.keep == keep).all(), "nothing had to be kept beyond what was asked"
    assert reference.difference(model, small, x) < 1e-5
    assert sum(parameter.numel() for parameter in small.model.parameters()) == plan.count(keep).params
    again = rebuild(model, small.lineage)
    again.load_state_dict(small.model.state_dict())
    assert torch.equal(again.eval()(x), small.model.eval()(x))
