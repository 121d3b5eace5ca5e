"""Nothing that a folder from elsewhere says is run, and what is wrong with it is one line, in every command."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prune_cli.hashing import file_sha256
from tests.foreign import CODE, edit_json, edit_yaml, fetched, planted, sign
from tests.test_reading import ALIASES

RUN = (
    "run", "recipe=quickstart", "model.widths=[4,8,24]", "limit_batches=1", "latency=false", "device=cpu",
    "train.epochs=1", "finetune.epochs=1",
)  # fmt: skip


def commands(run: Path, stage: Path) -> Iterator[tuple[str, ...]]:
    """Everything that reads a run folder or a stage folder."""
    for path in dict.fromkeys((run, stage)):
        yield "evaluate", str(path)
        yield "export", str(path), "--program", "net.pt2"
    yield *RUN, "stages=[finetune]", "distillation=hinton", f"distillation.teacher={stage}"


def refused(result: Any, codes: tuple[int, ...] = (4,)) -> None:
    """One line of an error, and a code of its own."""
    lines = [
        line for line in result.err.strip().splitlines() if not line[:2].isdigit()
    ]  # those of the log begin with a time
    assert result.code in codes, result.err
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1500, result.err


# ------------------------------------------------------------------------------------------------- planted code


def _forged_config(run: Path, thorough: bool) -> Iterator[tuple[str, Any]]:
    content = yaml.safe_load((run / "config.yaml").read_text())
    for group in ("dataset", "model"):
        for where, node in planted(content[group], CODE, thorough=thorough):
            yield f"{group}/{where}", content | {group: node}
        for given in (CODE, [CODE], {"a": CODE}, CODE | {"_partial_": True}):
            yield group, content | {group: given}
    yield "elsewhere", {key: value if key in ("dataset", "model") else CODE for key, value in content.items()}


def _forged(run: Path, stage: Path, name: str, thorough: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is planted in a file, each with a function that writes it."""
    if name == "config.yaml":
        for where, content in _forged_config(run, thorough):
            yield where, lambda content=content: edit_yaml(run / name, lambda _: content)
    elif name == "checkpoint.json":
        content = json.loads((stage / name).read_text())
        for where, forged in planted(content, CODE, most=1, thorough=thorough):
            yield where, lambda forged=forged: edit_json(stage / name, lambda _: forged)
        for where, node in planted(content["model"], CODE, thorough=thorough):
            yield f"model/{where}", lambda node=node: edit_json(stage / name, lambda old: old | {"model": node})
    elif name == "pruned.yaml":
        content = yaml.safe_load((stage / name).read_text())
        for where, forged in planted(content, CODE, most=1, thorough=thorough):
            yield where, lambda forged=forged: edit_yaml(stage / name, lambda _: forged)
        for where, node in planted(content["model"], CODE, thorough=thorough):
            yield f"model/{where}", lambda node=node: edit_yaml(stage / name, lambda old: old | {"model": node})
    else:
        for where, forged in planted(json.loads((stage / name).read_text()), CODE, thorough=thorough):
            yield where, lambda forged=forged: (stage / name).write_text(json.dumps(forged))


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint.json", "pruned.yaml", "manifest.json", "choices.json"])
@pytest.mark.parametrize(
    ("command", "thorough"),
    [("evaluate", False), *(pytest.param(command, True, marks=pytest.mark.slow) for command in ("evaluate", "export"))],
)
def test_code_that_is_planted_anywhere_never_runs(prune, workplace, name, command, thorough):
    run = fetched("filter", workplace)
    stage = run / "finetune"
    place = run if name in ("config.yaml", "choices.json") else stage
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    count = 0
    for where, write in list(_forged(run, place, name, thorough)):
        write()
        if name != "manifest.json":
            sign(stage)
        result = prune(
            command, str(run if place is run else stage), *(["--program", "net.pt2"] if command == "export" else [])
        )
        assert not (workplace / "PWNED").exists(), where
        assert result.code in (0, 2, 4), (where, result.err)
        assert "Traceback" not in result.err, (where, result.err)
        for path, content in before.items():
            path.write_bytes(content)
        count += 1
    assert count


@pytest.mark.parametrize(
    "dataset",
    [
        {"_target_": "prune_cli.data.arrays.replace", "x": [CODE]},
        {"_target_": "prune_cli.data.arrays.from_arrays", "name": CODE},
        {"_target_": "prune_cli.data.lazy.DataLoader", "dataset": [CODE]},
        {"_target_": "prune_cli.data.files.scan", "folder": "."},
        {"_target_": "prune_cli.data.cifar.fetch", "layout": {}, "root": "."},
        {"_target_": "prune_cli.data.cifar_pickle.io.open", "file": "PWNED", "mode": "w"},
        {"_target_": "prune_cli.data.digits.digits", "mean": [[CODE]]},
        {"_target_": "prune_cli.data.digits.digits", "mean": {"a": {"b": [CODE]}}},
        {"_target_": "prune_cli.data.digits.digits", "_partial_": True},
        {"_target_": "prune_cli.data._private.digits"},
        {"_target_": "prune_cli.__main__.main"},
        {"_target_": ["prune_cli.data.digits.digits"]},
        [CODE], "digits", 3, None,
    ],
    ids=lambda node: str(node)[:60],
)  # fmt: skip
def test_a_dataset_from_elsewhere_is_one_of_ours_with_plain_arguments(prune, workplace, dataset):
    run = fetched("filter", workplace)
    edit_yaml(run / "config.yaml", lambda content: content | {"dataset": dataset})
    for overrides in ((), ("split=val",)):
        refused(prune("evaluate", str(run), *overrides))
    assert not (workplace / "PWNED").exists()


@pytest.mark.parametrize("place", ["pruned.yaml", "checkpoint.json"])
def test_a_teacher_from_elsewhere_runs_nothing(prune, workplace, place):
    run = fetched("filter", workplace)
    stage = run / "finetune"
    node = {"_target_": "prune_cli.models.lenet.lenet5", "widths": [4, 8, {"a": [CODE]}]}
    if place == "checkpoint.json":
        edit_json(stage / place, lambda content: content | {"model": node})
    else:
        edit_yaml(stage / place, lambda content: content | {"attributes": {"conv1": {"out_channels": CODE}}})
    sign(stage)
    for command in commands(stage, stage):
        refused(prune(*command))
    assert not (workplace / "PWNED").exists()


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"prune_ratio": {"fc1.weight": CODE}}, "granularity.ratio_file={}"),
        ({"prune_ratio": CODE}, "granularity.ratio_file={}"),
        ({"prune_ratio": {"fc1.weight": [CODE]}}, "granularity.ratio_file={}"),
        ({"cfg": [4, CODE]}, "train.init=cfg:{}"),
        ({"cfg": [{"a": [CODE]}]}, "train.init=cfg:{}"),
        ({"cfg": [4], "projection": CODE}, "train.init=cfg:{}"),
    ],
    ids=str,
)
def test_ratio_files_and_widths_run_nothing(prune, workplace, content, key):
    (workplace / "theirs.yaml").write_text(yaml.safe_dump(content))
    model = ("model=vgg16",) if "init" in key else ()
    refused(
        prune(*RUN[:2], *model, "limit_batches=1", "latency=false", "train.epochs=1", key.format("theirs.yaml")), (2, 4)
    )
    assert not (workplace / "PWNED").exists()


def test_a_stored_result_with_planted_code_is_computed_again(prune, workplace):
    command = (*RUN[:2], "limit_batches=1", "train.epochs=1", "latency=false", "stages=[train]")
    first = prune(*command)
    (entry,) = [path for path in (workplace / "outputs/store").iterdir() if (path / "checkpoint.json").is_file()]
    edit_json(entry / "checkpoint.json", lambda content: content | {"forms": {"fc1.weight": {"format": CODE}}})
    sign(entry)
    again = prune(*command)
    assert again.code == 0 and "will be computed again" in again.err
    assert (first.folder / "train/weights.safetensors").read_bytes() == (
        again.folder / "train/weights.safetensors"
    ).read_bytes()
    assert not (workplace / "PWNED").exists()


# --------------------------------------------------------------------------------------------- bombs and damage

NESTED = "[" * 100_000
HUGE = {
    "pruned.yaml: an unknown key of aliases": ("pruned.yaml", lambda text: text + f"zzz:\n{_indented(ALIASES)}"),
    "pruned.yaml: ten million indices, often": (
        "pruned.yaml",
        lambda text: text.replace("kept:", "kept:\n" + "- axes: [conv1.weight 0]\n  indices: 0-9999999\n" * 40),
    ),
    "pruned.yaml: nested": ("pruned.yaml", lambda text: text + f"zzz: {NESTED}"),
    "pruned.yaml: widths of the dense network (alone)": ("pruned.yaml", lambda text: text.replace("[4, 8, 24]", "[200000, 200000, 9]")),
    "pruned.yaml: classes (alone)": ("pruned.yaml", lambda text: text.replace("num_classes: 10", "num_classes: 16000000")),
    "pruned.yaml: shape": ("pruned.yaml", lambda text: text.replace("in_shape: [1, 8, 8]", "in_shape: [1, 60000, 60000]")),
    "pruned.yaml: no shape": ("pruned.yaml", lambda text: text.replace("in_shape: [1, 8, 8]", "in_shape: abc")),
    "pruned.yaml: groups": ("pruned.yaml", lambda text: text.replace("out_channels: 3}", "out_channels: 3, groups: 0}")),
    "pruned.yaml: a large attribute": (
        "pruned.yaml",
        lambda text: text.replace("out_channels: 3}", "out_channels: 3, stride: [1000000000, 1]}"),
    ),
    "pruned.yaml: a depth (alone)": (
        "pruned.yaml",
        lambda text: text.replace("lenet.lenet5", "resnet_cifar.resnet_cifar").replace("widths: [4, 8, 24]", "depth: 1000000002"),
    ),
    "checkpoint.json: widths": ("checkpoint.json", lambda text: text.replace("4,\n   8,\n   24", "200000, 200000, 24")),
    "checkpoint.json: nested": ("checkpoint.json", lambda text: NESTED),
    "checkpoint.json: shape": ("checkpoint.json", lambda text: text.replace('"in_shape": [\n  1', '"in_shape": [\n  1000000000')),
    "checkpoint.json: classes": ("checkpoint.json", lambda text: text.replace('"num_classes": 10', '"num_classes": 1e30')),
    "manifest.json: nested": ("manifest.json", lambda text: NESTED),
}  # fmt: skip


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize("what", HUGE)
def test_bombs_of_a_stage_are_refused_in_every_command(prune, workplace, what):
    stage = fetched("filter", workplace) / "finetune"
    name, change = HUGE[what]
    before = (stage / name).read_text()
    (stage / name).write_text(change(before))
    assert (stage / name).read_text() != before, "nothing was changed"
    if name != "manifest.json":
        sign(stage)
    alone = what.endswith("(alone)")  # a folder of save_pruned: else checkpoint.json says what the dense network is
    if alone:
        (stage / "checkpoint.json").unlink()
    for command in commands(stage, stage):
        unread = alone and (
            command[0] == "run" or (command[0] == "evaluate" and "classes" in what)
        )  # the data say those
        if not unread:
            refused(prune(*command))


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", 100_000), ("mean", ALIASES), ("zzz", ALIASES), ("val", NESTED), ("image_size", "1e300")],
    ids=lambda value: str(value)[:12],
)
def test_bombs_of_a_dataset_from_elsewhere_are_refused(prune, workplace, key, value):
    run = fetched("filter", workplace)
    text = (run / "config.yaml").read_text()
    line = f"  {key}: {value}\n" if value is not ALIASES else f"  {key}:\n" + _indented(_indented(ALIASES))
    kept = [old for old in text.splitlines(keepends=True) if not old.startswith(f"  {key}:")]
    kept.insert(kept.index("dataset:\n") + 1, line)
    (run / "config.yaml").write_text("".join(kept))
    refused(prune("evaluate", str(run)))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "binary": lambda content: bytes(range(256)),
    "latin-1": lambda content: content + "# café".encode("latin-1"),
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"3",
    "nested": lambda content: b"[" * 50_000,
    "no keys": lambda content: b"{}",
    "a Python object": lambda content: b"a: !!python/object/apply:os.system [touch PWNED]",
    "another key": lambda content: b'{"a": {"b": [1]}}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "checkpoint.json", "pruned.yaml", "manifest.json", "results.csv"])
def test_damage_is_one_line_in_every_command(prune, workplace, name, damage):
    run = fetched("filter", workplace)
    stage = run / "finetune"
    path = run / name if (run / name).is_file() else stage / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for sealed in (False, True):
        if sealed and name not in ("checkpoint.json", "pruned.yaml"):
            continue
        if sealed:
            sign(stage)
        for command in ("evaluate", str(run)), ("export", str(run), "--program", "net.pt2"):
            result = prune(*command)
            if result.code == 0:  # a list of stages is not needed where the last one is found without it
                assert name in ("results.csv", "config.yaml") and "Traceback" not in result.err
            else:
                refused(result, (2, 4))
    assert not (workplace / "PWNED").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_of_the_store_is_named_beside_the_others(prune, workplace, damage):
    store = workplace / "outputs/store"
    for key, run in (("a" * 32, "filter"), ("b" * 32, "stripe")):
        shutil.copytree(fetched(run, workplace) / "finetune", store / key)
        shutil.rmtree(workplace / "theirs")
    (store / ("a" * 32) / "checkpoint.json").write_bytes(DAMAGES[damage](b'{"a": 1}'))
    result = prune("store")
    assert "b" * 32 in result.out and "2 stages" in result.out
    refused(result)
    assert "a" * 32 in result.err
    assert prune("store", "--gc", "--dry-run").code == 0


@pytest.mark.parametrize(
    "damage", [*sorted(DAMAGES.keys() - {"empty", "no keys", "another key", "cut"}), "aliases", "a pipe"]
)
def test_one_bad_recipe_hides_no_other(prune, workplace, damage):
    folder = workplace / "recipes/recipe"
    folder.mkdir(parents=True)
    bad = folder / "bad.yaml"
    if damage == "a pipe":
        import os

        os.mkfifo(bad)
    else:
        good = b"# @package _global_\n# mine\ndefaults:\n  - quickstart\n"
        bad.write_bytes(ALIASES.encode() if damage == "aliases" else DAMAGES[damage](good))
    listed = prune("list", "recipe")
    assert "quickstart" in listed.out and "bad" in listed.out
    assert listed.code in (0, 2) and "Traceback" not in listed.err
    for command in ("run", "show"):
        result = prune(command, "recipe=bad")
        assert result.code == 2, result.err
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (workplace / "PWNED").exists()


def test_a_network_within_bounds_is_still_read(prune, workplace):
    run = fetched("filter", workplace)
    sign(run / "finetune")
    assert prune("evaluate", str(run)).code == 0
    wide = copy.deepcopy(yaml.safe_load((run / "finetune/pruned.yaml").read_text()))
    assert wide["sha256"]["weights.safetensors"] == file_sha256(run / "finetune/weights.safetensors")


@pytest.mark.parametrize(
    "content", [bytes(1000), b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."], ids=["zeros", "zip", "dict"]
)
def test_files_that_hold_no_weights_say_so_without_advice(prune, workplace, content):
    (workplace / "zeros.pt").write_bytes(content)
    result = prune("evaluate", "zeros.pt", "model=lenet5", "dataset=digits")
    refused(result)
    assert "weights_only" not in result.err


def test_a_device_is_no_file(prune, workplace):
    result = prune("evaluate", "/dev/zero", "model=lenet5", "dataset=digits")
    refused(result)
    assert "neither a file nor a folder" in result.err
