"""Distillation losses by their formulas and limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs
from prune_cli.distillation.losses import hinton, none

torch.manual_seed(0)
STUDENT, TEACHER, LABELS = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 3, 4, 0])


def test_hinton_by_hand():
    temperature, alpha = 3.0, 0.7
    p = (TEACHER / temperature).softmax(1)
    q = (STUDENT / temperature).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean() * temperature**2
    expected = alpha * soft + (1 - alpha) * F.cross_entropy(STUDENT, LABELS)
    got = hinton(Outputs(STUDENT), Outputs(TEACHER), LABELS, 0.0, temperature=temperature, alpha=alpha)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient():
    student = TEACHER.clone().requires_grad_()
    value = hinton(Outputs(student), Outputs(TEACHER), LABELS, 0.0, temperature=20.0, alpha=1.0)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_alpha_zero_is_cross_entropy_with_smoothing():
    expected = none(Outputs(STUDENT), None, LABELS, 0.1)
    assert expected.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS, label_smoothing=0.1).item())
    got = hinton(Outputs(STUDENT), Outputs(TEACHER), LABELS, 0.1, alpha=0.0)
    assert got.item() == pytest.approx(expected.item())


def test_the_gradient_keeps_its_size_at_high_temperature():
    student = STUDENT.clone().requires_grad_()
    hinton(Outputs(student), Outputs(TEACHER), LABELS, 0.0, temperature=1e3, alpha=1.0).backward()
    difference = STUDENT - TEACHER
    centred = difference - difference.mean(1, keepdim=True)
    torch.testing.assert_close(student.grad, centred / 5 / 6, rtol=2e-2, atol=2e-4)
