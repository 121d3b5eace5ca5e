"""The train stage: moments that it can remember, and training from scratch in the widths of a file."""

from __future__ import annotations

import pytest
import torch
import yaml

from prune_cli.errors import ConfigError
from prune_cli.measure import cost
from prune_cli.pipeline.loading import build_architecture
from prune_cli.stages.train import MOST, architecture, check, train
from tests.session.tiny import DATA, begin, training

VGG = {"_target_": "prune_cli.models.vgg.vgg", "depth": 11}
HALF = [32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"]


def vgg(place, **changes):
    found = build_architecture(VGG, DATA, "vgg11", 0)
    return begin(place, architecture=found, model=found.build(), stage="train", **changes)


@pytest.fixture
def widths(tmp_path):
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump({"cfg": HALF}))
    return f"cfg:{tmp_path / 'pruned.yaml'}"


def test_from_scratch_has_the_widths_of_the_file_and_fresh_weights_of_the_seed(tmp_path, widths):
    one, two = (architecture(vgg(tmp_path), widths).build() for _ in range(2))
    convolutions = [module.out_channels for module in one.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions == [width for width in HALF if width != "M"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = architecture(vgg(tmp_path).evolve(seed=1), widths).build()
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize(("budget", "epochs"), [("epochs", 2), ("compute", 2 * MOST)])
def test_equal_compute_trains_as_many_more_epochs_but_at_most_twice(tmp_path, widths, budget, epochs):
    state = vgg(tmp_path, masks={"gone": torch.ones(1, dtype=torch.bool)})
    dense = cost.cost(state.model, DATA.shape).macs
    after = train(state, epochs=2, training=training(), init=widths, init_budget=budget)
    assert dense > MOST * cost.cost(after.model, DATA.shape).macs
    assert after.outcome.epochs == epochs and not after.masks and after.lineage is None


def test_a_small_reduction_buys_few_epochs(tmp_path):
    widths = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 256, "M"]
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump({"cfg": widths}))
    state, init = vgg(tmp_path), f"cfg:{tmp_path / 'pruned.yaml'}"
    macs = [cost.cost(m, DATA.shape).macs for m in (state.model, architecture(state, init).build())]
    after = train(state, epochs=4, training=training(), init=init, init_budget="compute")
    assert after.outcome.epochs == round(4 * macs[0] / macs[1]) and 1 < macs[0] / macs[1] < MOST


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"remember": ("3ep",), "epochs": 2}, "3ep comes after the end of 2 epochs of 3 steps each"),
        ({"remember": ("9st",), "epochs": 2}, "9st comes after the end"),
        ({"init": "widths.yaml"}, "is not null or cfg:PATH"),
        ({"init_budget": "compute"}, "train.init_budget=compute is for train.init=cfg:PATH"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        check(vgg(tmp_path), **{"epochs": 2, "training": training(), **keys})


def test_later_stages_learn_what_will_be_remembered_and_that_scratch_is_whole(tmp_path, widths):
    state = vgg(tmp_path, shrunk_by="prune")
    assert set(check(state, epochs=2, training=training(), remember=(0, "6st")).remembered) == {"0", "6st"}
    assert check(state, epochs=2, training=training()).shrunk_by == "prune"
    assert check(state, epochs=2, training=training(), init=widths).shrunk_by is None
