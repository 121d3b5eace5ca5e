"""A layer is its rows times its columns, whatever its stride, padding and groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_cli.reconstruction import layers

IMAGES = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0))
KINDS = {
    "plain": (nn.Conv2d(4, 6, 3), IMAGES),
    "stride, dilation, bias": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), IMAGES),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False), IMAGES),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), IMAGES),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), IMAGES),
    "circular": (nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="circular", bias=False), IMAGES),
    "sequence": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), IMAGES.flatten(2)),
    "linear": (nn.Linear(8, 5), IMAGES),
    "linear without bias": (nn.Linear(8, 5, bias=False), IMAGES[:, 0, 0]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_is_its_rows_times_its_columns(name):
    module, inputs = KINDS[name]
    with torch.no_grad():
        made = layers.as_rows(module) @ layers.columns(module, inputs)
        torch.testing.assert_close(made, layers.outputs(module, module(inputs)))
    twin = copy.deepcopy(module)
    layers.set_rows(twin, 2 * layers.as_rows(module))
    torch.testing.assert_close(twin(inputs), 2 * module(inputs))
    mask = torch.rand_like(module.weight) < 0.5
    keep = layers.keep_rows(module, mask)
    assert int(keep.sum()) == int(mask.sum()) + (0 if module.bias is None else len(module.bias))


class Odd(nn.Module):
    """One layer runs twice, one never, two have one weight, one runs before another that was made earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.twice, self.never = (nn.Linear(4, 4) for _ in range(4))
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(self.late(self.twice(self.twice(self.early(x))))))


def test_layers_come_in_the_order_in_which_they_run_and_others_not_at_all():
    assert layers.in_order(Odd(), torch.zeros(2, 4)) == ["early.weight", "late.weight"]


def test_moments_are_of_one_networks_inputs_and_the_others_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Identity()).train()
    dense = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Identity())
    images = torch.randn(6, 4)
    rows = torch.tensor([3, 1])
    found = layers.measured(model, dense, "2.weight", lambda: [(part, part) for part in images.split(4)], rows)
    x = torch.cat([model[:2](images), torch.ones(6, 1)], 1).T
    y = dense[:3](images).T[rows]
    torch.testing.assert_close(found.gram[0], (x @ x.T).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross[0], (y @ x.T).double(), rtol=1e-5, atol=1e-5)
    assert model.training and not any(module._forward_hooks for module in (*model.modules(), *dense.modules()))
