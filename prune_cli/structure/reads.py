"""Integers of modules that remember where they were read, so that only what was really used as a width may change.

While the dense network runs on labels, the integers in its modules' attributes are `Read`s: equal to the plain ones, and
what is computed from them knows the attributes behind it. `Watch` sees which of them reach an operator, in which place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that take a size per axis of their output, per part, or per end of an axis.
ALIGNED = {
    "view", "reshape", "expand", "unflatten", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes",
    "pad", "layer_norm", "rms_norm",
}  # fmt: skip
SIZES = ("size", "shape", "split_size_or_sections", "split_size", "split_sizes", "pad", "normalized_shape")
NUMBERS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__rfloordiv__", "__mod__",
    "__rmod__", "__pow__", "__rpow__", "__truediv__", "__rtruediv__", "__lshift__", "__rlshift__", "__rshift__",
    "__rrshift__", "__and__", "__rand__", "__or__", "__ror__",
)  # fmt: skip


class Origin(NamedTuple):
    """An integer of a module: dotted name, attribute, and the position in a list or tuple."""

    module: str
    key: str
    place: int | None = None


class Listener(Protocol):
    """Hears that code did something with an integer."""

    def touched(self, origins: Iterable[Origin]) -> None:
        """Code compared, converted or reckoned with the integers of these origins."""


class Ear:
    """Passes on what it hears until the run is over: code may keep a `Read` for longer, in a cache of its own."""

    def __init__(self, listener: Listener) -> None:
        self.listener: Listener | None = listener

    def touched(self, origins: Iterable[Origin]) -> None:
        """See `Listener.touched`."""
        if self.listener is not None:
            self.listener.touched(origins)


class Read(int):
    """An integer that knows its origins; `direct` where it is the attribute itself and not computed from it."""

    origins: frozenset[Origin]
    ear: Ear
    direct: bool

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int.__int__(self)

    def __float__(self) -> float:
        self.ear.touched(self.origins)
        return int.__float__(self)

    def __neg__(self) -> Read:
        return made(int.__neg__(self), self.origins, self.ear, direct=self.direct)

    def __bool__(self) -> bool:
        return int.__bool__(self)

    __hash__ = int.__hash__


def made(value: int, origins: frozenset[Origin], ear: Ear, *, direct: bool) -> Read:
    """A `Read` of a value."""
    read = Read(value)
    read.origins, read.ear, read.direct = origins, ear, direct
    return read


def _arithmetic(name: str) -> Callable[[Read, Any], Any]:
    plain = getattr(int, name)

    def method(self: Read, other: Any) -> Any:
        self.ear.touched(self.origins)
        value = plain(self, other)
        if type(value) is not int:
            return value
        return made(value, self.origins | getattr(other, "origins", frozenset()), self.ear, direct=False)

    return method


def _comparison(name: str) -> Callable[[Read, Any], Any]:
    plain = getattr(int, name)

    def method(self: Read, other: Any) -> Any:
        self.ear.touched(self.origins)
        return plain(self, other)

    return method


for _name in NUMBERS:
    setattr(Read, _name, _arithmetic(_name))
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Read, _name, _comparison(_name))


def lent(module: str, key: str, value: Any, ear: Ear) -> Any:
    """An attribute's value with integers that remember it; the type of a list or tuple stays."""
    if isinstance(value, int):
        return made(value, frozenset({Origin(module, key)}), ear, direct=True)
    items = [made(item, frozenset({Origin(module, key, i)}), ear, direct=True) for i, item in enumerate(value)]
    return items if type(value) is list else tuple(items)


def found_in(*values: Any) -> Iterator[Read]:
    """The `Read`s among arguments; lists, slices and dicts opened."""
    for value in values:
        sort = type(value)
        if sort is Read:
            yield value
        elif isinstance(value, (tuple, list)):  # also a torch.Size
            yield from found_in(*value)
        elif sort is slice:
            yield from found_in(value.start, value.stop, value.step)
        elif sort is dict:
            yield from found_in(*value.values())


class Watch(TorchFunctionMode):
    """Knows, while a function of torch runs, which `Read`s it was given.

    Attributes:
        reads: those of the running function.
        sizes: what it takes per axis of its output, per part or per end of an axis; None for those it does not give.
        function: its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.sizes: list[Any] = []
        self.function = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reads = list(found_in(args, kwargs))
        if not reads:
            return func(*args, **kwargs)
        self.reads, self.function = reads, getattr(func, "__name__", "")
        self.sizes = _sizes(self.function, args, kwargs) if self.function in ALIGNED else []
        try:
            return func(*args, **kwargs)
        finally:
            self.reads, self.sizes, self.function = [], [], ""


def _sizes(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given: list[Any] = list(args[1:])
    if function == "unflatten":
        given += [kwargs[key] for key in ("dim", "sizes") if key in kwargs]
        if len(given) != 2 or not isinstance(given[0], int) or not isinstance(args[0], Tensor):
            return []
        axis = int(given[0]) % args[0].dim()
        return [None] * axis + list(given[1]) + [None] * (args[0].dim() - axis - 1)
    given += [kwargs[key] for key in SIZES if key in kwargs]
    if given and isinstance(given[0], (tuple, list)):
        return list(given[0])
    return given if function in ("view", "reshape", "expand") else given[:1]
