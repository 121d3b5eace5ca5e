"""A disk that is full is one line and code 6, wherever it happens; `/dev/full` and limits stand in for one."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune_cli.errors import StorageError
from prune_cli.files import artifacts, exporting
from prune_cli.files.run_log import RunLog
from prune_cli.pipeline.store import Store
from tests.conftest import ROOT
from tests.foreign import fetched
from tests.runs.test_cli import QUICK

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@full
def test_a_log_on_a_full_disk_ends_in_one_line(capfd, monkeypatch):
    root, prune = logging.getLogger(), logging.getLogger("prune_cli")
    seen: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(prune, "level", logging.DEBUG)
    handler = RunLog(Path("/dev/full"))
    root.addHandler(handler)
    prune.addHandler(listener)
    try:
        for number in range(50):
            prune.info("line %d", number)
        assert handler not in root.handlers
    finally:
        root.removeHandler(handler)
        prune.removeHandler(listener)
        handler.close()
    assert [text for text in seen if not text.startswith("line")] == ["/dev/full ends here: No space left on device"]
    assert sum(text.startswith("line") for text in seen) == 50
    assert "Logging error" not in capfd.readouterr().err


@full
def test_a_run_whose_log_cannot_grow_ends_as_ever(prune, workplace, monkeypatch):
    monkeypatch.setattr(artifacts, "LOG", "/dev/full")
    result = prune("run", *QUICK)
    assert result.code == 0, result.err
    assert result.err.count("No space left on device") == 1
    assert "Traceback" not in result.err


class Full:
    """Fails every write to files below a folder from the given number on, as a full disk does."""

    def __init__(self, monkeypatch, folder: Path, after: int = 0) -> None:
        self.left = after
        write_bytes, write_text = Path.write_bytes, Path.write_text

        def check(path: Path) -> None:
            if path.resolve().is_relative_to(folder):
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(Path, "write_bytes", lambda path, content: (check(path), write_bytes(path, content)))
        monkeypatch.setattr(
            Path, "write_text", lambda path, text, **more: (check(path), write_text(path, text, **more))
        )


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8])
def test_a_full_store_is_one_line_and_the_next_run_ends_with_the_same_bytes(prune, workplace, monkeypatch, after):
    command = ("run", *QUICK, "stages=[train]", "deterministic=true")
    with monkeypatch.context() as patch:
        Full(patch, workplace / "outputs/store", after)
        failed = prune(*command)
    last = failed.err.strip().splitlines()[-1]
    assert (failed.code, "No space left on device" in last) == (6, True) or failed.code == 0, failed.err
    assert "Traceback" not in failed.err
    again = prune(*command)
    assert again.code == 0, again.err
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "other"))
    undisturbed = prune(*command)
    assert (again.folder / "train/weights.safetensors").read_bytes() == (
        undisturbed.folder / "train/weights.safetensors"
    ).read_bytes()


def test_a_note_that_cannot_be_written_does_not_fail_a_stored_result(workplace, monkeypatch, caplog):
    monkeypatch.setattr(
        artifacts, "write_json", lambda path, _: (_ for _ in ()).throw(StorageError(f"cannot write {path}"))
    )
    Store(workplace).note_code("m", "k", {})
    assert "does not remember" in caplog.text


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "program"])
def test_an_export_to_a_full_disk(prune, workplace, kind):
    """A limit on file sizes: what torch writes itself would end the process."""
    if kind == "onnx":
        for name in exporting.EXTRA:
            pytest.importorskip(name)
    run = fetched("filter", workplace)
    code = (
        "import resource, signal, sys; from prune_cli.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))\n"
        f"sys.argv = ['prune', 'export', {str(run)!r}, '--{kind}', 'file']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot write" in done.stderr
    assert not [path for path in workplace.iterdir() if "file" in path.name]


@full
def test_a_listing_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "prune_cli", "list"], stdout=sink, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_program_that_is_exported_is_loaded_from_what_is_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    assert exporting.to_program(model, (1, 2, 2), tmp_path / "net.pt2") <= exporting.TOLERANCE
    images = torch.rand(3, 1, 2, 2)
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(images), model(images))
