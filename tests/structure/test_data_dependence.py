"""Networks whose code depends on the values of their input: on no input does the small network compute something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli import shrink
from prune_cli.errors import SurgeryError
from prune_cli.structure.follow import analyse
from tests.structure.networks import conv, example, parameters, randomise
from tests.structure.oracle import Body, limited, shrunk_and_judged


def ends(**held: Any) -> dict[str, Any]:
    return {"a": nn.Linear(6, 16), "c": nn.Linear(16, 4), **held}


def layers(**held: Any) -> dict[str, Any]:
    return ends(b=nn.Linear(16, 16), **held)


def experts(n: int = 4) -> dict[str, Any]:
    return ends(gate=nn.Linear(6, n), experts=nn.ModuleList(nn.Linear(16, 16) for _ in range(n)))


def top1(m: Any, x: Tensor) -> Tensor:
    chosen = m.gate(x).mean(0).argmax().item()
    return m.c(m.experts[chosen](m.a(x)).relu())


def top1_int(m: Any, x: Tensor) -> Tensor:
    return m.c(m.experts[int(m.gate(x).mean(0).argmax())](m.a(x)).relu())


def top1_numpy(m: Any, x: Tensor) -> Tensor:
    return m.c(m.experts[m.gate(x).mean(0).numpy().argmax()](m.a(x)).relu())


def top1_list(m: Any, x: Tensor) -> Tensor:
    scores = m.gate(x).mean(0).tolist()
    return m.c(m.experts[scores.index(max(scores))](m.a(x)).relu())


def threshold_item(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.mean().item() > 0:
        y = y.flip(1)
    return m.c(y.relu())


def threshold_float(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c((y.roll(3, 1) if float(x.sum()) > 0 else y).relu())


def flips(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.mean() > 0:
        y = y.flip(1)
    return m.c(y.relu())


def flips_back(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.mean() < 0:
        y = y.flip(1)
    return m.c(y.relu())


def swaps(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if (x > 0.5).any():
        first, second = y.chunk(2, 1)
        y = torch.cat([second, first], 1)
    return m.c(y)


def rolls(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.roll(m.a(x), int(x.abs().sum()) % 5, 1))


def slices(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    k = 4 + int(x[0, 0] > 0)
    return m.c(torch.cat([y[:, k:], y[:, :k].relu()], 1))


def either_layer(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(m.b(y) if x.sum() > 0 else m.d(y))


def early(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.std() > 1:
        return m.c(y)
    return m.c(m.b(y).relu())


def loops(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    for _ in range(int(x.abs().mean() * 3) + 1):
        y = m.b(y).tanh()
    return m.c(y)


def until(m: Any, x: Tensor) -> Tensor:
    y, left = m.a(x), 6
    while y.abs().max() > 0.5 and left:
        y, left = y * 0.5, left - 1
    return m.c(y)


def guarded(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if torch.isnan(x).any():
        raise ValueError("no number")
    return m.c(m.b(y).relu())


def same(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(y if torch.equal(x, x.abs()) else y.flip(1))


def rows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    chosen = (x[:, 0] > 0).nonzero().flatten()
    return m.c(y.index_add(0, chosen, m.b(y[chosen])))


def masked_rows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    here = x[:, 0] > 0
    z = torch.zeros_like(y)
    z[here] = m.b(y[here])
    z[~here] = m.d(y[~here])
    return m.c(z)


class Router(nn.Module):
    """Hands a number to whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> int:
        return int(self.gate(x).mean(0).argmax())


def by_router(m: Any, x: Tensor) -> Tensor:
    return m.c(m.experts[m.router(x)](m.a(x)).relu())


def skipping(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    for layer in m.experts:
        if y.mean() > 0:
            y = y + layer(y)
    return m.c(y)


def dense_experts(m: Any, x: Tensor) -> Tensor:
    chosen, y = m.gate(x).argmax(-1), m.a(x)
    z = 0 * y
    for number, expert in enumerate(m.experts):
        if (chosen == number).any():
            z = z + (chosen == number).to(x.dtype)[:, None] * expert(y)
    return m.c(z)


def sorted_rows(m: Any, x: Tensor) -> Tensor:
    order = x.sum(1).argsort()
    return m.c(m.b(m.a(x)[order]).relu())


def lengths(m: Any, x: Tensor) -> Tensor:
    n = int((x[:, 0] > 0).sum()) + 1
    y = m.b(m.a(x)).relu()
    return m.c(y * (torch.arange(len(x)) < n).to(x.dtype)[:, None])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "top 1 by item": lambda: Body(top1, **experts()),
    "top 1 by int": lambda: Body(top1_int, **experts()),
    "top 1 by numpy": lambda: Body(top1_numpy, **experts()),
    "top 1 by list": lambda: Body(top1_list, **experts()),
    "threshold by item": lambda: Body(threshold_item, **ends()),
    "threshold by float": lambda: Body(threshold_float, **ends()),
    "condition": lambda: Body(flips, **ends()),
    "other condition": lambda: Body(flips_back, **ends()),
    "any": lambda: Body(swaps, **ends()),
    "roll by data": lambda: Body(rolls, **ends()),
    "slice by data": lambda: Body(slices, **ends()),
    "one of two layers": lambda: Body(either_layer, **layers(d=nn.Linear(16, 16))),
    "early exit": lambda: Body(early, **layers()),
    "loop": lambda: Body(loops, **layers()),
    "while": lambda: Body(until, **ends()),
    "guard": lambda: Body(guarded, **layers()),
    "equal": lambda: Body(same, **ends()),
    "rows": lambda: Body(rows, **layers()),
    "masked rows": lambda: Body(masked_rows, **layers(d=nn.Linear(16, 16))),
    "router of its own": lambda: Body(by_router, router=Router(), **experts()),
    "skipped layers": lambda: Body(skipping, **experts(3)),
    "experts by condition": lambda: Body(dense_experts, **experts()),
    "sorted rows": lambda: Body(sorted_rows, **layers()),
    "lengths": lambda: Body(lengths, **layers()),
}
UNWATCHED = {"sorted rows"}  # depends on values, but not the code


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_small_and_masked_network_agree_whatever_the_data_say(name: str, seed: int) -> None:
    model = randomise(NETWORKS[name](), seed)
    given = example(4, 6) if seed else -example(4, 6)
    many = [scale * torch.randn(n, 6, generator=torch.Generator().manual_seed(n + 10 * k), dtype=torch.float64)
            for k, scale in enumerate((1.0, 3.0, 0.1)) for n in (1, 4, 7)]  # fmt: skip
    shrunk = shrunk_and_judged(model, given, [given, -given, given.abs(), -given.abs(), *many])
    assert name in UNWATCHED or any("looks at values" in line for line in shrunk.plan.warnings)


@pytest.mark.parametrize("name", ["condition", "any", "early exit", "guard", "one of two layers", "experts by condition",
                                  "masked rows", "sorted rows"])  # fmt: skip
def test_both_answers_of_a_condition_are_followed_and_pruned(name: str) -> None:
    model = randomise(NETWORKS[name]())
    small = shrunk_and_judged(model, example(4, 6)).model
    assert small.a.out_features == 8 and small.c.in_features == 8


def test_what_a_numbers_code_cannot_reach_is_pruned() -> None:
    """Only what the deciding code has in its hands stays: layers inside the modules that it calls shrink."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.blocks(m.a(x))
        return m.c(y.flip(1) if x.mean().item() > 0 else y)

    inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    small = shrunk_and_judged(randomise(Body(forward, blocks=inner, **ends())), example(4, 6)).model
    assert small.blocks[0].out_features == 16 and small.a.out_features == 16


@pytest.mark.parametrize("name", ["top 1 by item", "condition", "rows"])
def test_shrink_says_what_depends_on_the_data(name: str, caplog) -> None:
    model = randomise(NETWORKS[name]())
    with caplog.at_level("WARNING"):
        shrink(model, example(4, 6))
    assert any("looks at values of its data" in record.getMessage() for record in caplog.records)


def test_a_model_that_cannot_run_on_zeros_is_analysed_on_its_values() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if float(y.abs().sum()) == 0:
            raise ValueError("nothing there")
        return m.c(m.b(y).relu())

    shrunk = shrunk_and_judged(randomise(Body(forward, **layers())), example(4, 6))
    assert parameters(shrunk.model) > 0


class Noise(nn.Module):
    """Spells its width out, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.ones(1, 16, 1, 1, dtype=x.dtype) if self.training else x


def only_in_training(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    if m.training:
        x = x * torch.ones(1, 16, 1, 1, dtype=x.dtype)
    return m.b(x)


class Trained(nn.Module):
    """Turns its channels around in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x.flip(1) if self.training else x)


class Ones(Trained):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.ones(1, 16, 1, 1, dtype=x.dtype) if self.training else x)


class Drops(Trained):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.0, self.training))


@pytest.mark.parametrize("build", [Trained, Ones, Drops, lambda: nn.Sequential(conv(3, 16), Noise(), conv(16, 4))])
def test_what_only_training_runs_follows_or_stays(build: Callable[[], nn.Module]) -> None:
    model, given = randomise(build()), example(2, 3, 4, 4)
    shrunk = shrunk_and_judged(model, given)
    model.train(), shrunk.model.train()
    from tests.structure.oracle import judged

    judged(model, shrunk, [given, example(3, 3, 4, 4)])


class Observer(nn.Module):
    """Follows the range of what it sees while it is trained, as quantisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.most = (self.most + x.exp().max()) / 2
        return x


def test_a_number_of_the_data_is_no_number_made_of_widths() -> None:
    """Whose change, since the small network is followed without its values, says nothing."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.seen(m.a(x).relu())
        return m.c(m.b(y).relu()) if not (x > 1e9).any() else y[..., :3]

    model = randomise(Body(forward, seen=Observer(), **layers()))
    with limited(20):
        plan = analyse(model, example(4, 6))
    assert not any("its number was" in line for line in plan.warnings)
    assert shrunk_and_judged(model, example(4, 6)).model.b.out_features == 8


def test_a_check_on_other_inputs_refuses_what_no_analysis_saw() -> None:
    """A number that reaches the code through a Python object: nobody can follow it, but the check tries other inputs."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if len(x) > 4:  # another batch size runs other code
                y = y.flip(1)
            return self.c(y.relu())

    with pytest.raises(SurgeryError, match="a batch twice as large"):
        shrink(randomise(Hidden()), example(4, 6))


def test_analysis_of_data_dependence_is_bounded() -> None:
    model = randomise(Body(skipping, **experts(12)))
    assert analyse(model, example(4, 6)).traces
