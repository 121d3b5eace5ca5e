"""The training loop: the same bits wherever it stops, masks that hold, errors that say what happened."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import TrainingError
from prune_cli.training import fit as loop
from prune_cli.training.fit import Options, fit
from prune_cli.training.lr_schedules import constant, cosine, multi_step, one_cycle

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
ADAM = functools.partial(torch.optim.AdamW, lr=0.01)
STEP = functools.partial(multi_step, milestones=[2])


class Blobs:
    """Four batches of eight points; a pure function of epoch and step."""

    def __len__(self) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, 4):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            x = torch.randn(8, 6, generator=generator)
            yield x, (x[:, 0] > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("factory", [SGD, ADAM])
@pytest.mark.parametrize("options", [Options(), Options(ema=0.9, accumulate=2), Options(select_on="val", clip=1.0)])
@pytest.mark.parametrize("stop_after", [1, 2, 4, 7])
def test_stopping_anywhere_and_resuming_gives_the_same_bits(factory, options, stop_after):
    def evaluate(model: nn.Module) -> float:
        model.eval()
        return model(torch.ones(1, 6))[0, 0].item()

    arguments = {"optimizer": factory, "lr_schedule": STEP, "epochs": 4, "options": options, "evaluate": evaluate}
    whole = network()
    torch.manual_seed(1)
    fit(whole, Blobs(), loss, **arguments)

    part = network()
    torch.manual_seed(1)
    saved = {}
    steps = iter(range(1, 100))

    def save(progress: loop.Progress) -> None:
        saved["tensors"] = {name: value.clone() for name, value in progress.tensors(part).items()}
        saved["numbers"] = progress.numbers()

    progress = fit(part, Blobs(), loss, **arguments, stop=lambda: next(steps) >= stop_after, save=save)
    assert not progress.done
    torch.manual_seed(999)
    fresh = network()
    progress = loop.restore_progress(fresh, factory, saved["tensors"], saved["numbers"])
    progress = fit(fresh, Blobs(), loss, **arguments, progress=progress)
    assert progress.done
    assert len(progress.history) == 4
    assert same(whole, fresh)


@pytest.mark.parametrize("factory", [SGD, ADAM])
def test_masks_hold_through_momentum_and_decay(factory):
    model = network()
    masks = {"0.weight": torch.rand(16, 6) > 0.5, "4.weight": torch.rand(1, 16) > 0.5}
    seen = []

    def tick(progress: loop.Progress, count: int, rate: float) -> None:
        parameters = dict(model.named_parameters())
        seen.append(
            all(bool((parameters[name][~mask.expand_as(parameters[name])] == 0).all()) for name, mask in masks.items())
        )

    # The first step starts from dense momentum, where masking gradients alone would leak.
    start = fit(model, Blobs(), loss, optimizer=factory, lr_schedule=constant, epochs=20, until=2)
    progress = fit(
        model, Blobs(), loss, optimizer=factory, lr_schedule=constant, epochs=20, masks=masks, progress=start, tick=tick
    )
    assert len(seen) == 18 * 4
    assert all(seen)
    weight = dict(model.named_parameters())["0.weight"]
    moment = progress.optimizer.state[weight]["momentum_buffer" if factory is SGD else "exp_avg"]
    assert bool((moment[~masks["0.weight"]] == 0).all())
    assert bool((weight[masks["0.weight"]] != 0).all())


def test_average_is_masked_and_replaces_the_weights():
    model, masks = network(), {"0.weight": torch.rand(16, 6) > 0.5}
    progress = fit(
        model, Blobs(), loss, optimizer=SGD, lr_schedule=constant, epochs=3, masks=masks, options=Options(ema=0.8)
    )
    assert torch.equal(model[0].weight, progress.average["0.weight"])
    assert bool((model[0].weight[~masks["0.weight"]] == 0).all())


def test_accumulation_equals_one_large_batch():
    class Halves(Blobs):
        def __len__(self) -> int:
            return 8

        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in super().epoch(epoch):
                yield x[:4], y[:4]
                yield x[4:], y[4:]

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def double_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x.double()), y)

    whole, halves = plain(), plain()
    fit(whole, Blobs(), double_loss, optimizer=SGD, lr_schedule=constant, epochs=2)
    fit(halves, Halves(), double_loss, optimizer=SGD, lr_schedule=constant, epochs=2, options=Options(accumulate=2))
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_not_finite_loss_names_epoch_step_and_rate():
    def bad(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = loss(model, x, y)
        bad.calls += 1
        return value * float("nan") if bad.calls == 6 else value

    bad.calls = 0
    with pytest.raises(TrainingError, match=r"nan in epoch 2, step 2, at learning rate 0\.1"):
        fit(network(), Blobs(), bad, optimizer=SGD, lr_schedule=constant, epochs=3)


def test_early_stopping_ends_after_the_patience():
    scores = iter([1.0, 2.0, 1.5, 1.5, 9.0])
    progress = fit(
        network(),
        Blobs(),
        loss,
        optimizer=SGD,
        lr_schedule=constant,
        epochs=10,
        options=Options(early_stop=2),
        evaluate=lambda model: next(scores),
    )
    assert (progress.epoch, progress.done, progress.best_epoch) == (4, True, 2)


def test_selection_keeps_the_best_epoch():
    scores, kept = iter([1.0, 5.0, 3.0]), {}

    def evaluate(model: nn.Module) -> float:
        score = next(scores)
        kept[score] = {name: value.clone() for name, value in model.state_dict().items()}
        return score

    model = network()
    fit(
        model, Blobs(), loss, optimizer=SGD, lr_schedule=constant, epochs=3, options=Options(select_on="val"),
        evaluate=evaluate,
    )  # fmt: skip
    assert all(torch.equal(value, kept[5.0][name]) for name, value in model.state_dict().items())


def test_learning_rates_by_hand():
    assert [multi_step(t, 10, milestones=[5, 0.8], gamma=0.1) for t in (0, 4.9, 5, 8)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10, floor=0.1) == pytest.approx(0.1)
    assert one_cycle(0, 10, start=0.04) == pytest.approx(0.04)
    assert one_cycle(3, 10, peak=0.3) == pytest.approx(1)
    assert one_cycle(10, 10, floor=1e-3) == pytest.approx(1e-3)
    assert 0 < constant(0, 10, warmup=2) < constant(1, 10, warmup=2) < constant(2, 10, warmup=2) == 1
