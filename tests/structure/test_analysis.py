"""The structural engine on small networks: every operator, random graphs, counting, choosing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prune_cli.errors import SurgeryError
from prune_cli.structure import slicing
from prune_cli.structure.follow import analyse
from tests.structure.networks import NETWORKS, Biased, Body, Parts, conv, example, halve, parameters, randomise

torch.set_num_threads(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_shrinks_exactly(name: str) -> None:
    build, shape, share = NETWORKS[name]
    model = randomise(build())
    inputs = torch.arange(8).reshape(2, 4) if shape == "tokens" else example(*shape)
    shrunk = halve(model, inputs)
    assert parameters(shrunk.model) <= share * parameters(model)
    if share == 1.0:
        assert shrunk.plan.warnings or not shrunk.plan.families or parameters(shrunk.model) < parameters(model)


def test_several_inputs_and_dict_outputs() -> None:
    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(5, 8), "c": nn.Linear(8, 4)}
    model = randomise(Body(lambda m, x, y: {"sum": m.c(F.relu(m.a(x) + m.b(y))), "list": [m.c(m.a(x))]}, **layers))
    shrunk = halve(model, (example(2, 3), example(2, 5)))
    assert shrunk.model.a.out_features == 4 and shrunk.model.c.out_features == 4


def test_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, *, pixels: Tensor) -> Tensor:
            return self.b(self.a(pixels))

    assert halve(randomise(Two()), {"pixels": example(2, 3)}).model.a.out_features == 4


def test_auxiliary_heads_that_run_only_in_training_follow() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = conv(3, 8), conv(8, 4), conv(8, 2)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.b(x), self.aux(x)) if self.training else self.b(x)

    small = halve(randomise(Aux()), example(1, 3, 4, 4)).model
    assert small.aux.weight.shape == (2, 4, 1, 1)
    assert len(small.train()(example(1, 3, 4, 4))) == 2


def test_unknown_operator_keeps_its_channels_and_is_named() -> None:
    model = Body(
        lambda m, x: m.c(torch.linalg.qr(m.b(m.a(x)))[0]), a=nn.Linear(6, 12), b=nn.Linear(12, 6), c=nn.Linear(6, 4)
    )
    shrunk = halve(randomise(model), example(7, 6))  # of full rank, or rounding would choose the basis
    assert shrunk.model.a.out_features == 6 and shrunk.model.b.out_features == 6
    assert any("qr" in warning for warning in shrunk.plan.warnings)


def test_sizes_of_a_split_that_a_module_stores_follow() -> None:
    shrunk = halve(randomise(Parts()), example(1, 3, 4, 4))
    assert not shrunk.plan.warnings and shrunk.model.a.out_channels == sum(shrunk.model.parts) <= 11


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("restores", [False, True])
def test_caches_are_computed_again(ran: bool, restores: bool, monkeypatch) -> None:
    """Also of a class that copies itself, which all do once a library has given modules a `__getstate__` of its own."""
    if restores:
        monkeypatch.setattr(slicing, "_restores", lambda kind: True)
    model, inputs = randomise(Biased()), example(2, 3)
    if ran:
        model(inputs)
    before = dict(vars(model))
    shrunk = halve(model, inputs)
    assert shrunk.model.a.out_features == 4 and shrunk.model.bias.shape == (4,)
    assert all(vars(model)[key] is value for key, value in before.items())
    assert bool(model.bias_cache) == ran


def test_analysis_leaves_what_a_module_remembers() -> None:
    model, inputs = randomise(Biased()), example(2, 3)
    analyse(model, inputs)
    assert model.last is None and not model.bias_cache


class Experts(nn.Module):
    """Of two layers the data choose one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = 0 * x, self.gate(x).argmax(-1)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                y = y + (chosen == number).to(x.dtype)[:, None] * expert(x)
        return y


class Routed(nn.Module):
    """Each row goes to one layer; a layer may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = torch.zeros_like(x), self.gate(x).argmax(-1)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(x[chosen == number])
        return x + y


def test_layers_that_got_no_rows_of_the_example_shrink_too() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 8), Routed(), nn.Linear(8, 4)))
    shrunk = halve(model, example(4, 3))
    assert all("looks at values" in warning for warning in shrunk.plan.warnings)
    assert all(e.in_features == e.out_features == 4 for e in shrunk.model[1].experts)
    for number in range(3):
        shrunk.model[1].gate.bias.data = 99.0 * torch.eye(3, dtype=torch.float64)[number]
        assert shrunk.model(example(4, 3)).shape == (4, 4)


def test_what_did_not_run_on_the_example_still_fits() -> None:
    model = nn.Sequential(nn.Linear(3, 8), Experts(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        randomise(model)[1].gate.weight.zero_()
    shrunk = halve(model, example(2, 3))
    assert shrunk.model[2].out_features == 6 and all(e.in_features == 4 for e in shrunk.model[1].experts)
    for bias in ((1.0, 0.0), (0.0, 1.0)):
        shrunk.model[1].gate.bias.data = torch.tensor(bias, dtype=torch.float64)
        assert shrunk.model(example(2, 3)).shape == (2, 4)


def test_literal_sizes_keep_only_what_they_touch() -> None:
    build, shape, _ = NETWORKS["literal view"]
    shrunk = halve(randomise(build()), example(*shape))
    assert shrunk.model.a.out_channels == 4 and shrunk.model.b.out_channels == 16
    assert shrunk.plan.warnings


def test_an_error_inside_a_module_is_laid_at_its_door() -> None:
    class Literal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(1, 2, 4, 25)

    model = nn.Sequential(conv(3, 8), Literal(), nn.Flatten(), nn.Linear(200, 4))
    shrunk = halve(randomise(model), example(1, 3, 5, 5))
    assert all("in 1:" in warning for warning in shrunk.plan.warnings) and shrunk.plan.warnings


def test_literal_slice_keeps_what_lies_before_its_bound() -> None:
    build, shape, _ = NETWORKS["literal slices"]
    shrunk = halve(randomise(build()), example(*shape))
    kept = shrunk.lineage.kept["a.weight"][0]
    assert kept[:4] == (0, 1, 2, 3) and len(kept) == 8 and shrunk.model.b.out_channels == 4


def test_padded_shortcut_halves_what_it_can() -> None:
    build, shape, _ = NETWORKS["shortcut A"]
    shrunk = halve(randomise(build()), example(*shape))
    assert shrunk.model.a.out_channels == 4 and shrunk.model.b.out_channels == 12


def test_outputs_are_fixed() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5)))
    plan = analyse(model, example(2, 3))
    assert set(plan.axes) == {"0.weight", "0.bias", "1.weight"} and list(plan.axes["1.weight"]) == [1]


def test_families_name_producers_and_consumers() -> None:
    build, shape, _ = NETWORKS["residual"]
    plan = analyse(randomise(build()), example(*shape))
    (family,) = plan.families
    assert family.name == "a" and len(family.units) == 8
    assert family.producers == (("a.weight", 0), ("b.weight", 0))
    assert set(family.consumers) == {("b.weight", 1), ("c.weight", 1)}
    assert set(family.others) == {("a.bias", 0), ("b.bias", 0)}
    assert np.array_equal(plan.axes["b.weight"][0], plan.axes["b.weight"][1])


def test_analysis_leaves_the_model_alone() -> None:
    model = randomise(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 4))).train()
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    analyse(model, example(1, 3, 4, 4))
    assert modes == [m.training for m in model.modules()] and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(p, "_prune_labelling") for p in model.parameters())


def test_model_that_does_not_run_is_refused_in_one_line() -> None:
    with pytest.raises(SurgeryError, match="does not run on the example input") as caught:
        analyse(randomise(nn.Sequential(conv(3, 8), conv(8, 4))), example(1, 5, 4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["chain", "grouped", "transposed", "multiplier", "multihead attention", "heads", "einsum",
                                  "NHWC flatten", "squeeze excite", "conv3d"])  # fmt: skip
def test_counting_equals_counting_the_built_network(name: str) -> None:
    build, shape, _ = NETWORKS[name]
    model = randomise(build())
    shrunk = halve(model, example(*shape))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for network, keep in ((model, shrunk.plan.everything()), (shrunk.model, shrunk.keep)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                copy.deepcopy(network).to("meta")(example(*shape).to("meta"))
            cost = shrunk.plan.count(keep)
            assert 2 * cost.macs == counter.get_total_flops()
            layers = shrunk.plan.count_layers(keep).values()
            assert (sum(c.params for c in layers), sum(c.macs for c in layers)) == (cost.params, cost.macs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_whether_a_reshape_copies_is_no_reason_to_keep_channels(ratio: float) -> None:
    """One image and narrow heads: the small network's reshapes are views where the dense network's are copies."""

    def forward(net: Any, tokens: Tensor) -> Tensor:
        tokens = net.stem(tokens)
        return net.head((tokens + net.attention(tokens, tokens, tokens)[0]).mean(1))

    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    net = Body(forward, stem=nn.Linear(6, 8), attention=attention, head=nn.Linear(8, 3))
    shrunk = halve(randomise(net), example(1, 5, 6), ratio)
    assert not shrunk.plan.warnings
    assert parameters(shrunk.model) < 0.7 * parameters(net)
