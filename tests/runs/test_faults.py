"""What a run survives: kill -9, signals, damaged files, two processes at once, folders that cannot be written."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

from tests.conftest import ROOT

QUICK = ("run", "recipe=quickstart", "limit_batches=2", "train.epochs=1", "finetune.epochs=1", "latency=false")

# Every kind of stage, each long enough to be hit: soft and hard pruning with training, distillation, shared weights.
KINDS = ("train", "prune", "finetune", "share")
LONG = (
    "run", "recipe=lenet_digits_irre", "model=lenet5", "deterministic=true", "device=cpu", "latency=false",
    f"stages=[{','.join(KINDS)}]", "distillation=hinton", "schedule.epochs=4", "schedule.retrain_epoch=3",
    "schedule.prune_freq=1", "train.epochs=4", "finetune.epochs=4", "finetune.fit.ema=0.99", "share.epochs=4",
    *(f"{stage}.fit.checkpoint_seconds=0" for stage in KINDS), *(f"{stage}.batch_size=64" for stage in KINDS),
)  # fmt: skip


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of every stage's weights, compressed too, and masks, from the manifests."""
    stages = [path for path in folder.iterdir() if path.is_dir()]
    return {
        f"{path.name}/{name}": checksum
        for path in stages
        for name, checksum in json.loads((path / "manifest.json").read_text())["files"].items()
        if name.endswith((".safetensors", ".compressed"))
    }


def folder_of(out: str) -> Path:
    return Path(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    """The checksums of a run that nothing happened to."""
    place = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "prune_cli", *LONG],
        cwd=place, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sums(place / folder_of(done.stdout))
    assert len(found) == 8
    return found


@pytest.mark.parametrize("step", [50, pytest.param(-1, marks=pytest.mark.slow)], ids=["training", "writing"])
def test_kill_nine_in_every_stage_then_the_same_command_ends_with_the_same_bytes(spawn, undisturbed, step):
    """One start after the other is killed, each in the stage after that in which the one before was."""
    for done, stage in enumerate([*KINDS, None]):
        process = spawn(*LONG, FAULT=f"{stage} {step} SIGKILL" if stage else "")
        out, err = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if stage else 0), err
        if done:
            assert step < 50 or f"{KINDS[done - 1]}: going on from epoch" in err, err
            assert len(re.findall(r"^[\d:]+ \w+: taken from the store", err, re.M)) == done - 1, (
                "what was finished before the kill must not be lost"
            )
    assert sums(folder_of(out)) == undisturbed


# Stages whose masks are learned on the way, each followed by training through what came out: stripes, N:M.
LEARNED = {
    "skeleton": (
        "run", "recipe=quickstart", "granularity=stripe", "stages=[skeleton,finetune]", "skeleton.epochs=12",
        "skeleton.alpha=0.01", "skeleton.threshold=0.5", "skeleton.optimizer.lr=0.05",
        "skeleton.fit.checkpoint_seconds=0",
    ),
    "sr_ste": (
        "run", "recipe=quickstart", "granularity=n_m", "granularity.ratio=0.5", "stages=[sr_ste,finetune]",
        "sr_ste.epochs=12", "sr_ste.fit.checkpoint_seconds=0",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sr_ste", "skeleton"])
def test_kill_nine_while_masks_are_learned_and_while_what_is_left_trains_on(spawn, tmp_path_factory, stage):
    command = (
        *LEARNED[stage], "finetune.epochs=8", "finetune.fit.checkpoint_seconds=0", "deterministic=true", "device=cpu",
        "latency=false", "threads=1",
    )  # fmt: skip
    place = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, "-m", "prune_cli", *command],
        cwd=place, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for killed in (stage, "finetune"):
        process = spawn(*command, FAULT=f"{killed} 50 SIGKILL")
        out, err = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, err
    assert f"{stage}: going on from epoch" in err
    out, err = spawn(*command).communicate(timeout=300)
    assert "finetune: going on from epoch" in err, err
    assert sums(folder_of(out)) == sums(place / folder_of(done.stdout))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_write_a_resumable_checkpoint_and_exit_with_75(spawn, undisturbed, workplace, number):
    slow = [text.replace("checkpoint_seconds=0", "checkpoint_seconds=999") for text in (*LONG, "stages=[train]")]
    process = spawn(*slow, FAULT=f"train 50 {number.name}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "the same command goes on there" in err.strip().splitlines()[-1]
    assert len(list(workplace.glob("outputs/store/*.partial/*/manifest.json"))) == 1
    again = spawn(*slow)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "going on from epoch" in err
    assert sums(folder_of(out)) == {name: value for name, value in undisturbed.items() if name.startswith("train/")}
    assert not list(workplace.glob("outputs/store/*.partial"))


@pytest.mark.thorough
def test_two_processes_one_computes_and_one_waits(spawn):
    first, second = spawn(*LONG), spawn(*LONG)
    outs = [process.communicate(timeout=300) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outs
    both = outs[0][1] + outs[1][1]
    assert both.count("train: starting") == both.count("prune: starting") == both.count("finetune: starting") == 1
    assert sums(folder_of(outs[0][0])) == sums(folder_of(outs[1][0]))


def test_evaluate_refuses_an_altered_checkpoint(prune):
    run = prune(*QUICK)
    weights = run.folder / "finetune/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = prune("evaluate", str(run.folder))
    assert result.code == 4
    assert "damaged" in result.err


@pytest.mark.parametrize("how", ["truncated", "altered", "other", "pickle", "empty"])
def test_bad_weights_are_refused_before_training(prune, workplace, how):
    from prune_cli.models.lenet import lenet5, lenet_300_100

    file = workplace / "weights.pt"
    torch.save(lenet5(num_classes=10, in_shape=(1, 8, 8)).state_dict(), file)
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    elif how == "other":
        torch.save(lenet_300_100(num_classes=10, in_shape=(1, 8, 8)).state_dict(), file)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        torch.save({"a": _Malicious(workplace / "touched")}, file)
    result = prune(*QUICK, f"model.weights={file}")
    assert result.code == 4, result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (workplace / "touched").exists()
    assert not list(workplace.glob("outputs/store/*"))


class _Malicious:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_output_folder_that_cannot_be_made(prune, workplace):
    (workplace / "outputs").write_text("a file where a folder should be")
    result = prune(*QUICK)
    assert result.code == 6, result.err
    assert len(result.err.strip().splitlines()) == 1, result.err


@pytest.mark.thorough
def test_a_full_disk_loses_nothing_that_was_finished(workplace):
    """A limit on file sizes stands in for the full disk: writes of weights fail, small files do not."""
    small = [*QUICK, "stages=[train]", "threads=1"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "prune_cli", *small]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert done.returncode == 6, done.stderr
    assert "write" in done.stderr.strip().splitlines()[-1]
    assert {path.name for path in workplace.glob("outputs/store/*") if path.is_dir()} <= {"runs"}


def test_not_finite_loss_stops_the_run_and_keeps_what_was_finished(prune):
    result = prune(*QUICK, "finetune.optimizer.lr=1e30", "finetune.epochs=3")
    assert result.code == 5, result.err
    assert "learning rate" in result.err.strip().splitlines()[-1]
    assert prune(*QUICK, "stages=[train,prune]").err.count("taken from the store") == 2


def test_a_sweep_goes_on_after_a_failed_job(prune, workplace):
    result = prune(
        "run", "-m", *QUICK[1:], "stages=[train,prune,finetune]", "finetune.optimizer.lr=1e30,0.01", "finetune.epochs=3"
    )
    assert result.code == 5
    (table,) = workplace.glob("outputs/multirun/*/results.csv")
    stages = pandas.read_csv(table).groupby("job").stage.apply(list)
    assert stages[0] == ["train", "prune"]
    assert stages[1] == ["train", "prune", "finetune"]


@pytest.mark.parametrize(("content", "message"), [({}, "no"), ({"a": 3}, "one class")])
def test_image_folders_without_images_or_with_one_class(prune, workplace, content, message):
    from PIL import Image

    root = workplace / "images"
    root.mkdir()
    for name, count in content.items():
        (root / name).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{index}.png")
    result = prune(*QUICK, "dataset=image_folder", f"dataset.root={root}")
    assert result.code == 3, result.err
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
