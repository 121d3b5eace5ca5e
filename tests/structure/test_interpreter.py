"""Executing a network operator by operator: what is computed, what is left out, and that nothing of it remains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prune_cli.errors import SurgeryError
from prune_cli.structure.interpreter import Tracer, call_model, execute, operator_of, scalar_of
from prune_cli.structure.modules import walk


class Seen(Tracer):
    """Writes down operators and the modules that they ran in."""

    def __init__(self, modules) -> None:
        super().__init__(modules)
        self.steps: list[tuple[str, str]] = []

    def visit(self, name, func, args, kwargs, out) -> None:
        self.steps.append((self.layer, name))


class Real(Seen):
    real = True


class Keeping(nn.Module):
    """Keeps what it should not, draws random numbers, and has norms and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Dropout(),
            nn.Linear(8, 2),
        )
        self.calls, self.seen_cache = 0, None
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count = self.count + 1
        self.seen_cache = x
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))) + torch.rand(1))


@pytest.mark.parametrize("training", [False, True])
def test_an_execution_leaves_the_network_and_torch_as_they_were(training):
    model = Keeping().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    execute(model, torch.randn(2, 3, 6, 6), Seen(walk(model)), training)
    assert (model.calls, model.seen_cache) == (0, None) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == flags and torch._C._get_mkldnn_enabled()
    torch.set_rng_state(state)
    assert torch.is_grad_enabled() and nn.Module.__call__.__module__ == "torch.nn.modules.module"


def test_products_are_left_out_and_shapes_are_right():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    (out,) = execute(model, torch.randn(2, 3, 6, 6), Seen(walk(model)), False)
    assert out.shape == (2, 5) and not out.any()
    with FlopCounterMode(display=False) as counter:
        execute(model, torch.randn(2, 3, 6, 6), Seen(walk(model)), False)
    assert counter.get_total_flops() == 0


def test_a_real_execution_computes_what_the_network_computes():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval(),
        torch.randn(2, 3, 6, 6),
    )
    (out,) = execute(model, x, Real(walk(model)), False)
    with torch.no_grad():
        torch.testing.assert_close(out, model(x))


def test_operators_are_seen_in_order_with_their_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    seen = Seen(walk(model))
    execute(model, torch.randn(1, 3, 4, 4), seen, False)
    assert [step for step in seen.steps if step[1] in {"convolution", "native_batch_norm", "relu"}] == [
        ("0", "convolution"), ("1.0", "native_batch_norm"), ("1.1", "relu"),
    ]  # fmt: skip


def test_an_example_that_does_not_fit_is_one_line():
    model = nn.Linear(3, 2)
    with pytest.raises(SurgeryError, match=r"does not run on the example input.*give inputs of the shape") as caught:
        execute(model, torch.zeros(1, 4), Seen(walk(model)), False)
    assert "\n" not in str(caught.value)
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"


def test_examples_are_tensors_positional_or_by_name():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    one, two = torch.tensor(3.0), torch.tensor(1.0)
    assert call_model(Two(), (one, two)) == call_model(Two(), {"b": two, "a": one}) == 2
    assert call_model(nn.Identity(), one) == 3


def test_names_of_operators_tell_writes_from_their_in_place_underscore():
    assert operator_of(torch.ops.aten.relu_.default)[:3] == ("relu_", "relu", True)
    assert operator_of(torch.ops.aten.mm.default)[1:3] == ("mm", False)
    assert operator_of(torch.ops.aten.mm.default)[3] == "heavy"


@pytest.mark.parametrize(
    ("name", "args", "number"),
    [
        ("mul", (torch.ones(2), 0.5), 0.5),
        ("div", (torch.ones(2), 4), 0.25),
        ("add", (torch.ones(2), torch.tensor(3.0)), 3.0),
        ("add", (torch.ones(2), torch.ones(2)), None),
        ("relu", (torch.ones(2), 2.0), None),
        ("mul", (torch.ones(2), 0), None),
    ],
)
def test_the_number_that_a_tensor_meets(name, args, number):
    assert scalar_of(name, args) == number
