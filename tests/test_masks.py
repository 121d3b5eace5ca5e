"""Masks: what they zero, how they join, what they count."""

from __future__ import annotations

import torch
from torch import nn

from prune_cli import masks as masking
from prune_cli.config.locations import options


def test_joined_masks_remove_what_either_removes():
    rows, columns = torch.tensor([[True], [False]]), torch.tensor([[True, False, True]])
    both = masking.joined({"a": rows, "b": rows}, {"a": columns, "c": columns})
    assert both["a"].tolist() == [[True, False, True], [False, False, False]]
    assert both["b"] is rows
    assert both["c"] is columns


def test_apply_and_count_with_broadcast_masks():
    model = nn.Linear(3, 2)
    masks = {"weight": torch.tensor([[True], [False]]), "bias": torch.tensor([True, False])}
    masking.apply(model, masks)
    assert model.weight[1].abs().sum() == 0
    assert (model.weight[0] != 0).all()
    assert masking.zeros(masks, model) == 4


def test_filters_pruned_after_weights_keep_the_zeros_of_the_weights(prune, workplace):
    own = options("stage")["prune"].read_text().replace("granularity: ${granularity}\n", "")
    (workplace / "recipes/stage").mkdir(parents=True)
    (workplace / "recipes/stage/fine.yaml").write_text(
        own.replace("defaults:\n", "defaults:\n  - /granularity@granularity: element\n")
    )
    folder = workplace / "recipes/recipe"
    folder.mkdir(parents=True)
    (folder / "twice.yaml").write_text(
        "# @package _global_\n# weights first, then filters\n"
        "defaults:\n  - /stage@fine: fine\n"
        "  - override /model: resnet20\n  - override /dataset: digits\n  - override /granularity: filter\n"
        "dataset: {channels: 3}\nstages: [fine, prune]\nthreads: 1\nlatency: false\n"
        "granularity: {ratio: 0.5}\nfine: {granularity: {ratio: 0.8}}\n"
    )
    result = prune("run", "recipe=twice")
    assert result.code == 0, result.err
    fine, small = result.rows.loc["fine"], result.rows.loc["prune"]
    assert fine.params > small.params
    assert fine.sparsity > 0.75
    assert small.sparsity > 0.6, "the zeros among the weights that stayed"
    assert small.params_nonzero < fine.params_nonzero
