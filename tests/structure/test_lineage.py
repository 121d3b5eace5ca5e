"""The lineage of a small network: rounds compose, it builds the network again, and what does not fit is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import reference
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.rebuild import rebuild
from prune_cli.structure.surgery import remove_units
from tests.structure.test_surgery import images, network, plan_and_keep


def test_two_rounds_compose_to_one_lineage() -> None:
    model = network().eval()
    first = remove_units(model, *plan_and_keep(model, 0.25, 1))
    second = remove_units(first.model, *plan_and_keep(first.model, 0.5, 2))
    lineage = second.lineage.after(first.lineage)
    again = rebuild(model, Lineage.from_dict(json.loads(json.dumps(lineage.to_dict()))))
    assert torch.equal(again(images()), second.model(images()))
    assert again.stem.out_channels == 3


def test_attention_scale_composes_over_rounds() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.att, self.b = (
                nn.Linear(3, 16),
                nn.MultiheadAttention(16, 2, batch_first=True),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x + self.att(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Attend().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64)
    lineage, now = Lineage(), model
    for seed in (1, 2):
        plan = analyse(now, x)
        keep = lowest_units(plan, np.random.default_rng(seed).random(plan.size), 0.5)
        shrunk = remove_units(now, plan, keep)
        assert reference.difference(now, shrunk, x) < 1e-12
        lineage, now = shrunk.lineage.after(lineage), shrunk.model
    assert torch.allclose(rebuild(model, lineage)(x), now(x), rtol=1e-12)
    assert now.att.embed_dim == 4 and now.att.head_dim == 2


def test_state_dict_of_the_small_network_loads_into_the_rebuilt_one() -> None:
    model = network().eval()
    shrunk = remove_units(model, *plan_and_keep(model))
    other = rebuild(network(seed=5).eval(), shrunk.lineage)
    other.load_state_dict(shrunk.model.state_dict())
    assert torch.equal(other(images()), shrunk.model(images()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kept": {"steam.weight": {"0": [1]}}}, "did you mean 'stem.weight'"),
        ({"kept": {"stem.weight": {"0": [3, 99]}}}, "do not fit its shape"),
        ({"kept": {"stem.weight": {"0": []}}}, "do not fit its shape"),
        ({"kept": {"stem.weight": {"0": [2, 1]}}}, "do not fit its shape"),
        ({"attributes": {"stem": {"out_chanels": 4}}}, "out_channels"),
        ({"attributes": {"stam": {"out_channels": 4}}}, "did you mean 'stem'"),
        ({"scales": {"stem.weight": [1.0]}}, "do not fit"),
    ],
)
def test_lineage_that_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    data = {"kept": {}, "attributes": {}, "scales": {}} | change
    with pytest.raises(SurgeryError, match=match):
        rebuild(network(), Lineage.from_dict(data))


def test_a_file_that_is_no_lineage_is_refused() -> None:
    with pytest.raises(SurgeryError, match="not a lineage"):
        Lineage.from_dict({"kept": [1, 2]})
