"""The CIFAR Python batches, read without running anything they say.

A pickle names functions and calls them. This unpickler knows four names, and answers each with a stand-in
of its own that only stores what it is given; anything else is refused. No numpy code sees the file's values
before they are checked.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from prune_cli.errors import DataError, first_line


class _Array:
    """Stands for a numpy array: keeps the state that would have been restored."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype:
    """Stands for a numpy dtype: keeps its code, such as `u1`, and drops the rest."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How Python 3 writes bytes in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("it refers to another file")


def read_batch(raw: bytes, label_key: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 `(N, 3072)` and labels int64 `(N,)` of a pickled CIFAR batch.

    Args:
        raw: the file's bytes.
        label_key: `b"labels"` or `b"fine_labels"`.
        path: named in errors.

    Raises:
        DataError: the pickle asks for anything but plain containers and uint8 arrays, or holds something else.
    """
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        pixels = _pixels(batch[b"data"])
        labels = np.array([int(label) for label in batch[label_key]], dtype=np.int64)
    except Exception as error:  # a crafted pickle can make the unpickler raise anything
        reason = first_line(error)
        raise DataError(f"{path} is not a CIFAR batch and was not loaded: {reason}") from None
    if pixels.shape != (len(labels), 3072) or not len(labels):
        raise DataError(f"{path} holds pixels {pixels.shape} for {len(labels)} labels; need (N, 3072)")
    return pixels, labels


def _pixels(array: object) -> np.ndarray:
    """A uint8 array from the state numpy pickles: (version, shape, dtype, Fortran order, bytes)."""
    if not isinstance(array, _Array) or not isinstance(array.state, tuple):
        raise ValueError("its data is not an array")
    shape, dtype, fortran, content = array.state[-4:]
    if not isinstance(dtype, _Dtype) or dtype.code != "u1" or not isinstance(content, bytes):
        raise ValueError("its data is not an array of bytes")
    order: Any = "F" if fortran else "C"
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order=order)
