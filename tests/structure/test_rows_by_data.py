"""Rows that data name, weights that are no layer's, modes and branches of torch: what shrinks, and what says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli.measure.cost import cost
from prune_cli.structure import reference, surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from prune_cli.structure.whole import whole
from tests.structure.networks import Body, conv, example, halve, parameters, randomise
from tests.structure.oracle import shrunk_and_judged

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def messages(how: str) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        message = F.relu(m.a(x))[EDGES[0]]
        empty = message.new_zeros(len(x), message.shape[1])
        places = EDGES[1][:, None].expand_as(message)
        if how == "index_add":
            total = torch.zeros(len(x), message.shape[1], dtype=x.dtype).index_add_(0, EDGES[1], message)
        elif how == "scatter":
            total = empty.scatter(0, places, message)
        elif how == "scatter_add":
            total = empty.scatter_add_(0, places, message)
        elif how == "index_copy":
            total = empty.index_copy(0, EDGES[1][:4], message[:4])
        else:
            total = empty.scatter_reduce(0, places, message, how, include_self=False)
        return m.b(total + m.c(x))

    return Body(forward, a=nn.Linear(5, 16), b=nn.Linear(16, 4), c=nn.Linear(5, 16))


@pytest.mark.parametrize("how", ["index_add", "index_copy", "scatter", "scatter_add", "sum", "mean", "amax"])
def test_messages_between_nodes_follow(how: str) -> None:
    small = halve(randomise(messages(how)), example(6, 5)).model
    assert small.a.out_features == small.c.out_features == 8 and small.b.in_features == 8


@pytest.mark.parametrize("how", ["expand", "repeat", "of the channels"])
def test_tokens_that_data_choose_follow(how: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if how == "of the channels":
            places = x.argsort(1)[:, :3]
        else:
            places = torch.tensor([[4, 0, 2]]).expand(len(x), 3).unsqueeze(-1)
            width = x.shape[-1]
            places = places.repeat(1, 1, width) if how == "repeat" else places.expand(-1, -1, width)
        return m.b(F.relu(x.gather(1, places)).mean(1))

    small = halve(randomise(Body(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 4))), example(2, 5, 6)).model
    assert small.a.out_features == small.b.in_features == 8


def test_rows_gathered_along_the_channels_stay() -> None:
    model = randomise(
        Body(lambda m, x: m.b(m.a(x).gather(1, torch.tensor([[0, 3, 1]]))), a=nn.Linear(6, 8), b=nn.Linear(3, 4))
    )
    plan = halve(model, example(1, 6)).plan
    assert [one.reason for one in whole(plan) if one.name == "a.weight"] == ["gather in the model needs all of them"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_lose_hidden_units(kind: type[nn.RNNBase], packed: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        if packed:
            y, _ = m.rnn(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True))
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        else:
            y, _ = m.rnn(x)
        return m.b(y.mean(1))

    rnn = kind(12, 16, 2, batch_first=True, bidirectional=True)
    small = halve(randomise(Body(forward, a=nn.Linear(6, 12), rnn=rnn, b=nn.Linear(32, 4))), example(2, 5, 6)).model
    assert small.rnn.input_size == 6 and small.rnn.hidden_size == 8 and small.b.in_features == 16


def test_bilinear_layers_lose_inputs_and_outputs() -> None:
    layers = {"a": nn.Linear(6, 12), "b": nn.Linear(6, 10), "mix": nn.Bilinear(12, 10, 16), "c": nn.Linear(16, 4)}
    model = randomise(Body(lambda m, x: m.c(F.relu(m.mix(m.a(x), m.b(x)))), **layers))
    small = halve(model, example(3, 6)).model.mix
    assert (small.in1_features, small.in2_features, small.out_features) == (6, 5, 8)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_grouped_mm"), reason="torch without grouped products")
def test_experts_in_one_tensor_lose_inner_channels() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
            self.up, self.down = nn.Parameter(torch.rand(3, 32, 16)), nn.Parameter(torch.rand(3, 16, 32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            ends = torch.tensor([2, 3, 8], dtype=torch.int32)
            y = torch._grouped_mm(x, self.up.transpose(1, 2), offs=ends)
            return self.head(torch._grouped_mm(F.silu(y), self.down.transpose(1, 2), offs=ends))

    model, inputs = randomise(Experts()).float(), example(8, 6).float()  # there is no product of doubles
    plan = analyse(model, inputs)
    shrunk = surgery.remove_units(model, plan, lowest_units(plan))
    assert shrunk.model.up.shape == (3, 16, 8) and shrunk.model.down.shape == (3, 8, 16)
    assert reference.difference(model, shrunk, inputs) < 1e-5
    assert shrunk.plan.count(shrunk.keep).params == parameters(shrunk.model)
    assert shrunk.plan.count(shrunk.keep).macs == cost(shrunk.model, inputs).macs


def test_a_forward_in_inference_mode_shrinks() -> None:
    @torch.inference_mode()
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.norm(m.a(x))))

    model = randomise(Body(forward, a=conv(3, 16), norm=nn.BatchNorm2d(16), b=conv(16, 4)))
    assert halve(model, example(1, 3, 4, 4)).model.a.out_channels == 8
    with torch.inference_mode():
        assert analyse(model, example(1, 3, 4, 4)).families


def test_weight_norm_over_a_whole_weight_shrinks() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = randomise(nn.Sequential(norm(nn.Linear(6, 16), dim=None), nn.ReLU(), nn.Linear(16, 4)))
    assert halve(model, example(2, 6)).model[0].weight.shape == (8, 6)


def test_torch_cond_is_an_if() -> None:
    def plain(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.cond(x.mean() > -1e9, lambda t: t.relu(), lambda t: 0.5 * t, (m.a(x),)))

    assert (
        halve(randomise(Body(plain, a=nn.Linear(6, 16), b=nn.Linear(16, 4))), example(2, 6)).model.a.out_features == 8
    )

    def routed(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.cond(x.mean() > 0, lambda t: m.a(t), lambda t: m.other(t), (x,)))  # the judge tries both

    layers = {"a": nn.Linear(6, 16), "other": nn.Linear(6, 16), "b": nn.Linear(16, 4)}
    small = shrunk_and_judged(randomise(Body(routed, **layers)), example(2, 6)).model  # both ways are followed
    assert small.a.out_features == small.other.out_features == small.b.in_features == 8


class Rotary(nn.Module):
    """What decoders of transformers have: a buffer that forward never reads, and a mask that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.v = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 20)
        self.register_buffer("inv_freq", torch.rand(1))
        self.register_buffer("original_inv_freq", torch.rand(1, 2))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        if mask is not None and bool(mask.all()):
            mask = None
        scores = torch.arange(ids.shape[1]).to(x.dtype) * self.inv_freq
        scores = scores if mask is None else scores + torch.where(mask.bool(), 0.0, -1e9).to(x.dtype)
        x = x + self.q(x).sigmoid() * self.v(x) * scores.softmax(-1)[..., None]
        return self.head(x + self.down(F.silu(self.up(x))))


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1]], [[1, 1, 1, 0]]])
def test_a_buffer_that_is_never_read_is_no_layer_that_did_not_run(mask: list[list[int]] | None) -> None:
    inputs = {"ids": torch.tensor([[3, 1, 4, 1]]), "mask": None if mask is None else torch.tensor(mask)}
    model = randomise(Rotary())
    shrunk = halve(model, inputs)
    assert all("looks at values" in line for line in shrunk.plan.warnings)
    assert shrunk.model.up.out_features == 12 and shrunk.model.embed.embedding_dim == 8
    assert parameters(shrunk.model) < 0.6 * parameters(model)


def test_every_reason_is_named_once_with_what_would_help() -> None:
    layers = {"a": nn.Linear(6, 12), "b": nn.Linear(12, 6), "c": nn.Linear(6, 16), "d": nn.Linear(16, 4)}
    model = randomise(Body(lambda m, x: m.d(F.relu(m.c(torch.linalg.qr(m.b(m.a(x)))[0]))), **layers))
    found = {one.name: one for one in whole(halve(model, example(7, 6)).plan)}
    assert set(found) == {"b.weight", "d.weight"}
    assert "linalg_qr in the model is unknown" in found["b.weight"].reason and "report" in found["b.weight"].help
    assert found["d.weight"].output and not found["b.weight"].output


def test_channels_that_are_mixed_with_each_other_are_one_unit_and_said_to_be() -> None:
    model = randomise(Body(lambda m, x: m.b(F.max_pool1d(m.a(x), 2)), a=nn.Linear(6, 16), b=nn.Linear(8, 4)))
    shrunk = halve(model, example(2, 5, 6))
    assert shrunk.model.a.out_features == 16
    assert [(one.name, one.channels) for one in whole(shrunk.plan)] == [("a.weight", 16), ("b.weight", 4)]


def test_a_part_of_a_concatenation_may_be_empty() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(F.relu(torch.cat([x[:, :0], x, x.new_zeros(len(x), 1, x.shape[2])], 1)))

    small = halve(randomise(Body(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 4))), example(2, 5, 6)).model
    assert small.a.out_features == 8


def test_a_layer_whose_weight_becomes_something_else_is_named_too() -> None:
    forward = lambda m, x: m.b(F.relu(F.linear(x, torch.linalg.qr(m.a.weight.t())[0].t())))  # noqa: E731
    plan = analyse(randomise(Body(forward, a=nn.Linear(16, 6), b=nn.Linear(6, 4))), example(2, 16))
    assert "linalg_qr in the model is unknown" in [one.reason for one in whole(plan, {"a.weight"})]
