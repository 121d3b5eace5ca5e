"""Networks for other programs: ONNX and `torch.export`, both with a free batch size, both compared before they are kept."""

from __future__ import annotations

import importlib
import io
import logging
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.files.artifacts import new_file

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of an exported network's outputs, relative to the largest output."""

BATCHES = (1, 5)
"""Batch sizes that are compared; the network is exported with another one, so both are new to it."""

EXTRA = ("onnx", "onnxscript", "onnxruntime")
_EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class Speed:
    """Milliseconds per batch of an ONNX file in onnxruntime, on one thread of the CPU."""

    batch_size: int
    median_ms: float
    repeats: int


def require_onnx() -> None:
    """Finds the packages that ONNX needs.

    Raises:
        ConfigError: one is missing.
    """
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"ONNX needs {name}; run: pip install 'prune-cli[export]'") from error


def to_onnx(model: nn.Module, in_shape: Sequence[int], path: Path, opset: int | None = None) -> float:
    """Writes one ONNX file (input `images`, output `logits`) and compares it in onnxruntime.

    Args:
        model: network of one input (N, *in_shape) and one output; exported in evaluation mode.
        opset: version of ONNX's operators; None = the exporter's own choice.

    Returns:
        The largest difference of outputs on random inputs of several batch sizes, relative to the largest output.

    Raises:
        ConfigError: a package is missing, or the network cannot be written in this opset.
        CheckpointError: the file computes something else; it is not kept.
    """
    require_onnx()
    images = _random(_EXAMPLE_BATCH, in_shape)
    with new_file(path) as temporary:
        try:
            with _quiet():
                program: Any = torch.onnx.export(
                    model.eval(),
                    (images,),
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                    input_names=["images"],
                    output_names=["logits"],
                    opset_version=opset,
                    verbose=False,
                )
        except Exception as error:  # the exporter wraps whatever the network's code raised
            raise ConfigError(f"the network cannot be exported to ONNX: {_line(error)}") from error
        with _quiet():
            program.save(str(temporary), external_data=False)
        session = _session(temporary)
        worst = _worst(model, in_shape, lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]))
        _accept(worst, "ONNX", path)
    return worst


def to_program(model: nn.Module, in_shape: Sequence[int], path: Path) -> float:
    """Writes a `torch.export` program, loads it again and compares it; see `to_onnx`."""
    images = _random(_EXAMPLE_BATCH, in_shape)
    with new_file(path) as temporary:
        try:
            with _quiet():
                shapes = ({0: torch.export.Dim("batch", min=1)},)
                program = torch.export.export(model.eval(), (images,), dynamic_shapes=shapes)
                # into memory first: on a full disk the writer of torch ends the process
                content = io.BytesIO()
                torch.export.save(program, content)
                content.seek(0)
                loaded = torch.export.load(content).module()
        except Exception as error:  # torch.export reports the network's own exceptions
            raise ConfigError(f"the network cannot be exported by torch.export: {_line(error)}") from error
        temporary.write_bytes(content.getbuffer())
        worst = _worst(model, in_shape, loaded)
        _accept(worst, "exported program", path)
    return worst


def onnx_speed(
    paths: Sequence[Path], in_shape: Sequence[int], batch_size: int, *, repeats: int = 30, warmup: int = 5
) -> list[Speed]:
    """Times ONNX files in onnxruntime, one call of each in turn, so that what else the machine does hits all alike."""
    sessions = [_session(path) for path in paths]
    images = {"images": _random(batch_size, in_shape).numpy()}
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(warmup + repeats):
        for session, taken in zip(sessions, times, strict=True):
            began = time.perf_counter()
            session.run(None, images)
            if turn >= warmup:
                taken.append(1e3 * (time.perf_counter() - began))
    return [Speed(batch_size, statistics.median(taken), repeats) for taken in times]


def _session(path: Path) -> Any:
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    try:
        return runtime.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for everything
        raise CheckpointError(f"onnxruntime refuses {path}: {_line(error)}") from error


def _random(batch_size: int, in_shape: Sequence[int]) -> Tensor:
    return torch.randn(batch_size, *in_shape, generator=torch.Generator().manual_seed(batch_size))


def _worst(model: nn.Module, in_shape: Sequence[int], other: Any) -> float:
    worst = 0.0
    with torch.no_grad():
        for size in BATCHES:
            images = _random(size, in_shape)
            wanted, found = model(images), other(images)
            gap = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30))
            worst = worst if gap <= worst or math.isnan(worst) else gap  # what is no number stays
    return worst


def _accept(worst: float, what: str, path: Path) -> None:
    if not worst <= TOLERANCE:  # nan too
        raise CheckpointError(
            f"the {what} differs from the network by {worst:.1e} of the largest output (allowed {TOLERANCE:.0e}); "
            f"{path} was not written"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _quiet() -> Any:
    """Keeps the exporters' notes to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
