"""bf16 is taken where the CPU has instructions for it, and everywhere when it is insisted on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.training import precision
from prune_cli.training.fit import Options, fit
from prune_cli.training.lr_schedules import constant


class Batches:
    def __len__(self) -> int:
        return 1

    def size(self, step: int) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0):
        yield torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("asked", "able", "computed"),
    [
        ("float32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
        ("bf16!", False, torch.bfloat16),
    ],
)
def test_what_is_computed_in(asked, able, computed, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: able)
    seen = []

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), labels)

    fit(
        nn.Linear(3, 2),
        Batches(),
        loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_schedule=constant,
        epochs=1,
        options=Options(precision=asked),
    )
    assert seen == [computed]


@pytest.mark.parametrize(
    ("asked", "able", "warned"), [("bf16", False, True), ("bf16", True, False), ("bf16!", False, False)]
)
def test_a_run_says_in_one_line_that_it_takes_float32(prune, monkeypatch, asked, able, warned):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: able)
    result = prune(
        "run", "recipe=quickstart", "limit_batches=1", "device=cpu", "stages=[train]", f"train.fit.precision={asked}"
    )
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "bf16" in line]
    assert len(lines) == warned, result.err
    assert not warned or ("warning: train:" in lines[0] and "train.fit.precision=bf16! insists" in lines[0])


@pytest.mark.parametrize(
    ("text", "able"),
    [("Features\t: fp asimd bf16 i8mm\n", True), ("Features\t: fp asimd\n", False), ("flags: bf16x\n", False)],
)
def test_arm_cpus_say_it_in_their_features(text, able, monkeypatch):
    monkeypatch.setattr(precision.torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(precision.torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision.sys, "platform", "linux")
    monkeypatch.setattr(precision.Path, "read_text", lambda *_, **__: text)
    assert precision.cpu_has_bf16() is able
    monkeypatch.setattr(precision.torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert precision.cpu_has_bf16()
