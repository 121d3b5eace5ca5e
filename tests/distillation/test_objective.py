"""The mixed loss while it trains a network: features, parameters of its own, several teachers, compiled, resumed."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.data.dataset import Loss
from prune_cli.distillation.attention_transfer import attention_transfer
from prune_cli.distillation.distillation import Distillation, Outputs, Term
from prune_cli.distillation.fitnet import FitNet
from prune_cli.distillation.losses import hinton
from prune_cli.distillation.objective import Objective, prepared
from prune_cli.errors import ConfigError
from prune_cli.training import fit as loop
from prune_cli.training.fit import Options, fit
from prune_cli.training.lr_schedules import cosine

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAM = functools.partial(torch.optim.AdamW, lr=0.01)
HINTS = Term(FitNet, "dense", weight=0.5, features=("0", "3"))
MAPS = Term(attention_transfer, "dense", weight=2.0, features={"0": "0"})


class Pictures:
    """Four batches of six pictures; a pure function of epoch and step."""

    def __len__(self) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, 4):
            images = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(100 * epoch + step))
            yield images, (images[:, 0].mean((1, 2)) > 0).long()


def network(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(width, width + 1, 3)]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(width + 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, 2)
    )


TEACHER = network(8, seed=5).eval().requires_grad_(False)


def objective(student: nn.Module, terms: dict[str, Term], ce_weight: float = 1.0, seed: int = 3) -> Objective:
    images = torch.zeros(2, 3, 6, 6)
    ready = [prepared(term, student, TEACHER, images, key=key, seed=seed) for key, term in terms.items()]
    return Objective(student, ready, ce_weight, 0.1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_whole_loss_by_hand():
    student = network(4).eval()
    images, labels = next(Pictures().epoch(0))
    loss = objective(student, {"hints": HINTS, "maps": MAPS, "soft": Term(hinton(alpha=0.3), "dense")}, ce_weight=0.7)
    with loss:
        value = loss(student, images, labels)
    own, taught = {}, {}
    for model, into in ((student, own), (TEACHER, taught)):
        into["0"] = model[0](images)
        into["3"] = model[3](F.relu(into["0"]))
    conv, second = loss.trained[0].regressors
    hints = F.mse_loss(conv(own["0"]), taught["0"]) + F.mse_loss(second(own["3"]), taught["3"])
    q = [F.normalize(features["0"].square().sum(1).flatten(1), dim=1) for features in (own, taught)]
    maps = (q[0] - q[1]).square().sum(1).sqrt().mean() / 2
    soft = 16 * F.kl_div((student(images) / 4).log_softmax(1), (TEACHER(images) / 4).softmax(1), reduction="batchmean")
    labelled = F.cross_entropy(student(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(value, 0.7 * labelled + 0.5 * hints + 2 * maps + 0.3 * soft)


def test_a_teacher_of_several_terms_runs_once_and_is_no_part_of_the_loss(monkeypatch):
    student, calls = network(4), []
    loss = objective(student, {"hints": HINTS, "maps": MAPS})
    monkeypatch.setattr(TEACHER, "forward", lambda images: calls.append(1) or nn.Sequential.forward(TEACHER, images))
    with loss:
        loss(student, *next(Pictures().epoch(0))).backward()
    assert len(calls) == 1
    assert {name for name, _ in loss.named_parameters()} == {
        f"trained.0.regressors.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    }
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_without_features_no_module_is_hooked():
    student = network(4)
    loss = objective(student, {"soft": Term(hinton(), "dense")}, ce_weight=0.1)
    with loss:
        assert not any(module._forward_hooks for model in (student, TEACHER) for module in model.modules())
    with objective(student, {"hints": HINTS}):
        hooked = [name for name, module in student.named_modules() if module._forward_hooks]
        assert hooked == ["0", "3"]
    assert not any(module._forward_hooks for model in (student, TEACHER) for module in model.modules())


def trained(student: nn.Module, loss: Loss, factory=SGD, **arguments) -> loop.Progress:
    return fit(student, Pictures(), loss, optimizer=factory, lr_schedule=cosine, epochs=3, **arguments)


@pytest.mark.parametrize("factory", [SGD, ADAM])
@pytest.mark.parametrize("options", [Options(), Options(ema=0.9, accumulate=2, clip=0.5), Options(select_on="val")])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_training_with_regressors_stops_anywhere_and_goes_on_with_the_same_bits(factory, options, stop_after):
    scores = {0: 1.0, 1: 3.0, 2: 2.0}

    def run(student: nn.Module, loss: Objective, **more) -> loop.Progress:
        done = more["progress"].epoch if more.get("progress") else 0
        epochs = iter(range(done, 3))
        return trained(student, loss, factory, options=options, evaluate=lambda model: scores[next(epochs)], **more)

    whole = network(4)
    whole_loss = objective(whole, {"hints": HINTS, "maps": MAPS})
    start = {name: value.clone() for name, value in whole_loss.state_dict().items()}
    torch.manual_seed(1)
    run(whole, whole_loss)
    assert all(not torch.equal(value, start[name]) for name, value in whole_loss.state_dict().items()), "they train"

    part, saved, steps = network(4), {}, iter(range(1, 100))

    def save(progress: loop.Progress) -> None:
        saved["tensors"] = {name: value.clone() for name, value in progress.tensors(part).items()}
        saved["numbers"] = progress.numbers()

    torch.manual_seed(1)
    progress = run(
        part, objective(part, {"hints": HINTS, "maps": MAPS}), stop=lambda: next(steps) >= stop_after, save=save
    )
    assert not progress.done
    fresh = network(4, seed=9)
    progress = loop.restore_progress(fresh, factory, saved["tensors"], saved["numbers"])
    again = progress.tensors(fresh)
    assert again.keys() == saved["tensors"].keys(), "what is restored can be written again before it trains on"
    assert all(torch.equal(again[name], value) for name, value in saved["tensors"].items())
    # Drawn otherwise, and after the generator was restored: neither matters.
    loss = objective(fresh, {"hints": HINTS, "maps": MAPS}, seed=77)
    run(fresh, loss, progress=progress)
    assert equal(whole, fresh) and equal(whole_loss, loss)
    assert whole.state_dict().keys() == network(4).state_dict().keys()


def test_the_regressors_are_those_of_the_optimizer_by_its_own_rule():
    """One step of SGD with weight decay and clipping of the joint gradient, by hand."""
    student = network(4)
    loss = objective(student, {"hints": HINTS})
    images, labels = next(Pictures().epoch(0))
    torch.manual_seed(1)
    student.train()
    with loss:
        loss(student, images, labels).backward()
    both = [*student.parameters(), *loss.parameters()]
    norm = torch.stack([parameter.grad.norm() for parameter in both]).norm()
    expected = [p.detach() - 0.05 * (p.grad * 0.1 / (norm + 1e-6) + 1e-3 * p.detach()) for p in both]
    nn.Module.zero_grad(student), nn.Module.zero_grad(loss)
    student[4].reset_running_stats()
    torch.manual_seed(1)

    class One(Pictures):
        def __len__(self) -> int:
            return 1

        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            yield images, labels

    factory = functools.partial(torch.optim.SGD, lr=0.05, weight_decay=1e-3)
    fit(student, One(), loss, optimizer=factory, lr_schedule=cosine, epochs=1, options=Options(clip=0.1))
    for parameter, value in zip(both, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_another_loss_takes_the_place_of_the_first_in_the_optimizer():
    student = network(4)
    progress = trained(student, objective(student, {"hints": HINTS}), until=1)
    second = objective(student, {"hints": HINTS}, seed=8)
    progress = trained(student, second, until=2, progress=progress)
    known = [parameter for group in progress.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in known} == {id(p) for p in [*student.parameters(), *second.parameters()]}
    assert len(known) == len(progress.optimizer.state) == len(list(student.parameters())) + 4
    assert len({group["lr"] for group in progress.optimizer.param_groups}) == 1, "they follow the schedule"
    progress = trained(student, lambda model, images, labels: F.cross_entropy(model(images), labels), progress=progress)
    assert len(progress.optimizer.state) == len(list(student.parameters()))
    assert not [name for name in progress.tensors(student) if name.startswith("loss")]


def test_autocast_compares_in_float32():
    student, seen = network(4), []

    def term(own: Outputs, taught: Outputs, labels: Tensor) -> Tensor:
        seen.extend(value.dtype for outputs in (own, taught) for value in (outputs.logits, *outputs.features.values()))
        return attention_transfer(own, taught, labels)

    loss = objective(student, {"hints": HINTS, "maps": Term(term, "dense", features=("0",))})
    progress = trained(student, loss, options=Options(precision="bf16"))
    assert set(seen) == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in loss.parameters())
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]


def test_compiled_training_sees_the_same_features(tmp_path):
    def plain(width: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 2))

    weights = []
    for compiled in (False, True):
        student = plain(4)
        loss = objective(student, {"hints": Term(FitNet, "dense", features=("0",)), "maps": MAPS})
        progress = trained(student, loss, until=1, options=Options(compile=compiled))
        # Hooks are put on anew for the second part: the compiled network must not write into the first's.
        progress = trained(student, loss, options=Options(compile=compiled), progress=progress)
        weights.append([*student.parameters(), *loss.parameters()])
    for eager, other in zip(*weights, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda student, teacher, labels: student.logits, r"d\.loss returns a tensor of \(2, 2\)"),
        (lambda student, teacher, labels: 0.0, r"d\.loss returns a float"),
        (lambda student, teacher: 0.0, r"d\.loss fails on two images: TypeError"),
        (lambda student, teacher, labels: student.features["x"].sum(), r"d\.loss fails on two images: KeyError"),
    ],
)
def test_a_term_of_the_users_own_is_tried_before_training(term, message):
    with pytest.raises(ConfigError, match=message):
        objective(network(4), {"d": Term(term, "dense")})


def test_preparing_leaves_the_generator_and_the_networks_alone():
    student = network(4).train()
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in student.state_dict().items()}
    first, second = (objective(student, {"hints": HINTS}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training and not TEACHER.training
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert equal(first, second), "drawn from the seed"


def test_weights_of_a_distillation():
    option = Distillation(hinton(alpha=0.8), "dense", weight=2.0, terms={"hints": HINTS, "off": Term()})
    assert option.weights == (1.6, pytest.approx(0.2))
    assert list(option.all_terms) == ["distillation", "distillation.terms.hints"]
    assert Distillation().all_terms == {}
