"""Terms by their formulas, written out by hand, and their limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.distillation.attention_transfer import attention_transfer
from prune_cli.distillation.distillation import Distillation, Outputs
from prune_cli.distillation.fitnet import FitNet
from prune_cli.distillation.losses import dkd, hinton, soft_targets, standardised
from prune_cli.distillation.objective import Objective, Taught
from prune_cli.distillation.relations import angles, distances, rkd, similarity
from prune_cli.errors import ConfigError

torch.manual_seed(0)
STUDENT, TEACHER, LABELS = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 3, 4, 0])


class Fixed(nn.Module):
    """A network that always says the same."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def mixed(
    student: torch.Tensor, teacher: torch.Tensor, smoothing: float = 0.0, **parameters: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of the whole loss of distillation=hinton."""
    option, learner = Distillation(hinton(**parameters)), Fixed(student)
    weight, ce_weight = option.weights
    loss = Objective(learner, [Taught(option.function, weight, Fixed(teacher), {})], ce_weight, smoothing)
    value = loss(learner, torch.zeros(6, 1), LABELS)
    value.backward()
    return value.detach(), learner.logits.grad


def test_hinton_by_hand():
    temperature, alpha = 3.0, 0.7
    p = (TEACHER / temperature).softmax(1)
    q = (STUDENT / temperature).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean() * temperature**2
    expected = alpha * soft + (1 - alpha) * F.cross_entropy(STUDENT, LABELS)
    assert mixed(STUDENT, TEACHER, temperature=temperature, alpha=alpha)[0].item() == pytest.approx(
        expected.item(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("temperature", "alpha", "smoothing"), [(4.0, 0.9, 0.0), (4.0, 0.9, 0.1), (3.0, 0.7, 0.1), (1.0, 1.0, 0.0)]
)
def test_hinton_is_the_formula_it_was_when_the_loss_mixed_the_labels_itself(temperature, alpha, smoothing):
    student, teacher = STUDENT.float(), TEACHER.float()
    leaf = student.clone().requires_grad_()
    hard = F.cross_entropy(leaf, LABELS, label_smoothing=smoothing)
    soft = F.kl_div(
        F.log_softmax(leaf.float() / temperature, dim=1), F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    before = alpha * temperature**2 * soft + (1 - alpha) * hard
    before.backward()
    value, gradient = mixed(student, teacher, smoothing, temperature=temperature, alpha=alpha)
    if temperature in (1.0, 4.0):  # a power of two: no rounding differs
        assert torch.equal(value, before.detach()) and torch.equal(gradient, leaf.grad)
    torch.testing.assert_close(value, before.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-6, atol=1e-7)


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient():
    value, gradient = mixed(TEACHER, TEACHER, temperature=20.0, alpha=1.0)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


def test_alpha_zero_is_cross_entropy_with_smoothing():
    expected = F.cross_entropy(STUDENT, LABELS, label_smoothing=0.1)
    assert mixed(STUDENT, TEACHER, 0.1, alpha=0.0)[0].item() == pytest.approx(expected.item())


def test_the_gradient_keeps_its_size_at_high_temperature():
    gradient = mixed(STUDENT, TEACHER, temperature=1e3, alpha=1.0)[1]
    difference = STUDENT - TEACHER
    centred = difference - difference.mean(1, keepdim=True)
    torch.testing.assert_close(gradient, centred / 5 / 6, rtol=2e-2, atol=2e-4)


def maps(seed: int, *channels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{n}": torch.randn(6, c, 4 // n, 3, generator=generator).double() for n, c in enumerate(channels, 1)}


def test_attention_transfer_by_hand():
    student, teacher = maps(1, 2, 3), maps(2, 5, 7)
    expected = 0.0
    for name in student:
        for image in range(6):
            vectors = []
            for activations in (student[name][image], teacher[name][image]):
                q = [
                    sum(float(a) ** 2 for a in activations[:, i, j])
                    for i in range(activations.shape[1])
                    for j in range(3)
                ]
                length = sum(value**2 for value in q) ** 0.5
                vectors.append([value / length for value in q])
            expected += sum((s - t) ** 2 for s, t in zip(*vectors, strict=True)) ** 0.5 / 6
    got = attention_transfer(Outputs(STUDENT, student), Outputs(TEACHER, teacher), LABELS)
    assert got.item() == pytest.approx(expected / 2, rel=1e-12)


def test_attention_does_not_see_scale_nor_channels_of_a_filter_set_to_zero():
    student = {"layer1": torch.cat([3 * maps(1, 2)["layer1"], torch.zeros(6, 4, 4, 3).double()], 1).requires_grad_()}
    value = attention_transfer(Outputs(STUDENT, student), Outputs(TEACHER, maps(1, 2)), LABELS)
    assert value.item() < 1e-12
    value.backward()
    assert student["layer1"].grad.isfinite().all(), "a student that is there already has a gradient, of zero"


def test_attention_with_other_exponent_and_norm():
    student, teacher = maps(1, 2)["layer1"], maps(2, 3)["layer1"]
    q = [a.abs().sum(1).flatten(1) for a in (student, teacher)]
    s, t = (value / value.square().sum(1, keepdim=True).sqrt() for value in q)
    got = attention_transfer(
        Outputs(STUDENT, {"a": student}), Outputs(TEACHER, {"a": teacher}), LABELS, power=1.0, norm=1.0
    )
    assert got.item() == pytest.approx(((s - t).abs().sum(1).mean() / 2).item(), rel=1e-12)


def test_fitnet_by_hand():
    student = {**maps(1, 2), "fc": STUDENT}
    teacher = {**maps(2, 5), "fc": torch.cat([TEACHER, TEACHER], 1)}
    term = FitNet(Outputs(STUDENT, student), Outputs(TEACHER, teacher))
    conv, linear = term.regressors
    assert conv.weight.shape == (5, 2, 1, 1) and linear.weight.shape == (10, 5)
    hint = torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], student["layer1"]) + conv.bias[:, None, None]
    expected = ((hint - teacher["layer1"]) ** 2).mean() + (
        (STUDENT @ linear.weight.T + linear.bias - teacher["fc"]) ** 2
    ).mean()
    got = term(Outputs(STUDENT, student), Outputs(TEACHER, teacher), LABELS)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    got.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())


@pytest.mark.parametrize("term", [attention_transfer, FitNet])
def test_features_that_cannot_be_compared_are_refused_by_name(term):
    def compare(own: dict[str, torch.Tensor], taught: dict[str, torch.Tensor]) -> None:
        outputs = Outputs(STUDENT, own), Outputs(TEACHER, taught)
        term(*outputs) if term is FitNet else term(*outputs, LABELS)

    with pytest.raises(ConfigError, match=r"'layer1' gives \(6, 2, 4, 3\) and its teacher's \(6, 2, 2, 3\)"):
        compare({"layer1": maps(1, 2)["layer1"]}, {"layer1": maps(1, 2)["layer1"][:, :, :2]})
    with pytest.raises(ConfigError, match="features=auto"):
        compare({}, {})


def logits(seed: int) -> Outputs:
    return Outputs(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).double())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_by_hand(temperature):
    student, teacher, expected = logits(1), logits(2), 0.0
    for image, label in enumerate(LABELS.tolist()):
        s, t = ((outputs.logits[image] / temperature).softmax(0).tolist() for outputs in (student, teacher))
        rest = [index for index in range(5) if index != label]
        binary = t[label] * math.log(t[label] / s[label]) + (1 - t[label]) * math.log((1 - t[label]) / (1 - s[label]))
        among = sum(t[i] / (1 - t[label]) * math.log((t[i] / (1 - t[label])) / (s[i] / (1 - s[label]))) for i in rest)
        expected += (0.7 * binary + 3 * among) / 6
    found = dkd(student, teacher, LABELS, temperature=temperature, alpha=0.7, beta=3.0)
    assert found.item() == pytest.approx(temperature**2 * expected, rel=1e-10)


def test_dkd_with_the_teachers_own_weights_is_soft_targets():
    """KL = TCKD + (1 - p_target of the teacher) NCKD, image by image (eq. 6)."""
    for image in range(6):
        student, teacher = (Outputs(logits(seed).logits[image : image + 1]) for seed in (1, 2))
        label = LABELS[image : image + 1]
        rest = 1 - float((teacher.logits / 3).softmax(1)[0, label])
        found = dkd(student, teacher, label, temperature=3.0, alpha=1.0, beta=rest)
        torch.testing.assert_close(found, soft_targets(student, teacher, label, temperature=3.0))


def test_standardised_logits_forget_shift_and_scale():
    value = standardised(logits(1).logits)
    torch.testing.assert_close(value.mean(1), torch.zeros(6).double())
    torch.testing.assert_close(value.std(1), torch.ones(6).double(), rtol=1e-6, atol=0)
    moved = Outputs(logits(1).logits * 7 + torch.arange(6.0)[:, None])
    for term in (soft_targets, dkd):
        assert term(moved, logits(1), LABELS, temperature=2.0, standardise=True) < 1e-10
        assert term(moved, logits(1), LABELS, temperature=2.0) > 0.1


def test_rkd_by_hand():
    student, teacher = maps(1, 2)["layer1"].mean((2, 3)), torch.randn(6, 9).double()
    expected = {"distance": 0.0, "angle": 0.0}

    def huber(x: float) -> float:
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    def far(v):
        table = [[math.dist(a, b) for b in v.tolist()] for a in v.tolist()]
        mean = sum(map(sum, table)) / 30
        return [[value / mean for value in row] for row in table]

    def cosine(v, i: int, j: int, k: int) -> float:
        one, other = v[i] - v[j], v[k] - v[j]
        return 0.0 if i == j or k == j else float(one @ other / (one.norm() * other.norm()))

    pairs = zip(itertools.chain(*far(student)), itertools.chain(*far(teacher)), strict=True)
    expected["distance"] = sum(huber(a - b) for a, b in pairs) / 36
    triples = [(i, j, k) for i in range(6) for j in range(6) for k in range(6)]
    expected["angle"] = sum(huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples) / 216
    found = rkd(Outputs(STUDENT, {"a": maps(1, 2)["layer1"]}), Outputs(TEACHER, {"a": teacher}), LABELS)
    assert found.item() == pytest.approx(25 * expected["distance"] + 50 * expected["angle"], rel=1e-10)


def test_relations_have_gradients_also_between_equal_images():
    same = torch.ones(4, 3).double().requires_grad_()
    term = rkd(Outputs(STUDENT, {"a": same}), Outputs(TEACHER, {"a": torch.randn(4, 5).double()}), LABELS)
    term.backward()
    assert term.isfinite() and same.grad.isfinite().all()
    assert not distances(same.detach()).any() and not angles(same.detach()).any()


def test_similarity_by_hand():
    student, teacher = maps(1, 2, 3), maps(2, 5, 7)
    expected = 0.0
    for name in student:
        tables = []
        for features in (student[name], teacher[name]):
            flat = features.flatten(1)
            rows = [[float(a @ b) for b in flat] for a in flat]
            tables.append([[v / math.hypot(*row) for v in row] for row in rows])
        expected += sum((t - s) ** 2 for a, b in zip(*tables, strict=True) for s, t in zip(a, b, strict=True)) / 36
    found = similarity(Outputs(STUDENT, student), Outputs(TEACHER, teacher), LABELS)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("term", [rkd, similarity])
def test_relations_do_not_see_scale_and_need_features(term):
    student = {"a": 3 * maps(1, 2)["layer1"]}
    assert term(Outputs(STUDENT, student), Outputs(TEACHER, {"a": maps(1, 2)["layer1"]}), LABELS) < 1e-12
    with pytest.raises(ConfigError, match="give features=auto"):
        term(Outputs(STUDENT), Outputs(TEACHER), LABELS)
