"""What the check must notice, leave alone or not mind: nan, counters, numbers made of widths, rounding, norms by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prune_cli import shrink
from prune_cli.errors import SurgeryError
from prune_cli.structure import reference, verified
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from prune_cli.structure.slicing import structured_masks
from tests.structure.networks import conv, example, halve, parameters, randomise
from tests.structure.oracle import Body, limited, shrunk_and_judged

NAN, INF = math.nan, math.inf


# ------------------------------------------------------------------------------------------------------ nan
@pytest.mark.parametrize(
    ("want", "got", "gap"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 1.0], 0.5),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN], [NAN], INF),
        ([INF, 2.0], [INF, 2.0], 0.0),
        ([INF], [-INF], INF),
        ([-INF, 1.0], [0.0, 1.0], INF),
        ([0.0], [0.0], 0.0),
    ],
)
def test_what_is_no_number_is_never_equal(want: list[float], got: list[float], gap: float) -> None:
    assert reference.gap([torch.tensor(want)], [torch.tensor(got)]) == gap


def own_length(m: Any, x: Tensor) -> Tensor:
    w = m.a.weight
    return m.b(F.conv2d(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], m.a.bias).relu())


def own_largest(m: Any, x: Tensor) -> Tensor:
    w = m.a.weight
    return m.b(F.conv2d(x, w / w.abs().amax((1, 2, 3), keepdim=True), m.a.bias).relu())


NORMED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(conv(3, 8)), nn.ReLU(), parametrizations.weight_norm(conv(8, 4))),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(conv(3, 8)), nn.ReLU(), nn.utils.weight_norm(conv(8, 4))),
    "weight norm, linear": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 4)),
    "own length": lambda: Body(own_length, a=conv(3, 8), b=conv(8, 4)),
    "own largest": lambda: Body(own_largest, a=conv(3, 8), b=conv(8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMED)
def test_weights_divided_by_their_own_size_are_really_compared(name: str) -> None:
    model = randomise(NORMED[name]())
    given = example(2, 3) if "linear" in name else example(2, 3, 4, 4)
    shrunk = halve(model, given)
    assert parameters(shrunk.model) < parameters(model)
    assert not any(t.isnan().any() for t in reference.forward(model, shrunk.plan, shrunk.keep, given))
    with torch.no_grad():  # the comparison sees what is wrong with the small one
        next(p for n, p in shrunk.model.named_parameters() if p.dim() > 1).mul_(1.5)
        list(shrunk.model.parameters())[-1].mul_(1.5)
    assert reference.difference(model, shrunk, given) > 1e-3


@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "weight norm, linear"])
def test_masks_of_weight_norm_leave_numbers(name: str) -> None:
    model = randomise(NORMED[name]())
    given = example(2, 3) if "linear" in name else example(2, 3, 4, 4)
    shrunk = halve(model, given)
    masks = structured_masks(model, shrunk.plan, shrunk.keep)
    with torch.no_grad():
        for key, mask in masks.items():
            model.get_parameter(key).mul_(mask)
        assert torch.allclose(model(given), shrunk.model(given))


def test_a_small_network_of_nan_is_refused(monkeypatch) -> None:
    model, given = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))), example(2, 3, 4, 4)
    shrunk = halve(model, given)
    with torch.no_grad():
        shrunk.model[0].weight.fill_(NAN)
    with pytest.raises(SurgeryError, match="no number"):
        verified.checked(model, shrunk, {}, check_on=(given,))


def test_a_network_that_gives_nan_itself_is_refused() -> None:
    model = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
    with torch.no_grad():
        model[2].bias[0] = NAN
    with pytest.raises(SurgeryError, match="no number"):
        shrink(model, example(2, 3, 4, 4))


def test_infinities_of_a_mask_are_no_difference() -> None:
    model = Body(lambda m, x: m.b(m.a(x)).masked_fill(x[:, :1] > 0, -INF), a=conv(3, 8), b=conv(8, 4))
    assert parameters(shrink(randomise(model), example(2, 3, 4, 4))) < parameters(model)


# --------------------------------------------------------------------------------------------------- loops
def written(m: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 16, *x.shape[2:])
    y[:, :8], y[:, 8:] = m.a(x), m.b(x)
    return m.c(y)


def written_in_three(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 16, *x.shape[2:], dtype=x.dtype)
    y[:, :4], y[:, 4:8], y[:, 8:] = m.a(x)[:, :4], m.a(x)[:, 4:], m.b(x)
    return m.c(y.relu())


def written_partly(m: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 16, *x.shape[2:])
    y[:, 2:10] = m.a(x)
    return m.c(y) + m.c(F.pad(m.b(x), (0, 0, 0, 0, 4, 4)))


def grouped_zeros(m: Any, x: Tensor) -> Tensor:
    y = F.pad(m.a(x), (0, 0, 0, 0, 8, 0)).view(len(x), 4, 4, *x.shape[2:])
    return m.c(y.transpose(1, 2).reshape(len(x), 16, *x.shape[2:]))


@pytest.mark.parametrize("function", [written, written_in_three, written_partly, grouped_zeros])
def test_channels_written_by_slices_come_to_an_end(function: Callable[..., Tensor]) -> None:
    shrunk_and_judged(randomise(Body(function, a=conv(3, 8), b=conv(3, 8), c=conv(16, 4))), example(2, 3, 4, 4))


def test_a_model_that_never_runs_smaller_is_kept_whole_in_the_end() -> None:
    def stubborn(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x).relu()
            if x.shape[1] != 8 or sum(p.numel() for p in m.parameters()) != m.total:
                raise ValueError("another network")
        return m.c(x)

    model = Body(stubborn, layers=nn.ModuleList([conv(3, 8), *(conv(8, 8) for _ in range(40))]), c=conv(8, 4))
    model.total = parameters(model)
    with limited(60):
        shrunk = halve(randomise(model), example(1, 3, 4, 4))
    assert parameters(shrunk.model) == parameters(model) and shrunk.plan.warnings


# ----------------------------------------------------------------------------------------------- originals
class Counting(nn.Module):
    """Counts its calls in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.history, self.by_size, self.seen, self.number = [[]], {"sizes": []}, set(), 0
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.number += 1
        self.history[0].append(float(x.shape[0]))
        self.by_size["sizes"].append(x.shape)
        self.seen.add(self.number)
        self.last += 1
        x.clamp_(min=-0.5)
        y = self.a(x)
        y = F.batch_norm(y, self.mean, self.var, training=True, momentum=0.1)
        return self.b(y)


def remembered(model: nn.Module) -> Any:
    plain = {key: copy.deepcopy(value) for key, value in vars(model).items() if key[0] != "_"}
    return plain, {key: value.clone() for key, value in model.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    (plain, state), (other, others) = first, second
    return str(plain) == str(other) and all(torch.equal(state[key], others[key]) for key in state)


def test_counters_lists_statistics_and_inputs_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model, given = Counting().eval(), torch.randn(2, 3, 4, 4)
    before, inputs, generator = remembered(model), given.clone(), torch.get_rng_state()
    small = shrink(model, given)
    assert same(before, remembered(model)) and torch.equal(given, inputs)
    assert torch.equal(generator, torch.get_rng_state())
    assert small.calls.item() == 0 and small.number == 0 and small.history == [[]] and not small.seen
    assert small.a.out_channels == 4


def test_inputs_in_dicts_and_lists_stay_as_they_were() -> None:
    def forward(m: Any, pair: list[Tensor], options: dict[str, Tensor]) -> Tensor:
        pair[0].mul_(2)
        options["seen"] = options["bias"]
        pair.append(pair[0])
        return m.b(m.a(pair[0]) + options["bias"])

    model = randomise(Body(forward, a=conv(3, 8), b=conv(8, 4)))
    pair, options = [example(2, 3, 4, 4)], {"bias": example(1, 1, 4, 4)}
    shrink(model, (pair, options))
    assert len(pair) == 1 and torch.equal(pair[0], example(2, 3, 4, 4)) and list(options) == ["bias"]


# ------------------------------------------------------------------------------- numbers made of widths
def seeded(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype))


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "groups of a norm": lambda m, y: F.group_norm(y, y.shape[1] // 4),
    "shuffle": lambda m, y: F.channel_shuffle(y, y.shape[1] // 4),
    "clamp": lambda m, y: y.clamp(max=y.shape[1] / 40),
    "clamp from below": lambda m, y: y.clamp_min(-y.shape[1] / 40),
    "slope": lambda m, y: F.leaky_relu(y, 1 / y.shape[1]),
    "elu": lambda m, y: F.elu(y, y.shape[1] / 10),
    "celu": lambda m, y: F.celu(y, y.shape[1] / 10),
    "softplus": lambda m, y: F.softplus(y, y.shape[1] / 10) - math.log(2) * 10 / y.shape[1],
    "threshold": lambda m, y: F.threshold(y, y.shape[1] / 100, 0.0),
    "hardtanh": lambda m, y: F.hardtanh(y, -1.0, y.shape[1] / 40),
    "eps of a batch norm": lambda m, y: F.batch_norm(y, m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, eps=y.shape[1] / 8),
    "eps of an instance norm": lambda m, y: F.instance_norm(y, eps=y.shape[1] / 8),
    "power": lambda m, y: y.abs() ** (y.shape[1] / 8),
    "factor": lambda m, y: y * y.shape[1] ** -0.5,
    "divisor": lambda m, y: y / y.shape[1],
    "summand": lambda m, y: y + y.shape[1],
    "alpha": lambda m, y: torch.add(y, y.relu(), alpha=y.shape[1]),
    "comparison": lambda m, y: y * (y.abs() > y.shape[1] / 50),
    "roll": lambda m, y: torch.roll(y, y.shape[1] // 4, 2),
    "full": lambda m, y: y * torch.full((1, y.shape[1], 1, 1), y.shape[1], dtype=y.dtype),
    "full of a fraction": lambda m, y: y + torch.full_like(y, 1 / y.shape[1]),
    "fill": lambda m, y: y * torch.empty_like(y).fill_(y.shape[1]),
    "tensor": lambda m, y: y * torch.tensor(y.shape[1], dtype=y.dtype),
    "dropout that never stops": lambda m, y: F.dropout(y, 0.5, training=True),
    "noise": lambda m, y: y + torch.randn_like(y),
    "noise of its own seed": lambda m, y: y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype),
    "rand per channel": lambda m, y: y * torch.rand(1, y.shape[1], 1, 1, dtype=y.dtype),
    "bernoulli": lambda m, y: y * torch.bernoulli(torch.full_like(y, 0.5)),
    "nan to number": lambda m, y: torch.nan_to_num(y / y, nan=y.shape[1]) * y,
    "lerp": lambda m, y: torch.lerp(y, y.relu(), 1 / y.shape[1]),
    "addcmul": lambda m, y: torch.addcmul(y, y, y, value=1 / y.shape[1]),
    "window of a pool": lambda m, y: F.avg_pool2d(y, max(1, y.shape[1] // 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_made_of_widths_keep_their_channels_instead_of_a_refusal(name: str) -> None:
    """And what has nothing to do with them shrinks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.d(NUMBERS[name](m, m.a(x))).relu()).mean((2, 3))

    model = randomise(Body(forward, a=conv(3, 16), d=conv(16, 12), b=conv(12, 4), n=nn.BatchNorm2d(16)))
    with limited(60):
        small = shrink(model, example(2, 3, 8, 8))
    assert small.d.out_channels == 6 and small(example(3, 3, 8, 8)).shape == (3, 4)


def test_one_channel_may_be_left_in_every_group_of_a_norm() -> None:
    model = randomise(nn.Sequential(conv(3, 16), nn.GroupNorm(8, 16), nn.ReLU(), conv(16, 4)))
    assert shrink(model, example(2, 3, 4, 4))[1].num_channels == 8


# ------------------------------------------------------------------------------------------------ rounding
def test_what_only_rounding_decides_is_compared_in_double() -> None:
    """The last bits of float32 decide what comes out, as in the order of scores after non-maximum suppression."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu())
        return torch.where((y * 2**24).round() % 2 > 0, y, -y) if y.dtype is torch.float32 else y

    torch.manual_seed(0)
    model = Body(forward, a=conv(3, 64, 3), b=conv(64, 4, 3)).eval()
    assert shrink(model, torch.randn(2, 3, 8, 8)).a.out_channels == 32


def test_an_error_that_is_there_in_double_too_is_refused() -> None:
    model, given = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))).float(), example(2, 3, 4, 4).float()
    shrunk = halve(model.double(), given.double())
    with torch.no_grad():
        shrunk.model[2].bias.add_(0.1)
    with pytest.raises(SurgeryError, match="differs from the masked one"):
        verified.checked(model, shrunk, {}, check_on=(given.double(),))


# --------------------------------------------------------------------------------------------- TorchScript
def scripted() -> nn.Module:
    return torch.jit.trace(nn.Conv2d(8, 8, 1).eval(), torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize(
    "build",
    [
        scripted,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), scripted(), nn.Conv2d(8, 4, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(nn.ReLU()), nn.Conv2d(8, 4, 1)),
    ],
)
def test_torchscript_is_refused_in_one_line(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    given = torch.zeros(1, 3 if isinstance(model, nn.Sequential) else 8, 4, 4)
    for function in (analyse, shrink):
        with pytest.raises(SurgeryError, match="TorchScript") as caught:
            function(model, given)
        assert "\n" not in str(caught.value)


def exported() -> nn.Module:
    return torch.export.export(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.zeros(1, 4),)).module()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.compile(nn.Linear(4, 2)), "^the model is compiled .torch.compile.; give .* _orig_mod"),
        (lambda: nn.Sequential(nn.Linear(4, 8), torch.compile(nn.Linear(8, 2))), "^1 is compiled"),
        (exported, "^the model is a program of torch.export"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2).to("meta")), "^1.weight is on the meta device"),
    ],
)
def test_what_has_no_code_or_no_values_to_shrink_is_refused_in_one_line(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message) as caught:
        shrink(build(), torch.zeros(1, 4))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------- norms and gates
def gate(m: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean(1, keepdim=True))


GATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sigmoid": gate,
    "factor": lambda m, x: x * x.mean(1, keepdim=True),
    "added": lambda m, x: x + x.mean(1, keepdim=True),
    "deviation as a factor": lambda m, x: x * x.std(1, keepdim=True),
    "exponential": lambda m, x: x * torch.exp(-x.var(1, keepdim=True)),
    "relu of a difference": lambda m, x: x * F.relu(1 - x.mean(1, keepdim=True)),
    "concatenated": lambda m, x: x * torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1).sum(1, keepdim=True),
    "divided by channels": lambda m, x: x.mean(1, keepdim=True) / (1 + x.square()),
    "squared and added": lambda m, x: x + x.square().mean(1, keepdim=True).sqrt(),
}  # fmt: skip
NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm": lambda m, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt(),
    "layer norm by rsqrt": lambda m, x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True) + 1e-5),
    "root mean square": lambda m, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    "root mean square, divided": lambda m, x: x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt(),
    "root mean square by power": lambda m, x: x * (x.pow(2).mean(1, keepdim=True) + 1e-6) ** -0.5,
    "deviation": lambda m, x: x / (x.std(1, keepdim=True) + 1e-3),
    "both at once": lambda m, x: (lambda v: (x - v[1]) / (v[0] + 1e-5).sqrt())(torch.var_mean(x, 1, keepdim=True)),
    "centred": lambda m, x: x - x.mean(1, keepdim=True),
    "response": lambda m, x: (lambda g: x * (g / (g.mean(1, keepdim=True) + 1e-6)))(x.norm(dim=(2, 3), keepdim=True)),
    "without keepdim": lambda m, x: (x - x.mean(1).unsqueeze(1)) / (x.var(1)[:, None] + 1e-5).sqrt(),
}


def named(title: str, function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return type(title, (Body,), {})(lambda m, x: function(m, x))


@pytest.mark.parametrize("title", ["Gate", "NormGate", "XLNetLayer", "RMSGate"])
@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_no_norm_whatever_its_class_is_called(name: str, title: str) -> None:
    shrunk_and_judged(randomise(nn.Sequential(conv(3, 8), named(title, GATES[name]), conv(8, 4))), example(2, 3, 4, 4))


@pytest.mark.parametrize("title", ["Plain", "MyNorm"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_written_by_hand_is_one_whatever_its_class_is_called(name: str, title: str) -> None:
    model = randomise(nn.Sequential(conv(3, 8), named(title, NORMS[name]), conv(8, 4)))
    assert halve(model, example(2, 3, 4, 4)).model[0].out_channels == 4


def test_a_mean_that_leaves_the_network_is_no_norm() -> None:
    model = Body(lambda m, x: (m.b(m.a(x)), m.a(x).mean(1)), a=conv(3, 8), b=conv(8, 4))
    shrunk_and_judged(randomise(model), example(2, 3, 4, 4))


# --------------------------------------------------------------------------------------------------- hooks
def test_hooks_and_attributes_of_parameters_survive() -> None:
    model, calls = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4))), []
    model[0].weight.register_hook(lambda grad: calls.append("hook") or grad * 0)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    model[2].weight.note = "kept"
    small = shrink(model, example(2, 3, 4, 4))
    small(example(2, 3, 4, 4)).sum().backward()
    assert calls == ["hook", "after"] and not small[0].weight.grad.any() and small[2].weight.note == "kept"


def test_other_choices_of_units_are_exact_too() -> None:
    model, given = randomise(Body(written, a=conv(3, 8), b=conv(3, 8), c=conv(16, 4))), example(2, 3, 4, 4)
    plan = analyse(model, given)
    assert lowest_units(plan, None, 0.25).shape == (plan.size,)
