"""SR-STE by its update rule, and as a stage of a run."""

from __future__ import annotations

import torch
from torch import nn

from prune_cli.granularities.n_m import nm_mask
from prune_cli.training.sr_ste import attach, detach


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)).double()


def test_one_step_is_the_update_of_the_paper():
    model, patterns, decay, rate = network(), {"0.weight": (4, 2), "3.weight": (8, 1)}, 0.3, 0.1
    dense = {name: model.get_parameter(name).detach().clone() for name in patterns}
    masks = {name: nm_mask(dense[name].abs(), *pattern) for name, pattern in patterns.items()}
    plain = network()
    for name, mask in masks.items():
        plain.get_parameter(name).data.mul_(mask)
    x = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    plain(x).square().sum().backward()
    attach(model, patterns, decay)
    assert torch.equal(model(x), plain(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model(x).square().sum().backward()
    optimizer.step()
    for name, mask in masks.items():
        module = model.get_submodule(name.split(".")[0])
        expected = dense[name] - rate * (plain.get_parameter(name).grad + decay * ~mask * dense[name])
        assert torch.allclose(module.parametrizations.weight.original, expected)


def test_detaching_leaves_plain_n_m_weights():
    model, patterns = network(), {"0.weight": (4, 2)}
    names = list(model.state_dict())
    attach(model, patterns, 2e-4)
    assert list(model.state_dict()) != names
    x = torch.randn(2, 8, 4, 4).double()
    before = model(x)
    masks = detach(model, patterns)
    assert sorted(model.state_dict()) == sorted(names) and type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert (masks["0.weight"].view(6, 2, 4, 3, 3).sum(2) == 2).all()


def test_decay_makes_masks_settle():
    changes = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        attach(model, {"0.weight": (4, 2)}, decay)
        x, y = torch.randn(256, 32).double(), torch.randn(256, 4).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        changed, before = 0, None
        for step in range(150):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            mask = model[0].weight.detach() != 0
            changed += int((mask != before).sum()) if before is not None and step > 20 else 0
            before = mask
        changes.append(changed)
    assert changes[1] < changes[0]


QUICK = (
    "recipe=quickstart",
    "granularity=n_m",
    "granularity.ratio=0.5",
    "latency=false",
    "device=cpu",
    "train.epochs=1",
)
