"""Where an execution can be cut in two: in front of a module on whose input alone depends all that comes after.

Found by executing the network once and following every tensor, never from its code. A network that cannot be followed so
(its code looks at values, draws numbers or changes buffers in evaluation) has no cuts.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_cli.structure.modes import composed_attention, evaluating

LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
TAKEN = ("numpy", "tolist", "__array__")  # what leaves torch, and may come back


@dataclass(frozen=True)
class Cut:
    """A place between two operators.

    Attributes:
        module: dotted name of the module that begins there; it is called once, with one tensor.
        at: its place in the execution.
        size: elements that come to it for one image.
        fillers: for modules that are done before it, the outermost ones: what they gave for one image. The code around
            them runs on, and needs something of the right kind.
    """

    module: str
    at: int
    size: int
    fillers: Mapping[str, Tensor]


@dataclass(frozen=True)
class Execution:
    """One execution of a network.

    Attributes:
        cuts: in the order of the execution.
        first: parameter or buffer -> the place where it is first used.
    """

    cuts: tuple[Cut, ...] = ()
    first: Mapping[str, int] = field(default_factory=dict)

    def place(self, names: Iterable[str]) -> int:
        """Where the first of some parameters is used; -1: nobody knows where."""
        return min((self.first.get(name, -1) for name in names), default=sys.maxsize)


def executed(model: nn.Module, image: Tensor) -> Execution:
    """The execution of a network for one image in evaluation mode, with the cuts that its tensors allow.

    Whether its code agrees is another question: see `holds`.
    """
    with evaluating(model), composed_attention(), torch.no_grad():
        run = _Run(model)
        try:
            run(image)
        except Exception:  # what is no plain network of one batch of images has no cuts
            return Execution()
        return Execution() if run.opaque else Execution(tuple(run.cuts()), dict(run.first))


def holds(model: nn.Module, cut: Cut, images: Tensor) -> bool:
    """Whether going on from a cut gives the very bits, and leaves what it was given as it was.

    Sizes that code derives from its input may be in the way.

    Args:
        images: some, no two alike.
    """
    came: dict[str, list[Tensor]] = {cut.module: []}
    with evaluating(model), composed_attention(), torch.no_grad():
        with watched(model, [cut], came):
            wanted = _logits(model(images))
        (given,) = came[cut.module]
        before = given.clone()
        try:
            with entered(model, cut) as entry:
                entry.given = given
                found = _logits(model(images[:1]))
        except Exception:  # the code of the network did not expect this
            return False
    return torch.equal(found, wanted) and torch.equal(given, before)


@contextmanager
def entered(model: nn.Module, cut: Cut) -> Iterator[Entry]:
    """While this lasts, calling the model for one image of any kind executes what lies behind the cut, on `Entry.given`."""
    entry = Entry()
    with ExitStack() as stack:
        for name, value in cut.fillers.items():
            stack.enter_context(_instead(model.get_submodule(name), value))
        hook = model.get_submodule(cut.module).register_forward_pre_hook(lambda module, args: (entry.given, *args[1:]))
        stack.callback(hook.remove)
        yield entry


@dataclass
class Entry:
    """What comes to a cut.

    Attributes:
        given: the input of the module behind it, for a whole batch.
    """

    given: Tensor | None = None


@contextmanager
def watched(model: nn.Module, cuts: Sequence[Cut], keep: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """While this lasts, what comes to the cuts is added to `keep`, by the names of their modules."""
    with ExitStack() as stack:
        for cut in cuts:

            def take(module: nn.Module, args: tuple[Any, ...], name: str = cut.module) -> None:
                keep[name].append(args[0].clone())  # code behind may change it in place

            stack.callback(model.get_submodule(cut.module).register_forward_pre_hook(take).remove)
        yield


@contextmanager
def _instead(module: nn.Module, value: Tensor) -> Iterator[None]:
    """A module that gives a value, whatever it is given."""
    with patch.dict(module.__dict__, {"forward": lambda *args, **kwargs: value}):
        yield


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _drawn(device: torch.device) -> Tensor:
    """The state of the random numbers that a device's operators draw."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@dataclass
class _Call:
    name: str
    begin: int
    end: int = -1
    size: int = 0  # of the one tensor that it is given; 0: it is given something else
    output: Any = None


class _Run(TorchDispatchMode):
    """Follows which operator made each tensor, and where each is used.

    Every input of a module becomes a tensor of its own, so that what goes into a module and what goes past it differ.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._names: dict[int, list[str]] = {}
        for name, tensor in named:
            self._names.setdefault(id(tensor), []).append(name)
        self._buffers = [(buffer, buffer._version) for buffer in model.buffers()]
        self._born: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address may not be used twice
        self._place, self._quiet = 0, False
        self._blocked: list[tuple[int, int]] = []  # cuts behind the first place, up to the second
        self._calls: list[_Call] = []
        self._last: dict[str, int] = {}
        self.first: dict[str, int] = {}
        self.opaque = False

    def __call__(self, images: Tensor) -> None:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                before = functools.partial(self._begins, name)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                after = functools.partial(self._ends, name)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            for name in TAKEN:
                stack.enter_context(patch.object(Tensor, name, self._taken(getattr(Tensor, name))))
            state = _drawn(images.device)
            stack.enter_context(self)
            self._model(images)
        self.opaque = self.opaque or any(buffer._version != version for buffer, version in self._buffers)
        self.opaque = self.opaque or not torch.equal(state, _drawn(images.device))

    def _taken(self, original: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.opaque = True
            return original(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._quiet:
            return func(*args, **(kwargs or {}))
        place = self._next()
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._used(tensor, place)
        out = func(*args, **(kwargs or {}))
        self.opaque = self.opaque or any(tag in func.tags for tag in LOOKS)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made(tensor, place)
        return out

    def _next(self) -> int:
        self._place += 1
        return self._place

    def _used(self, tensor: Tensor, place: int) -> None:
        for name in self._names.get(id(tensor), ()):
            self.first.setdefault(name, place)
            self._last[name] = place
        if id(tensor) not in self._names:
            self._blocked.append((self._born.get(id(tensor), 0), place))

    def _made(self, tensor: Tensor, place: int) -> None:
        self._born[id(tensor)] = place
        self._alive.append(tensor)

    def _begins(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = _Call(name, self._next())
        self._calls.append(call)
        if len(args) != 1 or not isinstance(args[0], Tensor) or kwargs:
            return None
        call.size = args[0].numel() if name else 0
        self._used(args[0], call.begin - 1)  # for the cut that begins here it is what comes
        self._quiet = True
        own = args[0].view_as(args[0])
        self._quiet = False
        self._made(own, call.begin)
        return (own,), kwargs

    def _ends(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = next(call for call in reversed(self._calls) if call.name == name and call.end < 0)
        call.end, call.output = self._next(), output

    def cuts(self) -> Iterator[Cut]:
        """Those that no tensor, and no norm's statistics, reach across."""
        often = {call.name for call in self._calls if sum(other.name == call.name for other in self._calls) > 1}
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and (mean := f"{name}.running_mean") in self.first:
                self._blocked.append((self.first[mean], self._last[mean]))
        for call in self._calls:
            if call.size and call.name not in often and not any(a < call.begin <= b for a, b in self._blocked):
                yield Cut(call.name, call.begin, call.size, self._fillers(call.begin, often))

    def _fillers(self, at: int, often: set[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        begins, index = [call.begin for call in self._calls], 0
        while index < len(self._calls) and begins[index] < at:
            call = self._calls[index]
            if 0 < call.end < at and call.name not in often and isinstance(call.output, Tensor):
                found[call.name] = call.output
                index = bisect(begins, call.end)  # past all that is called inside
            else:
                index += 1
        return found
