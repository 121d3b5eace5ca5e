"""Executes a network operator by operator: once dense on labels, later small to check that it followed.

Convolutions and matrix products are not computed here: only their shapes matter, so their outputs are zeros and an
execution costs much less than a forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_cli.errors import SurgeryError
from prune_cli.hollow import HEAVY, LIGHT, SHAPED, VIEWS, Pages, product, shaped, skipped
from prune_cli.labels import NOTHING, Kind, Ledger, Marks, marks_of, varied, vector
from prune_cli.modules import named_tensors, widths_of
from prune_cli.operators.call import Call, Result, Unsupported, axis_of, tensors
from prune_cli.operators.mixing import per_channel, pointwise
from prune_cli.operators.table import factory, frozen, rule

HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
# Attention that derives its head size from the width of its input: module class -> name of the joint
# projection's weight.
# Here the embedding and the attention shrink together, equal positions in every head.
TIED_ATTENTION = {
    "MultiheadAttention": "in_proj_weight",  # or "q_proj_weight", where keys and values have widths of their own
    "ShiftedWindowAttention": "qkv.weight",
    "ShiftedWindowAttentionV2": "qkv.weight",
    "RelativePositionalMultiHeadAttention": "to_qkv.weight",
}
Example = Any  # a tensor, a tuple of positional arguments or a dict of keyword arguments
Modules = Sequence[tuple[str, nn.Module]]  # dotted names and modules, from walk
Parameters = dict[str, tuple[Tensor, dict[int, int]]]  # name -> tensor and, per axis, its first variable


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
class Strictness:
    """What earlier checks have taught.

    Attributes:
        levels: (training, number of the operator) -> how much its rule fixes.
        tied: Code of attention modules that derive their head size from the width of their input.
        guesses: Module name -> how attributes of unknown meaning are set: 0 the likeliest size, 1 the
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
FOLLOWING = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "contiguous", "_to_copy", "alias", "detach", "dropout",
    "cat", "mean", "sum", "native_batch_norm", "prelu", "mm", "addmm",
}  # fmt: skip
NORMS = {
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "mean", "var", "var_mean", "_softmax", "_safe_softmax",
    "std", "std_mean", "native_batch_norm",
}  # fmt: skip
SCALARS = {"mul", "div", "add", "sub", "rsub", "pow"}  # operators whose number may derive from a width
NORM_NAME = re.compile(r"[Nn]orm|NORM|LN|RMS|GRN")  # classes that normalise, over channels too
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
    """``torch.batch_norm`` as one operator; otherwise every one of them makes an empty tensor first."""
    if kwargs or len(args) != 9:
        return original(*args, **kwargs)
    return torch.native_batch_norm(*args[:8])[0]


class Tracer(TorchDispatchMode):
    """Keeps the stack of modules and counts operators; ``visit`` sees each one with its output.

    Args:
        modules: The modules of the network that will run, from ``walk``.
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
        self.pages = Pages()

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
        return replaced

    @property
    def layer(self) -> str:
        """Dotted name of the module that runs."""
        return self.stack[-1][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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

    def run(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Computes an operator."""
        return func(*args, **kwargs)

    def visit(self, name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Sees an executed operator."""


def _zeros_first(pads: Sequence[int], fields: Sequence[Tensor]) -> Iterator[Tensor]:
    """The labels of the positions that a padding puts before an axis of channels."""
    for label in fields:
        axes = varied(label)
        back = 2 * (label.dim() - 1 - axes[0]) if len(axes) == 1 else len(pads)
        if back < len(pads) and pads[back] > 0:
            yield label.movedim(axes[0], 0).flatten(1)[: pads[back], 0]


class Labeller(Tracer):
    """Executes the dense network on labels."""

    def __init__(self, modules: Modules, ledger: Ledger, trace: Trace, strictness: Strictness):
        super().__init__(modules)
        self.ledger, self.trace = ledger, trace
        self.levels, self.tied = strictness.levels, strictness.tied
        self.flattening = False  # inside a flatten, whose sizes are never spelt out
        self.codes: dict[int, tuple[str, str | None, bool]] = {}
        self.used: set[int] = set()  # identities of the tensors that took part
        self.counted: dict[tuple[str, int], Tensor] = {}  # per layer and number in an attribute, what it counted first

    def patches(self) -> ExitStack:
        def marked(flatten: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def flattened(*args: Any, **kwargs: Any) -> Tensor:
                self.flattening = True
                try:
                    return flatten(*args, **kwargs)
                finally:
                    self.flattening = False

            return flattened

        replaced = super().patches()
        for owner in (torch, Tensor):
            replaced.enter_context(patch.object(owner, "flatten", marked(owner.flatten)))
        return replaced

    def about(self, module: nn.Module | None) -> tuple[str, str | None, bool]:
        """A module's code, what its head axes mean and whether it normalises."""
        heads = None
        if has_heads(module):
            heads = "heads"
        if module is not None and (code_of(module) in self.tied or type(module).__name__ in TIED_ATTENTION):
            heads = "dims"
        norm = module is not None and NORM_NAME.search(type(module).__name__) is not None
        found = self.codes[id(module)] = code_of(module), heads, norm
        return found

    def visit(self, name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        layer, module = self.stack[-1]
        code, heads, norm = self.codes.get(id(module)) or self.about(module)
        level = self.levels.get((self.trace.training, self.ordinal), 0) if self.levels else 0
        inputs = tensors(args, kwargs)
        call = Call(name, func, args, kwargs, out, self.ledger, inputs, level, heads, norm, layer)
        found = rule(name, func)
        mark = found or frozen
        labelled = any(marks_of(t).fields for t in inputs)
        self.used.update(map(id, inputs))
        if name == "_local_scalar_dense" and args[0].dtype is torch.bool:
            self.trace.decides.add(layer)
        if not self.trace.literal and not self._follows(call, found, labelled, module):
            self.trace.literal = True
        local = labelled and (name in LOCAL or name in NORMS)
        source = (args[0].shape, marks_of(args[0])) if local else None
        if found is None and labelled:
            self.trace.unknown[str(func)] = layer
        if call.level >= FROZEN_LEVEL:
            mark = frozen
        try:
            result = mark(call)
        except (Unsupported, ZeroDivisionError, IndexError, ValueError, TypeError, AssertionError):
            result = frozen(call)
            if labelled:
                self.trace.unknown[str(func)] = layer
        self._write(call, result, source, code)

    def _follows(self, call: Call, found: Any, labelled: bool, module: nn.Module | None) -> bool:
        """Whether an operator surely follows new widths: no size in its arguments is written by the model's code."""
        if found is factory:
            return all(not isinstance(t, Tensor) or t.dim() < 2 for t in (call.out,))
        if not labelled or found is pointwise:
            return True
        if call.name in ("view", "_unsafe_view"):
            return self.flattening
        if call.name == "convolution":
            return call.args[8] == 1 or isinstance(module, _ConvNd)
        if call.name in ("native_layer_norm", "native_group_norm"):
            return isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        return call.name in FOLLOWING or found is per_channel

    def _write(self, call: Call, result: Result, source: Any, code: str) -> None:
        outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
        marks = result if isinstance(result, (tuple, list)) else (result,)
        if len(marks) != len(outs):
            marks = tuple(marks[0] for _ in outs)
        seen = []
        for tensor, mark in zip(outs, marks, strict=True):
            if isinstance(tensor, Tensor):
                mark = self._checked(tensor, mark)
                tensor._prune_marks = mark  # type: ignore[attr-defined]
                shape = tuple(tensor.shape)
                if 0 in tensor.stride():
                    free = {a for a, stride in enumerate(tensor.stride()) if not stride and shape[a] > 1}
                    free -= {a for label in mark.fields for a in varied(label)}
                    shape = tuple(FREE if a in free else n for a, n in enumerate(shape))
                seen.append((shape, mark))
        self.trace.steps.append(
            Step(
                call.name,
                call.func,
                call.layer,
                tuple(seen),
                source,
                call.norm or (source is not None and source[1].kind is Kind.WEIGHT),
                code,
                scalar_of(call.name, call.args),
            )
        )
        if call.heads and call.cut and seen and seen[0][1].fields:
            self.trace.cuts.append(Cut(call.layer, tuple(call.out.shape), seen[0][1].fields[0]))
        if "split" in call.name and len(seen) > 1 and seen[0][1].fields:
            axis = axis_of(call.arg(2, "dim", 0), call.args[0].dim())
            parts = [[f for f in mark.fields if varied(f) == (axis,)] for _, mark in seen]
            if all(parts):
                lines = tuple(vector(found[0], axis) for found in parts)
                self.trace.splits.append((call.layer, lines))
                if call.name == "split_with_sizes" and not call.level:
                    for line in lines:
                        self._same(call, line)
        self.trace.bounds.extend((call.layer, line) for line in call.bounds if self._same(call, line))
        if call.name == "constant_pad_nd" and seen and seen[0][1].fields:
            self.trace.pads.extend((call.layer, line) for line in _zeros_first(call.args[1], seen[0][1].fields))
        if call.name in ("native_layer_norm", "_fused_rms_norm"):
            axes = len(call.args[1])
            for label in marks_of(call.args[0]).fields:
                self.trace.widths.append((call.layer, tuple(call.args[1]), label[(0,) * (label.dim() - axes)]))

    def _same(self, call: Call, line: Tensor) -> bool:
        """Whether an attribute of the module says how many positions a slice or a split takes; then equal ones stay
        wherever it is used."""
        module = self.stack[-1][1]
        if module is None or not widths_of(module, len(line)):
            return False
        self.ledger.tie(self.counted.setdefault((call.layer, len(line)), line), line)
        return True

    def _checked(self, tensor: Tensor, mark: Marks) -> Marks:
        if all(label.shape == tensor.shape for label in mark.fields):
            return mark
        for label in mark.fields:
            self.ledger.freeze(label)
        return NOTHING


def code_of(module: nn.Module | None) -> str:
    """Names the code that a module runs; "" for single layers, which say nothing about the code around
    them."""
    if module is None:
        return ""
    kind = type(module)
    if not module._modules and kind.__module__.startswith("torch.nn"):
        return ""
    return f"{kind.__module__}.{kind.__qualname__}"


def scalar_of(name: str, args: tuple) -> float | None:
    """The number that a tensor meets: of products the factor (a division counts as its inverse)."""
    if name not in SCALARS or len(args) < 2:
        return None
    number = args[1]
    if isinstance(number, Tensor):
        number = number.item() if number.dim() == 0 and not marks_of(number).fields else None
    if not isinstance(number, (int, float)) or not number:
        return None
    return 1.0 / number if name == "div" else float(number)


def has_heads(module: nn.Module | None) -> bool:
    """Whether a module says how many attention heads it has."""
    if module is None:
        return False
    plain = module.__dict__
    places = (plain, plain["_modules"], plain["_parameters"], plain["_buffers"])
    kind: type = type(module)
    return _class_has_heads(kind) or not all(place.keys().isdisjoint(HEAD_COUNTS) for place in places)


@lru_cache(maxsize=4096)
def _class_has_heads(kind: type) -> bool:
    return any(hasattr(kind, name) for name in HEAD_COUNTS)


def query_projection(module: nn.Module) -> str | None:
    """The name of the weight that makes the queries: (3 * width, width) with keys and values, else (width, width)."""
    square = None
    for name, parameter in module.named_parameters():
        if name.count(".") > 1 or parameter.dim() != 2:
            continue
        if parameter.shape[0] == 3 * parameter.shape[1]:
            return name
        if square is None and parameter.shape[0] == parameter.shape[1] and name.startswith(("q", "to_q", "wq")):
            square = name
    return square


def scales_queries(module: nn.Module | None) -> bool:
    """Whether a factor in this module's code can be folded into the weight that makes its queries."""
    return module is not None and code_of(module) != "" and query_projection(module) is not None


class Refused(Exception):
    """The small network did not follow at one operator."""

    def __init__(self, ordinal: int, layer: str, name: str, why: str) -> None:
        super().__init__(f"{name} in {layer or 'the model'}: {why}")
        self.ordinal, self.layer, self.name = ordinal, layer, name
        self.trace = 0  # which of the plan's traces


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
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(tracer.patches())
        stack.enter_context(tracer)
        yield


def execute(model: nn.Module, example: Example, tracer: Tracer, training: bool) -> list[Tensor]:
    """Runs the model under a tracer.

    Args:
        model: The network.
        example: Example inputs.
        tracer: Sees every operator.
        training: Containers in training mode (auxiliary heads run), layers in evaluation mode.

    Returns:
        The tensors in the model's output.

    Raises:
        SurgeryError: The model does not run on the example.
        Refused: The small network did not follow.
    """
    with _quiet(tracer, training):
        try:
            return [t for t in tree_leaves(_plain(call_model(model, example))) if isinstance(t, Tensor)]
        except Refused:
            raise
        except Exception as error:
            raise tracer.failed(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error


def _plain(output: Any) -> Any:
    """Opens objects such as Hugging Face's outputs, which behave like dicts."""
    if isinstance(output, (Tensor, tuple, list, dict)):
        return output
    if hasattr(output, "items"):
        return dict(output.items())
    return list(vars(output).values()) if hasattr(output, "__dict__") else output


def mark_parameters(
    model: nn.Module, modules: Modules, ledger: Ledger, tied: frozenset[str] = frozenset()
) -> Parameters:
    """Gives every axis of every floating-point parameter and buffer its own variables.

    Returns:
        Per distinct parameter or buffer name: the tensor and, per axis, its first variable.
    """
    found: Parameters = {}
    blank = {  # buffers that may be constant zeros, as a bias of keys that is never trained
        f"{name}.{key}"
        for name, module in modules
        if module._buffers and not isinstance(module, _NormBase)
        for key in module._buffers
        if key.endswith("bias")
    }
    kernels = {id(module._parameters.get("weight")) for _, module in modules if isinstance(module, _ConvNd)}
    for name, tensor in named_tensors(model, again=False).items():
        if not tensor.is_floating_point():
            continue
        first, fields = {}, []
        axes = 2 if id(tensor) in kernels else tensor.dim()  # what is left of a kernel keeps its size
        for axis, size in enumerate(tensor.shape[:axes]):
            if size > 1:
                first[axis] = ledger.count
                fields.append(ledger.fresh_along(axis, tensor.shape))
        zero = type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter) or (name in blank and not tensor.any())
        tensor._prune_marks = Marks(tuple(fields), Kind.WEIGHT, zero)  # type: ignore[attr-defined]
        found[name] = (tensor, first)
    for name, module in modules:
        projection = TIED_ATTENTION.get(type(module).__name__)
        if projection is None and code_of(module) in tied:
            projection = query_projection(module)
        if projection == "in_proj_weight" and module._parameters.get(projection) is None:
            projection = "q_proj_weight"
        full = f"{name}.{projection}" if name else projection
        if projection and full in found:
            tensor, first = found[full]
            fields_ = marks_of(tensor).fields
            if len(fields_) == 2 and tensor.shape[0] in (tensor.shape[1], 3 * tensor.shape[1]):
                ledger.tie(fields_[0][: tensor.shape[1], 0], fields_[1][0])
    return found


def unmark(parameters: Parameters) -> None:
    """Removes the marks from parameters and buffers."""
    for tensor, _ in parameters.values():
        tensor.__dict__.pop("_prune_marks", None)
