"""Teachers of a stage: their logits from a table or live, what decides between them, and stages that resume with them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prune_cli.data.fake import fake
from prune_cli.distillation.attention_transfer import attention_transfer
from prune_cli.distillation.distillation import Distillation, Term
from prune_cli.distillation.fitnet import FitNet
from prune_cli.distillation.lessons import Lesson
from prune_cli.distillation.losses import dkd, hinton
from prune_cli.distillation.objective import Objective
from prune_cli.errors import ConfigError
from prune_cli.files.weights import write_weights
from prune_cli.granularities.filter import Filter
from prune_cli.pipeline import loading
from prune_cli.pipeline.state import Outcome, State
from prune_cli.selection.granularity import Granularity
from prune_cli.session import teaching
from prune_cli.stages.finetune import finetune
from prune_cli.training.fit import Options
from tests.session.tiny import (
    ALWAYS,
    DATA,
    Cut,
    begin,
    cut_after,
    cut_at_step,
    journal,
    network,
    option,
    result,
    run,
    training,
)

AUGMENTED = fake((3, 8, 8), 4, train=40, test=16, val=8, crop_padding=1, flip=True)  # 18 views of 32 images
PLAIN = fake((3, 8, 8), 4, train=40, test=16, val=8, crop_padding=0)
SOFT = Distillation(hinton(), "dense")
HINTS = Distillation(FitNet, "dense", weight=0.5, features=("0", "3"))
SHRUNK = Granularity(Filter(), 0.5, shrink=True)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return beginning(tmp_path / "store" / "slot", data=AUGMENTED)


def beginning(place: Path, **changes) -> State:
    """The state of a stage that comes after a dense network, which was another one."""
    file = place.parent.parent / "dense.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_weights(network(5).state_dict(), file)
    return begin(place, dense=file, **changes)


def losses(state: State, option: Distillation, epochs: int = 2, fit: Options | None = None) -> tuple[list[float], bool]:
    """The loss of every batch of an epoch, and whether the teacher was looked up."""
    how = training() if fit is None else replace(training(), fit=fit)
    loss = teaching.objective(state, option, how, epochs)
    assert isinstance(loss, Objective)
    batches = loss.batches(state.data.train(16, 3))
    state.model.eval()
    with loss:
        found = [(loss(state.model, images, given).item(), given) for images, given in batches.epoch(1)]
    return [value for value, _ in found], any(isinstance(given, Lesson) for _, given in found)


@pytest.mark.parametrize(
    "data", [PLAIN, AUGMENTED, fake((3, 8, 8), 4, train=40, test=16, crop_padding=2, padding="reflect")]
)
@pytest.mark.parametrize("loss", [hinton(standardise=True), functools.partial(dkd, beta=2.0)], ids=["hinton", "dkd"])
def test_a_table_says_what_a_live_teacher_says(tmp_path: Path, data, loss) -> None:
    state = beginning(tmp_path / "store" / "slot", data=data)
    live, looked_up = losses(state, Distillation(loss, "dense", cache="live"))
    assert not looked_up
    kept, looked_up = losses(state, Distillation(loss, "dense", cache="store"))
    assert looked_up and kept == pytest.approx(live, rel=1e-5)
    again, _ = losses(state, Distillation(loss, "dense", cache="store"))
    assert again == kept
    assert len(list(state.slot.folder.parent.glob("*.logits"))) == 1


def test_rows_of_a_table_are_a_live_teachers(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, made = [], teaching.table
    monkeypatch.setattr(teaching, "table", lambda *a, **k: tables.append(made(*a, **k)) or tables[-1])
    losses(state, replace(SOFT, cache="store"))
    (found,) = tables
    teacher = network(5).eval()
    with torch.no_grad():
        for (images, _), rows in zip(AUGMENTED.train(16, 9).epoch(4), AUGMENTED.train(16, 9).rows(4), strict=True):
            torch.testing.assert_close(found[rows], teacher(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "cache", "epochs", "looked_up"),
    [
        (PLAIN, "auto", 1, True),  # one view: a single epoch is worth it
        (AUGMENTED, "auto", 17, False),
        (AUGMENTED, "auto", 18, True),
        (AUGMENTED, "auto", None, False),  # nobody knows how long
        (AUGMENTED.limit(1), "auto", 18, False),  # half of the images in each epoch
        (AUGMENTED.limit(1), "auto", 36, True),
        (AUGMENTED, "store", 1, True),
        (PLAIN, "live", 100, False),
    ],
)
def test_auto_takes_a_table_where_the_teacher_looks_at_no_more_images_for_it(tmp_path, data, cache, epochs, looked_up):
    state = beginning(tmp_path / "store" / "slot", data=data)
    assert losses(state, replace(SOFT, cache=cache), epochs)[1] == looked_up


def test_auto_takes_no_table_that_is_large(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "MOST_BYTES", 18 * 32 * 4 * 4 - 1)
    assert not losses(state, SOFT, 100)[1]


def test_features_are_live_and_so_is_a_teacher_that_runs_anyway(state: State) -> None:
    maps = Term(attention_transfer, "dense", features=("0",))
    assert not losses(state, Distillation(attention_transfer, "dense", features=("0",)), 100)[1]
    assert not losses(state, replace(SOFT, terms={"maps": maps}), 100)[1]
    assert not losses(state, replace(SOFT, cache="store", terms={"maps": maps}), 100)[1]
    other = state.slot.folder.parent.parent / "other.safetensors"
    write_weights(network(6).state_dict(), other)
    live = losses(state, replace(SOFT, cache="live", terms={"maps": replace(maps, teacher=other)}))[0]
    kept, looked_up = losses(state, replace(SOFT, cache="store", terms={"maps": replace(maps, teacher=other)}))
    assert looked_up and kept == pytest.approx(live, rel=1e-5), "one is looked up while the other runs"


def test_other_weights_other_images_and_other_arithmetic_are_other_tables(state: State, tmp_path: Path) -> None:
    def tables() -> int:
        return len(list(state.slot.folder.parent.glob("*.logits")))

    option = replace(SOFT, cache="store")
    losses(state, option)
    losses(state.evolve(stage="another", seed=4), option)
    assert tables() == 1
    losses(state, option, fit=Options(precision="bf16!"))
    assert tables() == 2
    losses(state.evolve(data=fake((3, 8, 8), 4, train=40, test=16, val=8, crop_padding=1)), option)
    assert tables() == 3
    write_weights(network(6).state_dict(), tmp_path / "dense.safetensors")
    losses(state, option)
    assert tables() == 4
    assert losses(state, option)[0] == pytest.approx(losses(state, replace(option, cache="live"))[0], rel=1e-5)


@pytest.mark.parametrize(
    ("option", "limits", "message"),
    [
        (replace(HINTS, cache="store"), {}, "this term compares features; give distillation.cache=auto"),
        (replace(SOFT, cache="store"), {"MOST_BYTES": 100}, "more than 0.0; give distillation.cache=live"),
        (
            replace(SOFT, cache="store"),
            {"listed": lambda state: None},
            "cannot be listed; give distillation.cache=live",
        ),
    ],
)
def test_a_table_that_cannot_be_is_refused_before_training(state, option, limits, message, monkeypatch) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(teaching, name, value)
    with pytest.raises(ConfigError, match=message):
        teaching.check(state, option)


# ---- stages that resume ------------------------------------------------------------------------------------------------


def tune(state: State, option: Distillation, seconds: float = ALWAYS) -> State:
    return finetune(state, epochs=3, training=training(seconds), distillation=option)


def test_looked_up_or_live_it_learns_the_same(tmp_path: Path) -> None:
    found = []
    for cache in ("live", "store"):
        after = tune(beginning(tmp_path / cache / "slot", data=PLAIN), replace(SOFT, cache=cache))
        found.append([row["loss"] for row in after.outcome.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_training_looks_up_the_right_rows_when_it_goes_on(tmp_path, monkeypatch, step) -> None:
    option = replace(SOFT, cache="store")
    wanted = result(tune(beginning(tmp_path / "calm" / "slot", data=AUGMENTED), option))
    with monkeypatch.context() as patch:
        cut_at_step(patch, step)
        with pytest.raises(Cut):
            tune(beginning(tmp_path / "hit" / "slot", data=AUGMENTED), option)
    assert result(tune(beginning(tmp_path / "hit" / "slot", data=AUGMENTED), option)) == wanted


@pytest.mark.parametrize(
    "name", ["iterative", "lottery_ticket", "backward", pytest.param("auto_compress", marks=pytest.mark.slow)]
)
def test_a_prune_stage_with_regressors_resumes_with_the_same_bytes(name, tmp_path, monkeypatch) -> None:
    """The teacher is the dense parent of the same run; auto_compress shrinks, which gives the regressors other sizes."""
    schedule = option("schedule", name)
    kept = SHRUNK if name == "auto_compress" else Granularity(Filter(), 0.5)

    def stage(place: Path) -> State:
        return run(beginning(tmp_path / place / "slot"), schedule, kept, seconds=ALWAYS, distillation=HINTS)

    wanted = result(stage("calm"))
    plain = result(run(beginning(tmp_path / "plain" / "slot"), schedule, kept, seconds=ALWAYS))
    assert wanted[0] != plain[0], "it learns from the teacher"
    answers = len(journal(tmp_path / "calm" / "slot").answers)
    cuts = [(cut_at_step, step) for step in (2, 7)] + [(cut_after, count) for count in range(3, answers, 3)]
    for number, (cut, moment) in enumerate(cuts):
        with monkeypatch.context() as patch:
            cut(patch, moment)
            with pytest.raises(Cut):
                stage(str(number))
        assert result(stage(str(number))) == wanted, (cut.__name__, moment)


def test_a_teacher_is_read_once_for_the_check_and_all_stages(tmp_path, monkeypatch) -> None:
    read, original = [], loading._read_teacher
    monkeypatch.setattr(loading, "_read_teacher", lambda *a, **k: read.append(1) or original(*a, **k))
    state = beginning(tmp_path / "store" / "slot", data=DATA)
    option = replace(
        SOFT, teacher=state.dense, terms={"hints": replace(Term(FitNet, features=("0",)), teacher=state.dense)}
    )
    teaching.check(state, option)
    tune(state.evolve(stage="first"), option)
    tune(state.evolve(stage="second", outcome=Outcome()), option)
    assert len(read) == 1
