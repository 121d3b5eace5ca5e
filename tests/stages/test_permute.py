"""The permute stage: the same function in another order of channels, more magnitude kept, masks that move along."""

from __future__ import annotations

import copy
import csv
import io

import pytest
import torch

from prune_cli.errors import ConfigError
from prune_cli.granularities.n_m import NM, nm_mask
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.selection.granularity import Granularity
from prune_cli.stages.permute import TABLE, check, permute
from tests.session.tiny import begin

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
N_M = Granularity(NM(m=4), ratio=0.5)


@pytest.fixture
def state(tmp_path):
    torch.manual_seed(0)
    model = resnet_cifar(num_classes=4, in_shape=(3, 8, 8), depth=8, widths=(8, 8, 16))
    with torch.no_grad():
        model.train()(IMAGES)
    return begin(tmp_path, model=model.eval(), stage="permute")


def magnitude(model) -> float:
    """What 2:4 keeps of every convolution whose inputs come in fours."""
    kept = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels % 4 == 0:
            weight = module.weight.detach().abs()
            kept += float((weight * nm_mask(weight, 4, 2, 1)).sum())
    return kept


def test_the_function_stays_and_more_magnitude_is_kept(state):
    dense = copy.deepcopy(state.model)
    after = permute(state, granularity=N_M, window=8, escapes=2)
    with torch.no_grad():
        torch.testing.assert_close(after.model(IMAGES), dense(IMAGES), rtol=1e-4, atol=1e-5)
    assert magnitude(after.model) > magnitude(dense) * 1.01
    lines = list(csv.DictReader(io.StringIO(str(after.outcome.files[TABLE]))))
    assert lines and all(float(line["after"]) >= float(line["before"]) for line in lines)


def test_masks_move_with_their_weights(state):
    masks = {
        name: torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) > 0.3
        for name, parameter in state.model.named_parameters()
        if parameter.dim() == 4
    }
    for name, mask in masks.items():
        state.model.get_parameter(name).data *= mask
    after = permute(state.evolve(masks=masks), granularity=N_M, window=0, escapes=0)
    assert any(not torch.equal(after.masks[name], mask) for name, mask in masks.items())
    for name, mask in after.masks.items():
        assert not after.model.get_parameter(name)[~mask].any() and mask.sum() == masks[name].sum()


def test_a_shrunk_network_is_refused(state):
    with pytest.raises(ConfigError, match=r"prune makes the network smaller.*put permute before it"):
        check(state.evolve(shrunk_by="prune"), granularity=N_M)
