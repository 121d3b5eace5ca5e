"""`prune export RUN_OR_STAGE`: an ONNX file and a `torch.export` program, compared with the network they came from."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from prune_cli.errors import CheckpointError, ConfigError

HELP = """usage: prune export PATH [--onnx FILE] [--program FILE] [--opset N] [--compare] [model=NAME model.key=value ...]

Writes the network of a run folder (its last stage), a stage folder, or a folder with pruned.yaml: as ONNX, with a free
batch size, compared with the network in onnxruntime; and as a torch.export program, loaded again and compared. Without
--onnx and --program both are written, to PATH/model.onnx and PATH/model.pt2. ONNX needs pip install 'prune-cli[export]'.

  --onnx FILE     write ONNX to FILE
  --program FILE  write a torch.export program to FILE
  --opset N       version of ONNX's operators; the exporter's choice by default
  --compare       time the dense network too, in turns with the exported one
  model=NAME      the dense network, where the run's model is your own code
"""

SIZES = (1, 64)


class _Parser(argparse.ArgumentParser):
    """argparse that leaves printing and exit codes to `prune`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"prune export: {message}; see prune export --help")


def main(arguments: list[str]) -> int:
    """Exports, compares, times and prints one line per file."""
    if set(arguments) & {"-h", "--help"} or not arguments:
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    parser = _Parser(prog="prune export", add_help=False)
    parser.add_argument("path", type=Path)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--program", type=Path)
    parser.add_argument("--opset", type=int)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    if not given.onnx and not given.program:
        given.onnx, given.program = given.path / "model.onnx", given.path / "model.pt2"
    if given.opset is not None and not given.onnx:
        raise ConfigError("prune export: --opset is for --onnx FILE, which is not given")

    from prune_cli.console import listen
    from prune_cli.files import exporting

    listen(logging.INFO)
    if given.onnx or given.compare:
        exporting.require_onnx()
    small, dense, shape = _networks(given.path, given.overrides)
    if given.onnx:
        worst = exporting.to_onnx(small, shape, given.onnx, given.opset)
        _report(given.onnx, worst, "in onnxruntime")
    if given.program:
        _report(given.program, exporting.to_program(small, shape, given.program), "loaded again")
    if given.onnx or given.compare:
        _times(given.onnx, small, dense if given.compare else None, shape, given.opset)
    return 0


def _report(path: Path, worst: float, how: str) -> None:
    from prune_cli.files.exporting import BATCHES, TOLERANCE

    sizes = " and ".join(map(str, BATCHES))
    sys.stdout.write(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB; {how}, on random inputs of batch sizes {sizes}, outputs differ by "
        f"at most {worst:.1e} of the largest (allowed {TOLERANCE:.0e})\n"
    )


def _times(path: Path | None, small: Any, dense: Any, shape: tuple[int, ...], opset: int | None) -> None:
    """Prints onnxruntime's latency of the exported network, and of the dense one where it is given."""
    from prune_cli.files.exporting import onnx_speed, to_onnx

    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "small.onnx"
            to_onnx(small, shape, path, opset)
        paths = [path]
        if dense is not None:
            paths.append(Path(folder) / "dense.onnx")
            to_onnx(dense, shape, paths[1], opset)
        for size in SIZES:
            found = onnx_speed(paths, shape, size)
            text = (
                f"onnxruntime, 1 CPU thread, batch {size}: {found[0].median_ms:.3f} ms (median of {found[0].repeats})"
            )
            if dense is not None:
                text += (
                    f", dense {found[1].median_ms:.3f} ms, {found[1].median_ms / found[0].median_ms:.2f} times faster"
                )
            sys.stdout.write(text + "\n")


def _networks(path: Path, overrides: list[str]) -> tuple[Any, Any, tuple[int, ...]]:
    """The network of a folder, a dense one of its architecture, and the shape of an input."""
    from prune_cli.commands.evaluate import find_subject
    from prune_cli.config.compose import compose
    from prune_cli.files import builders, pruned
    from prune_cli.files.artifacts import WEIGHTS
    from prune_cli.files.checkpoint import require_whole
    from prune_cli.files.weights import extent_of
    from prune_cli.pipeline.loading import load_model

    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a run folder, a stage folder or one with pruned.yaml")
    subject = find_subject(path)
    if subject.stored is not None:
        said: Any = require_whole(subject.path)
    else:
        said = pruned.read(subject.path).record
    classes, shape = said.num_classes, said.in_shape
    if shape is None:
        raise CheckpointError(
            f"{subject.path} does not say the shape of its inputs; save it with builder=... (save_pruned)"
        )

    def build() -> Any:
        if overrides:
            return builders.construct(compose(overrides).config["model"], classes, shape)
        return builders.build(subject.config["model"], classes, shape, extent, str(subject.path))

    extent = extent_of(subject.path / WEIGHTS)
    return load_model(subject.path, build), build().eval(), shape
