"""What flows between stages: seeds by purpose, checkpoints inside a stage, and that nothing is changed in place."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.pipeline.state import derive_seed
from prune_cli.training.distributed import World
from tests.session.tiny import begin


@given(st.integers(0, 2**62), st.lists(st.sampled_from(["train", "prune", "model"]), min_size=1, max_size=3))
def test_a_seed_depends_on_nothing_but_its_purpose(seed, purpose):
    found = derive_seed(seed, *purpose)
    assert 0 <= found < 2**63 and found == derive_seed(seed, *purpose)
    assert found != derive_seed(seed + 1, *purpose) and found != derive_seed(seed, *purpose, "again")


def test_stages_of_one_run_draw_from_different_seeds_and_their_order_does_not_matter(tmp_path):
    state = begin(tmp_path)
    seeds = {name: state.evolve(stage=name).stage_seed for name in ("train", "prune", "prune_2")}
    assert len(set(seeds.values())) == 3
    assert state.evolve(stage="prune").evolve(stage="train").stage_seed == seeds["train"]


def test_a_state_is_replaced_and_never_changed(tmp_path):
    state = begin(tmp_path)
    later = state.evolve(stage="finetune", masks={"0.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)})
    assert (state.stage, dict(state.masks)) == ("prune", {}) and later.model is state.model
    with pytest.raises(FrozenInstanceError):
        state.stage = "other"  # type: ignore[misc]


def test_a_checkpoint_inside_a_stage_comes_back_with_every_bit(tmp_path):
    state = begin(tmp_path)
    assert state.unfinished() is None
    tensors = {"weight": torch.randn(3, 2, dtype=torch.float64), "mask": torch.tensor([True, False])}
    state.keep({"weight": torch.zeros(1)}, {"epoch": 1})
    state.keep(tensors, {"epoch": 2, "loss": 0.1})
    found = state.unfinished()
    assert found is not None
    assert found[1] == {"epoch": 2, "loss": 0.1} and set(found[0]) == set(tensors)
    assert all(torch.equal(found[0][name], value) for name, value in tensors.items())


def test_only_rank_0_writes_checkpoints(tmp_path):
    class Second(World):
        def broadcast(self, value):
            return value

    state = replace(begin(tmp_path), world=Second(rank=1, size=2))
    state.keep({"weight": torch.zeros(1)}, {"epoch": 1})
    assert not list(tmp_path.rglob("*")) and begin(tmp_path).unfinished() is None


def test_the_example_is_one_black_image_of_the_dataset(tmp_path):
    state = begin(tmp_path)
    assert state.example_inputs().shape == (1, *state.data.shape) and not state.example_inputs().any()
