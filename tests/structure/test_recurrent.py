"""Recurrent layers are followed by their first steps, whatever the length of the sequence."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from prune_cli.structure.follow import analyse
from tests.structure.networks import example, randomise
from tests.structure.oracle import Body, shrunk_and_judged

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


def network(kind: type[nn.RNNBase], batch_first: bool, directions: int) -> nn.Module:
    def forward(m: Body, x: Tensor) -> Tensor:
        y = m.rnn(m.a(x) if batch_first else m.a(x).transpose(0, 1))[0]
        return m.c(y.mean(1 if batch_first else 0).view(len(x), -1))

    rnn = kind(12, 8, batch_first=batch_first, bidirectional=directions == 2)
    return randomise(Body(forward, a=nn.Linear(6, 12), rnn=rnn, c=nn.Linear(8 * directions, 3)))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("batch_first", "directions"), [(True, 1), (False, 2)])
def test_long_sequences_cost_no_more_and_count_as_long_ones(
    kind: type[nn.RNNBase], batch_first: bool, directions: int
) -> None:
    model = network(kind, batch_first, directions)
    short, long = (analyse(model, example(2, steps, 6)) for steps in (3, 60))
    assert len(short.traces[0].steps) == len(long.traces[0].steps)
    rows = GATES[kind] * 8
    each = 6 * 12 + directions * rows * (12 + 8)  # per image and step, by hand
    assert long.count(long.everything()).macs == 2 * (60 * each + 8 * directions * 3)
    small = shrunk_and_judged(model, example(2, 60, 6)).model
    assert small.rnn.hidden_size == 4 and small.rnn.input_size == 6
