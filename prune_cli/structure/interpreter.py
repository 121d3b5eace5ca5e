"""Executes a network operator by operator: once dense on labels, later small to check that it followed.

Convolutions and matrix products are not computed here: only their shapes matter, so their outputs are zeros and an
execution costs much less than a forward pass.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops.cond import CondOp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from prune_cli.errors import SurgeryError, first_line
from prune_cli.structure.labels import Kind, Work, labelling_of
from prune_cli.structure.modules import may_train_otherwise
from prune_cli.structure.originals import Originals
from prune_cli.structure.outputs import tensors_in
from prune_cli.structure.recurrent import shorten
from prune_cli.structure.shape_only import HEAVY, LIGHT, SHAPED, VIEWS, ZeroBlocks, product, shaped, skipped

Example = Any  # a tensor, a tuple of positional arguments or a dict of keyword arguments
Modules = Sequence[tuple[str, nn.Module]]  # dotted names and modules, from walk


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
FREE = -1  # the size of an expanded axis, which may follow its neighbours


@lru_cache(maxsize=4096)
def operator_of(func: Any) -> tuple[str, str, bool, str, bool]:
    """An operator's name, the name without an in-place relative's underscore, whether it writes, its cost, and whether its
    answer is a number or has a size that depends on values."""
    full = func._schema.name[6:]
    mutable = func._schema.is_mutable
    name = full[:-1] if mutable and full.endswith("_") else full
    kinds = {"heavy": HEAVY, "light": LIGHT, "shaped": SHAPED, "view": VIEWS}
    sort = next((sort for sort, members in kinds.items() if name in members), "")
    looks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    return full, name, mutable, sort, looks


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
    framed = False  # whether the ends of modules' calls are of interest

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.modules = modules
        self.names = {id(module): name for name, module in modules}
        self.stack: list[tuple[str, nn.Module | None]] = [("", None)]
        self.ordinal = -1
        self.current = ""
        self.running = False  # an operator
        self.busy = False  # an operator, or what is done with it here
        self.pages = ZeroBlocks()
        self.originals = Originals(modules)

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
            child = stack.pop()  # not after an error: failed() says where it happened
            if self.framed:
                self.returned(child[0], (args, kwargs), output)
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
        if not self.real:
            shorten(replaced, self.counted)
        return replaced

    def counted(self) -> list[Work]:
        """The multiply-adds that were counted so far, to be changed in place."""
        return []

    @property
    def layer(self) -> str:
        """Dotted name of the module that runs."""
        return self.stack[-1][0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.ordinal += 1
        self.current, name, mutable, sort, looks = operator_of(func)
        self.running = self.busy = True
        if mutable or (name == "native_batch_norm" and args[5]):
            self.originals.before_write(name, args, kwargs)
        out = self.known(name, func, args, kwargs, looks)
        if out is None and sort and not self.real:
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
        self.busy = False
        return out

    def failed(self, why: str) -> Exception:
        """What an error inside the model means."""
        return SurgeryError(
            f"the model does not run on the example input ({why}); give inputs of the shape and type it expects"
        )

    def known(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], looks: bool) -> Any:
        """What an operator gives where that is known already, else None.

        Args:
            looks: whether its answer is a number or has a size that depends on values.
        """

    def returned(self, child: str, given: Any, output: Any) -> None:
        """Sees the end of a module's call, where `framed` is set."""

    def begin(self, inputs: Any) -> None:
        """Sees the inputs that the model is about to get."""

    def lend(self) -> None:
        """Puts things of its own into the modules' dictionaries, which are restored after the run."""

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
        labelling = labelling_of(number)
        known = labelling.kind is Kind.WEIGHT or getattr(number, "_prune_data", False)  # no width says it
        number = None if number.dim() or labelling.labels or known else number.item()
    if not isinstance(number, (int, float)) or not number:
        return None
    return 1.0 / number if name == "div" else float(number)


SIZED = {
    "view", "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "split", "split_with_sizes", "unsafe_split",
    "unsafe_split_with_sizes", "repeat", "constant_pad_nd", "as_strided", "zeros", "ones", "empty", "full", "rand", "randn",
    "new_zeros", "new_ones", "new_empty", "new_full", "empty_strided", "new_empty_strided", "arange", "linspace", "eye",
    "native_layer_norm", "_fused_rms_norm", "native_group_norm", "convolution",
}  # fmt: skip  # operators whose whole numbers count positions, which are compared as such


def numbers_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers among an operator's arguments that must be the same in a smaller network."""
    if name == "native_batch_norm":
        return tuple(args[5:8])
    if name == "native_group_norm":
        return (None if args[6] == args[4] else args[6], args[7])
    if name == "convolution":  # the groups follow from the shapes
        return tuple(args[3:8])
    if name in ("full", "new_full"):
        return (args[-1],)
    sort: Any = float if name in SIZED else (int, float)
    found: list[Any] = []
    for value in args if not kwargs else (*args, *kwargs.values()):
        if isinstance(value, sort):
            found.append(value)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], sort):
            found.append(tuple(value))
    if name in SCALARS and len(args) > 1 and isinstance(args[1], sort):
        found.remove(args[1])
    return tuple(found)


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
def keeps_nothing(kind: type) -> bool:
    """Layers of torch store nothing while they run."""
    return kind.__module__.startswith("torch.nn.modules.")


def _forget(plain: dict[str, Any]) -> None:
    """Gives a module empty caches: what it caches it computes again."""
    for key, value in plain.items():  # keys stay, so this is safe
        if is_cache(key, value):
            plain[key] = emptied(value)


def is_cache(key: str, value: Any) -> bool:
    """Whether an attribute holds tensors that the module computes again where they are missing."""
    return "cache" in key and (value is None or type(value) is dict or isinstance(value, Tensor))


def emptied(cache: Any) -> Any:
    """What a cache holds before the first run."""
    return {} if isinstance(cache, dict) else None


@contextmanager
def _quiet(tracer: Tracer, training: bool) -> Iterator[None]:
    """Fused kernels off, modes as asked, patches of the tracer on; everything restored afterwards: attributes and what
    lists and dicts in them hold, parameters and buffers that were written to, generators of random numbers."""
    states = [(m.__dict__, m.__dict__.copy(), m.__dict__["_buffers"].copy()) for _, m in tracer.modules]
    kinds: list[type] = [type(m) for _, m in tracer.modules]
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with ExitStack() as stack:
        stack.callback(_restore, states)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.callback(torch._C._set_mkldnn_enabled, mkldnn)
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if torch.cuda.is_initialized():
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        stack.callback(tracer.originals.restore)
        for (plain, _, _), kind, (_, module) in zip(states, kinds, tracer.modules, strict=True):
            if not keeps_nothing(kind):
                tracer.originals.remember(plain)
                _forget(plain)
            trains = training and not issubclass(kind, _NormBase)
            plain["training"] = trains and (bool(plain["_modules"]) or may_train_otherwise(module))
        tracer.lend()
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(tracer.patches())
        stack.enter_context(tracer)
        yield


def own(example: Example) -> Example:
    """A copy of example inputs that a model may write to; objects that refuse to be copied are passed as they are."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        if value is None or isinstance(value, (int, float, str, complex)):
            return value
        with suppress(Exception):
            return copy.deepcopy(value)
        return value

    return tree_map(one, example)


def execute(model: nn.Module, example: Example, tracer: Tracer, training: bool) -> list[Tensor]:
    """Runs the model under a tracer.

    Args:
        model: the network; left as it was, also where it counts its calls.
        example: example inputs; the model gets a copy.
        tracer: sees every operator.
        training: containers, and layers that may spell widths out in training alone, in training mode (auxiliary heads
            run), other layers in evaluation mode.

    Returns:
        The tensors in the model's output.

    Raises:
        SurgeryError: the model does not run on the example.
        Refused: the small network did not follow.
    """
    inputs = own(example)
    tracer.begin(inputs)
    with _quiet(tracer, training):
        try:
            found = tensors_in(call_model(model, inputs))
        except (Refused, BrokenRule):
            raise
        except Exception as error:
            raise tracer.failed(f"{type(error).__name__}: {first_line(error)}"[:200]) from error
    return [t if isinstance(t, Tensor) else torch.from_numpy(t.copy()) for t in found]
