"""Which sizes that operators took were attributes of modules, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prune_cli.structure.labels import Constraints, Kind, Labelling, labelling_of, varied, vector
from prune_cli.structure.operators.call import Call, positive_axis
from prune_cli.structure.reads import Origin, Read, Watch
from prune_cli.structure.trace import Trace, Use

INDEXING = {"__getitem__", "__setitem__", "select", "narrow", "roll", "index_select"}


@dataclass(slots=True)
class Sizes:
    """Writes into a trace what it finds; sizes that one attribute gives at several places count the same positions."""

    trace: Trace
    constraints: Constraints
    counted: dict[tuple[Origin, int], Tensor] = field(default_factory=dict)

    def record(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> None:
        """Sees an operator inside a function that was given attributes, and the labellings of its outputs."""
        record = RECORDED.get(call.name)
        if record is None or not record(self, call, watch, labellings):
            for read in watch.reads:
                self._by_value(call, watch, read, labellings)

    def _flow(self, read: Read) -> None:
        self.trace.flows.update((origin.module, origin.key) for origin in read.origins)

    def _touch(self, call: Call, read: Read) -> None:
        self.trace.touched.update((len(self.trace.steps), call.layer, origin) for origin in read.origins)

    def _use(self, read: Read, label: Tensor | None, axis: int = 0) -> None:
        """The size is `read`; it counts `label` along the axis, or nothing that can change."""
        if not read.direct:
            if label is not None:
                self._flow(read)
            return
        for origin in read.origins:
            self.trace.uses.append(Use(origin, label, axis))

    def _by_value(self, call: Call, watch: Watch, read: Read, labellings: Sequence[Labelling]) -> None:
        """An operator deep inside a function: the attribute may be one of the widths that are near."""
        outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
        if watch.function in INDEXING:  # a place, not a size
            self._touch(call, read)
            return
        near = [(t, labelling_of(t)) for t in call.inputs] + list(zip(outs, labellings, strict=False))
        for tensor, known in near:
            if any(tensor.shape[axis] == int(read) for label in known.labels for axis in varied(label)):
                self._flow(read)
                return
        self._touch(call, read)

    def view(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """One size per axis."""
        if len(watch.sizes) != call.out.dim():
            return False
        for axis, size in enumerate(watch.sizes):
            if type(size) is Read:
                label = next((f for f in labellings[0].labels if axis in varied(f)), None)
                if label is None and (labellings[0].kind is Kind.UNIFORM or not call.out.stride(axis)):
                    self._touch(call, size)
                else:
                    self._use(size, label, axis)
        return True

    def slice(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """Bounds count what lies before them, or after them where they are negative."""
        axis = positive_axis(call.arg(1, "dim", 0), call.args[0].dim())
        labelled = any(axis in varied(label) for label in labelling_of(call.args[0]).labels)
        for read in watch.reads:
            if int(read) not in (call.arg(2, "start"), call.arg(3, "end")):
                continue
            lines = [line for line in call.bounds if len(line) == abs(int(read))]
            if not lines and not (labelled and not read.direct):
                self._use(read, None)
            for line in lines:
                self._use(read, line)
                self._same(read, line)
        return True

    def split(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """A size per part, or one for all."""
        if "split" not in watch.function:
            return False
        axis = positive_axis(call.arg(2, "dim", 0), call.args[0].dim())
        for size, part in zip(watch.sizes, labellings, strict=False):
            if type(size) is Read:
                label = next((f for f in part.labels if varied(f) == (axis,)), None)
                self._use(size, label, axis)
                if label is not None and call.name == "split_with_sizes" and not call.level:
                    self._same(size, vector(label, axis))
        return True

    def pad(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """Pairs of new positions, the last axis first."""
        if len(watch.sizes) != len(call.args[1]):
            return False
        for i, size in enumerate(watch.sizes):
            if type(size) is Read:
                axis = call.out.dim() - 1 - i // 2
                label = next((f for f in labellings[0].labels if varied(f) == (axis,)), None)
                if label is not None and int(size) > 0:
                    line = vector(label, axis)
                    self._use(size, line[: int(size)] if i % 2 == 0 else line[-int(size) :])
                else:
                    self._use(size, None)
        return True

    def norm(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """The sizes of the axes that are normalised, the last ones."""
        first = call.args[0].dim() - len(call.args[1])
        if watch.function not in ("layer_norm", "rms_norm") or len(watch.sizes) != len(call.args[1]):
            return False
        for i, size in enumerate(watch.sizes):
            if type(size) is Read:
                label = next((f for f in labelling_of(call.args[0]).labels if first + i in varied(f)), None)
                self._use(size, label, first + i)
        return True

    def groups(self, call: Call, watch: Watch, labellings: Sequence[Labelling]) -> bool:
        """As many groups as channels."""
        source, groups = call.args[0], call.args[8]
        for read in watch.reads:
            if int(read) == groups == source.shape[1]:
                self._use(read, next((f for f in labelling_of(source).labels if 1 in varied(f)), None), 1)
        return True

    def _same(self, read: Read, line: Tensor) -> None:
        for origin in read.origins if read.direct else ():
            self.constraints.tie(self.counted.setdefault((origin, len(line)), line), line)


Recorded = Callable[[Sizes, Call, Watch, Sequence[Labelling]], bool]
RECORDED: dict[str, Recorded] = {
    **dict.fromkeys(["view", "_unsafe_view", "_reshape_alias", "expand"], Sizes.view),
    "slice": Sizes.slice,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], Sizes.split),
    "constant_pad_nd": Sizes.pad,
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm"], Sizes.norm),
    "convolution": Sizes.groups,
}
