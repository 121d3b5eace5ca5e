"""Executes a network operator by operator: once dense on labels, later small to check that it followed.

Convolutions and matrix products are not computed here: only their shapes matter, so their outputs are zeros and an
execution costs much less than a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._higher_order_ops.cond import CondOp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_cli.errors import SurgeryError, first_line
from prune_cli.structure.labels import Kind, Marks, marks_of
from prune_cli.structure.shape_only import HEAVY, LIGHT, SHAPED, VIEWS, ZeroBlocks, product, shaped, skipped

Example = Any  # a tensor, a tuple of positional arguments or a dict of keyword arguments
Modules = Sequence[tuple[str, nn.Module]]  # dotted names and modules, from walk


class Step(NamedTuple):
    """One executed operator: what the small network is compared with."""

    name: str
    func: Any
    layer: str
    outs: tuple[tuple[tuple[int, ...], Marks], ...]
    source: tuple[tuple[int, ...], Marks] | None = None  # of operators that pick positions or normalise
    norm: bool = False  # runs in a module that normalises
    code: str = ""  # class of the module, "" for single layers
    scalar: float | None = None  # a number among the operands


@dataclass(slots=True)
class Cut:
    """A view in an attention module that cut channels into heads: which sizes the module's attributes may
    name."""

    layer: str
    sizes: tuple[int, ...]
    label: Tensor


@dataclass(slots=True)
class Trace:
    """One execution of the dense network."""

    training: bool
    steps: list[Step] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    widths: list[tuple[str, tuple[int, ...], Tensor]] = field(default_factory=list)
    splits: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)  # layer, labels of the parts of an axis
    bounds: list[tuple[str, Tensor]] = field(default_factory=list)  # layer, labels that a slice's bound counts
    pads: list[tuple[str, Tensor]] = field(default_factory=list)  # layer, labels of the channels of zeros it puts first
    decides: set[str] = field(default_factory=set)  # layers that looked at a condition computed from data
    unknown: dict[str, str] = field(default_factory=dict)
    literal: bool = False  # whether some operator took a size that the code may spell out


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """What earlier checks have taught.

    Attributes:
        levels: (training, number of the operator) -> how much its rule fixes.
        tied: code of attention modules that derive their head size from the width of their input.
        guesses: module name -> how attributes of unknown meaning are set: 0 the likeliest size, 1 the
        second, 2 left alone.
    """

    levels: Mapping[tuple[bool, int], int] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    guesses: Mapping[str, int] = field(default_factory=dict)


LOCAL = {
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unbind",
    "constant_pad_nd",
    "index",
    "roll",
}
NORM_OPERATORS = {
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "mean", "var", "var_mean", "_softmax", "_safe_softmax",
    "std", "std_mean", "native_batch_norm",
}  # fmt: skip
SCALARS = {"mul", "div", "add", "sub", "rsub", "pow"}  # operators whose number may derive from a width
FROZEN_LEVEL = 4  # above what any rule knows: the operator's labels stay
FREE = -1  # the size of an expanded axis, which may follow its neighbours


@lru_cache(maxsize=4096)
def operator_of(func: Any) -> tuple[str, str, bool, str]:
    """An operator's name, the name without an in-place relative's underscore, whether it writes, and its cost."""
    full = func._schema.name[6:]
    mutable = func._schema.is_mutable
    name = full[:-1] if mutable and full.endswith("_") else full
    kinds = {"heavy": HEAVY, "light": LIGHT, "shaped": SHAPED, "view": VIEWS}
    sort = next((sort for sort, members in kinds.items() if name in members), "")
    return full, name, mutable, sort


def call_model(model: nn.Module, example: Example) -> Any:
    """Calls a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    return model(example)


def _batch_norm(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`torch.batch_norm` as one operator; otherwise every one of them makes an empty tensor first."""
    if kwargs or len(args) != 9:
        return original(*args, **kwargs)
    return torch.native_batch_norm(*args[:8])[0]


def _uncompiled(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, which also decorates."""
    return model if model is not None else lambda function: function


def _branch(operator: Any, condition: Any, true: Callable[..., Any], false: Callable[..., Any], operands: Any) -> Any:
    """`torch.cond` as an `if`."""
    return true(*operands) if condition else false(*operands)


class Tracer(TorchDispatchMode):
    """Keeps the stack of modules and counts operators; `visit` sees each one with its output.

    Args:
        modules: the modules of the network that will run, from `walk`.
    """

    real = False  # whether products are computed

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.modules = modules
        self.names = {id(module): name for name, module in modules}
        self.stack: list[tuple[str, nn.Module | None]] = [("", None)]
        self.ordinal = -1
        self.current = ""
        self.running = False
        self.pages = ZeroBlocks()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No guard against torch.compile around every operator: nothing is compiled here."""
        return False

    def patches(self) -> ExitStack:
        """What is replaced in torch while the model runs."""
        stack, call = self.stack, nn.Module.__call__

        def called(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            stack.append((self.names.get(id(module), stack[-1][0]), module))
            output = call(module, *args, **kwargs)
            stack.pop()  # not after an error: failed() says where it happened
            return output

        replaced = ExitStack()
        replaced.enter_context(patch.object(nn.Module, "__call__", called))
        replaced.enter_context(patch.object(torch, "batch_norm", partial(_batch_norm, torch.batch_norm)))
        # In inference mode a linear layer would come as one operator; without it nothing but the speed differs.
        replaced.enter_context(patch.object(torch.inference_mode, "__enter__", lambda mode: None))
        replaced.enter_context(patch.object(torch.inference_mode, "__exit__", lambda mode, *error: None))
        # `torch.cond` compiles itself first; as what it means, an `if`, it says by itself which branch is not seen.
        replaced.enter_context(patch.object(torch, "compile", _uncompiled))
        replaced.enter_context(patch.object(CondOp, "__call__", _branch))
        return replaced

    @property
    def layer(self) -> str:
        """Dotted name of the module that runs."""
        return self.stack[-1][0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.ordinal += 1
        self.current, name, mutable, sort = operator_of(func)
        self.running = True
        out = None
        if sort and not self.real:
            if sort == "heavy":
                if args[0].is_floating_point() and "alpha" not in kwargs and "beta" not in kwargs:
                    out = product(self.pages, name, args)
            elif sort == "light" and (not kwargs or set(kwargs) <= {"approximate"}):
                out = skipped(self.pages, name, mutable, args)
            elif sort == "shaped":
                out = shaped(self.pages, name, func, args, kwargs)
        if out is None:
            out = self.run(name, func, args, kwargs)
            if name in VIEWS and not self.real and getattr(args[0], "_prune_hollow", False):
                out._prune_hollow = True
        self.running = False
        self.visit(name, func, args, kwargs, out)
        return out

    def failed(self, why: str) -> Exception:
        """What an error inside the model means."""
        return SurgeryError(
            f"the model does not run on the example input ({why}); give inputs of the shape and type it expects"
        )

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes an operator."""
        return func(*args, **kwargs)

    def visit(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Sees an executed operator."""


def scalar_of(name: str, args: tuple[Any, ...]) -> float | None:
    """The number that a tensor meets: of products the factor (a division counts as its inverse)."""
    if name not in SCALARS or len(args) < 2:
        return None
    number = args[1]
    if isinstance(number, Tensor):
        marks = marks_of(number)
        number = number.item() if number.dim() == 0 and not marks.fields and marks.kind is not Kind.WEIGHT else None
    if not isinstance(number, (int, float)) or not number:
        return None
    return 1.0 / number if name == "div" else float(number)


class Refused(Exception):
    """The small network did not follow at one operator."""

    def __init__(self, ordinal: int, layer: str, name: str, why: str) -> None:
        super().__init__(f"{name} in {layer or 'the model'}: {why}")
        self.ordinal, self.layer, self.name = ordinal, layer, name
        self.trace = 0  # which of the plan's traces


class BrokenRule(Exception):
    """An operator's rule failed otherwise than by saying that it does not know: a bug of ours."""


def _restore(states: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    for plain, state, buffers in states:
        plain.clear()
        plain.update(state)
        if buffers:
            plain["_buffers"].update(buffers)


@lru_cache(maxsize=4096)
def _keeps_nothing(kind: type) -> bool:
    """Layers of torch store nothing while they run."""
    return kind.__module__.startswith("torch.nn.modules.")


def _forget(plain: dict[str, Any]) -> None:
    """Gives a module dictionaries of its own to write to; what it caches it computes again."""
    for key, value in plain.items():  # keys stay, so this is safe
        if is_cache(key, value):
            plain[key] = emptied(value)
        elif type(value) is dict and key[0] != "_":
            plain[key] = value.copy()


def is_cache(key: str, value: Any) -> bool:
    """Whether an attribute holds tensors that the module computes again where they are missing."""
    return "cache" in key and (value is None or type(value) is dict or isinstance(value, Tensor))


def emptied(cache: Any) -> Any:
    """What a cache holds before the first run."""
    return {} if isinstance(cache, dict) else None


@contextmanager
def _quiet(tracer: Tracer, training: bool) -> Iterator[None]:
    """Fused kernels off, modes as asked, patches of the tracer on; everything restored afterwards."""
    states = [(m.__dict__, m.__dict__.copy(), m.__dict__["_buffers"].copy()) for _, m in tracer.modules]
    kinds: list[type] = [type(m) for _, m in tracer.modules]
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with ExitStack() as stack:
        stack.callback(_restore, states)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.callback(torch._C._set_mkldnn_enabled, mkldnn)
        state = torch.get_rng_state()
        stack.callback(torch.set_rng_state, state)
        for (plain, _, _), kind in zip(states, kinds, strict=True):
            plain["training"] = training and bool(plain["_modules"])
            if not _keeps_nothing(kind):
                _forget(plain)
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(tracer.patches())
        stack.enter_context(tracer)
        yield


def execute(model: nn.Module, example: Example, tracer: Tracer, training: bool) -> list[Tensor]:
    """Runs the model under a tracer.

    Args:
        model: the network.
        example: example inputs.
        tracer: sees every operator.
        training: containers in training mode (auxiliary heads run), layers in evaluation mode.

    Returns:
        The tensors in the model's output.

    Raises:
        SurgeryError: the model does not run on the example.
        Refused: the small network did not follow.
    """
    with _quiet(tracer, training):
        try:
            return [t for t in tree_leaves(_plain(call_model(model, example))) if isinstance(t, Tensor)]
        except (Refused, BrokenRule):
            raise
        except Exception as error:
            raise tracer.failed(f"{type(error).__name__}: {first_line(error)}"[:200]) from error


def _plain(output: Any) -> Any:
    """Opens objects such as Hugging Face's outputs, which behave like dicts."""
    if isinstance(output, (Tensor, tuple, list, dict)):
        return output
    if hasattr(output, "items"):
        return dict(output.items())
    return list(vars(output).values()) if hasattr(output, "__dict__") else output
