"""Hundreds of folders that were planted, damaged or forged, and dozens of kills: one line each, and the same bytes after all."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.foreign import CODE, fetched, planted, sign
from tests.runs.test_faults import folder_of, sums
from tests.runs.test_foreign import RUN
from tests.test_reading import ALIASES, MERGES

FILES = 400
KILLS = 60

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**6, 10**9, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "abc", "0-9999999", "../x",
    "/etc/passwd", "\x1b[31m", "é" * 3000, [], {}, [[]], [0] * 5000, {"a": 1}, ["M"], CODE, [CODE], {"a": {"b": [CODE]}},
)  # fmt: skip
TEXTS = (
    ALIASES,
    MERGES,
    "[" * 50_000,
    "{" * 50_000,
    "- " * 50_000,
    "a: !!python/object/apply:os.system [touch PWNED]",
    "\x00",
    "",
)


def _structured(path: Path, draw: random.Random) -> str:
    """Replaces one value somewhere in a JSON or YAML file by an odd one."""
    yaml_file = path.suffix == ".yaml"
    content = yaml.safe_load(path.read_text()) if yaml_file else json.loads(path.read_text())
    value = draw.choice(ODD)
    where, changed = draw.choice(list(planted(content, value, most=4)))
    path.write_text(yaml.safe_dump(changed) if yaml_file else json.dumps(changed))
    return f"{where}: {str(value)[:40]}"


def _bytes(path: Path, draw: random.Random) -> str:
    """Flips, cuts, repeats or overwrites bytes of any file."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content) or 1)
    how = draw.choice(["flip", "cut", "repeat", "junk", "text"])
    if how == "flip" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "repeat":
        content[place:place] = content[place : place + 50]
    elif how == "junk":
        content[place : place + 20] = draw.randbytes(20)
    else:
        content = bytearray(draw.choice(TEXTS).encode())
    path.write_bytes(content)
    return f"{how} at {place}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_planted_and_damaged_files_in_every_command(prune, workplace, monkeypatch, seed):
    """A quarter of `FILES`: each is read by `evaluate`, `export`, `run` with a teacher, `store` and `run` from the store."""
    draw, codes, slowest = random.Random(seed), Counter(), 0.0
    store = workplace / "store"
    monkeypatch.setenv("PRUNE_STORE", str(store))
    for number in range(FILES // 4):
        shutil.rmtree(workplace / "theirs", ignore_errors=True)
        run = fetched(draw.choice(["filter", "stripe", "element"]), workplace)
        stages = sorted(path.parent for path in run.glob("*/checkpoint.json"))
        stage = draw.choice(stages)
        files = [
            path for path in (*run.glob("config.yaml"), *run.glob("results.csv"), *stage.iterdir()) if path.is_file()
        ]
        path = draw.choice(files)
        structured = path.suffix in (".yaml", ".json") and draw.random() < 0.6
        what = (_structured if structured else _bytes)(path, draw)
        if draw.random() < 0.7:
            with contextlib.suppress(ValueError):  # the manifest itself is no JSON any more
                sign(stage)
        key = f"{number:032d}"
        shutil.copytree(stage, store / key)
        for command in (
            ("evaluate", str(run)), ("evaluate", str(stage)), ("export", str(stage), "--program", "net.pt2"), ("store",),
            ("store", "--gc", "--dry-run"),
            (*RUN, "stages=[finetune]", "distillation=hinton", f"distillation.teacher={stage}"),
        ):  # fmt: skip
            began = time.monotonic()
            result = prune(*command)
            slowest = max(slowest, time.monotonic() - began)
            said = f"{path.relative_to(workplace)}: {what}: {' '.join(command)}: {result.err}"
            assert "Traceback" not in result.err and "unexpected" not in result.err, said
            assert result.code in (0, 2, 3, 4, 7), said
            assert result.code == 0 or result.err.strip().splitlines()[-1].startswith("error: "), said
            assert "\x1b" not in result.err + result.out, said
            assert not (workplace / "PWNED").exists(), said
            codes[result.code] += 1
        shutil.rmtree(store / key, ignore_errors=True)
    assert slowest < 60
    sys.stderr.write(f"seed {seed}: {FILES // 4} files, exit codes {dict(codes)}, slowest command {slowest:.1f} s\n")


def _work(place: str, arguments: list[str]) -> None:
    """A command in a process of its own, its streams in files."""
    import torch

    from prune_cli.cli import dispatch

    torch.set_num_threads(1)
    os.chdir(place)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = dispatch(arguments)
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.slow
def test_kills_at_random_moments_end_with_the_same_bytes(tmp_path):
    """`KILLS` times kill -9 at any moment of a run that saves after every step, in the store's writes as well as between."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["prune_cli.pipeline.run", "prune_cli.pipeline.build", "prune_cli.commands.run", "sklearn.datasets"]
    )
    arguments = [
        *RUN[:2], "limit_batches=3", "latency=false", "device=cpu", "deterministic=true", "train.epochs=3", "finetune.epochs=2",
        "schedule=iterative", "train.fit.checkpoint_seconds=0", "prune.fit.checkpoint_seconds=0",
        "finetune.fit.checkpoint_seconds=0",
    ]  # fmt: skip

    def start(place: Path) -> Any:
        place.mkdir(exist_ok=True)
        process = context.Process(target=_work, args=(str(place), arguments))
        process.start()
        return process

    began = time.monotonic()
    first = start(tmp_path / "undisturbed")
    first.join()
    assert first.exitcode == 0, (tmp_path / "undisturbed/err").read_text()
    long = time.monotonic() - began
    wanted = sums(tmp_path / "undisturbed" / folder_of((tmp_path / "undisturbed/out").read_text()))
    draw, kills, ends, place = random.Random(0), 0, 0, tmp_path / "0"
    while kills < KILLS or place.exists():
        process = start(place)
        if kills < KILLS:
            process.join(draw.uniform(0, 0.9 * long))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join()
        if process.exitcode == -signal.SIGKILL:
            continue
        assert process.exitcode == 0, (place / "err").read_text()
        assert sums(place / folder_of((place / "out").read_text())) == wanted
        left = [
            path.name
            for path in (place / "outputs/store").iterdir()
            if path.name.startswith(".") or path.suffix == ".partial"
        ]
        assert not left
        ends += 1
        shutil.rmtree(place)
        place = tmp_path / str(ends)
    assert ends
    sys.stderr.write(
        f"{kills} kills, {ends} runs that ended with the bytes of the undisturbed one, which took {long:.1f} s\n"
    )
