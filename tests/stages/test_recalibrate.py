"""The recalibrate stage: statistics of training images, weights untouched, refused where there is nothing to estimate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.errors import ConfigError
from prune_cli.stages.recalibrate import check, recalibrate
from tests.session.tiny import DATA, begin


def test_statistics_are_the_mean_over_batches_of_training_images(tmp_path):
    state = begin(tmp_path)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with torch.no_grad():
        images = torch.cat([batch[0] for batch in DATA.calibration(32, 16)])
        seen = state.model[0](images)
        expected = torch.stack([part.mean((0, 2, 3)) for part in seen.split(16)]).mean(0)
    after = recalibrate(state, images=32, batch_size=16).model.state_dict()
    torch.testing.assert_close(after["1.running_mean"], expected, rtol=1e-5, atol=1e-6)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)


def test_masked_weights_stay_masked(tmp_path):
    state = begin(tmp_path)
    mask = torch.arange(8) % 2 == 0
    state.model[0].weight.data[~mask] = 0
    after = recalibrate(
        state.evolve(masks={"0.weight": mask.view(-1, 1, 1, 1).expand(8, 3, 3, 3)}), images=16, batch_size=8
    )
    assert set(after.masks) == {"0.weight"} and not after.model[0].weight[~mask].any()


def test_a_network_without_statistics_is_refused(tmp_path):
    state = begin(tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(ConfigError, match="no batch norms with running statistics; leave the stage out"):
        check(state)
