"""Features of a network: which modules they come from, and how a forward pass leaves them behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.distillation.distillation import Features, Outputs
from prune_cli.errors import ConfigError, nearest
from prune_cli.structure.modes import evaluating


class Taps:
    """Takes what some modules of a network give during a forward pass; hooks are on the modules inside `with` only.

    The hooks are on the network's own modules, so they also work while it is called through a wrapper
    (DistributedDataParallel, torch.compile). Outside of a call to these taps, as in evaluation, they keep nothing.

    Args:
        model: the network itself, without a wrapper.
        names: of its modules.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.names = model, tuple(dict.fromkeys(names))
        self.taken: dict[str, Any] = {}
        self.open = False
        self._hooked: ExitStack | None = None

    def __enter__(self) -> Taps:
        with ExitStack() as stack:
            for name in self.names:
                stack.callback(self.model.get_submodule(name).register_forward_hook(self._hook(name)).remove)
            self._hooked = stack.pop_all()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._hooked:
            self._hooked.close()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.open:
                self.taken[name] = output

        return take

    def __call__(self, forward: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The logits of a batch, and what each named module gave in its last call; names never called are absent.

        Args:
            forward: the network or a wrapper of it.
        """
        self.open = True
        try:
            logits = forward(images)
            return logits, {name: self.taken[name] for name in self.names if name in self.taken}
        finally:
            self.open = False
            self.taken.clear()


def outputs(logits: Tensor, taken: Mapping[str, Tensor], names: Mapping[str, str]) -> Outputs:
    """What a term is given of one network.

    Args:
        taken: module name -> feature.
        names: name for the term -> module name.
    """
    return Outputs(_wide(logits), {name: _wide(taken[module]) for name, module in names.items()})


def _wide(value: Tensor) -> Tensor:
    """Differences of features and logits are computed in float32 at least, also under autocast."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def pairs(features: Features, student: nn.Module, teacher: nn.Module, images: Tensor, key: str) -> dict[str, str]:
    """Student's module -> teacher's module, for each feature of a term.

    Args:
        images: example inputs, from which `auto` learns the sizes of maps.
        key: of the term in the recipe, for messages.

    Raises:
        ConfigError: names that do not exist, modules without a tensor of their own, or two networks in which `auto` does
            not find the same number of stages.
    """
    if features == "auto":
        ends = [stage_ends(model, images) for model in (student, teacher)]
        if not ends[0] or len(ends[0]) != len(ends[1]):
            found = " and ".join(
                f"{', '.join(names) or 'none'} in the {whose}"
                for whose, names in zip(("student", "teacher"), ends, strict=True)
            )
            raise ConfigError(
                f"{key}.features=auto takes the ends of stages, but finds {found}; name modules: "
                f"{key}.features=[NAME, ...] or {{STUDENT: TEACHER}}"
            )
        named = dict(zip(*ends, strict=True))
    else:
        named = dict(features) if isinstance(features, Mapping) else {name: name for name in features}
    _require(student, named.keys(), images, f"{key}.features: the student")
    _require(teacher, named.values(), images, f"{key}.features: the teacher")
    return named


def _require(model: nn.Module, names: Iterable[str], images: Tensor, whose: str) -> None:
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise ConfigError(f"{whose} has no module {name!r}{nearest(name, known)}")
    taken = looked_at(model, names, images)[1]
    for name in names:
        if name not in taken:
            raise ConfigError(f"{whose} never calls its module {name!r}; name one that takes part in the forward pass")
        if not isinstance(taken[name], Tensor):
            raise ConfigError(
                f"{whose}'s {name!r} gives a {type(taken[name]).__name__}, not a tensor; name a module inside or around it"
            )


def looked_at(model: nn.Module, names: Iterable[str], images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits and features of images in evaluation, the network left as it was."""
    with evaluating(model), torch.no_grad(), Taps(model, names) as taps:
        return taps(model, images)


def stage_ends(model: nn.Module, images: Tensor) -> list[str]:
    """The ends of the stages: the last module before the size of the maps changes, for every size above 1x1.

    Modules are those on the network's way from image to logits: its children, those inside an `nn.Sequential` among
    them, and those inside a child that gives the network's output (a wrapper); not what is inside blocks, where ways
    part. Of nested modules with the same output the outermost counts. A stem before a pooling is a stage of its own, and
    modules that are called more than once are left out. Examples: `layer1` to `layer3` of a CIFAR ResNet, the last ReLU
    before each pooling of a VGG, `conv1` and `conv2` of LeNet-5.
    """
    calls: list[tuple[str, Any]] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = _record(calls, name)
            stack.callback(module.register_forward_hook(hook).remove)
        looked_at(model, (), images)
    result = calls[-1][1]  # the network's own call ends last
    counts = Counter(name for name, _ in calls)
    outputs_of = dict(calls)

    def opened(name: str) -> bool:
        return isinstance(model.get_submodule(name), nn.Sequential) or outputs_of.get(name) is result

    ends: list[tuple[tuple[int, ...], str]] = []
    for name, output in calls:
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        if not name or counts[name] > 1 or not all(opened(parent) for parent in parents):
            continue
        if not isinstance(output, Tensor) or output.dim() != 4 or max(output.shape[2:]) == 1:
            continue
        size = tuple(output.shape[2:])
        if ends and ends[-1][0] == size:
            ends.pop()
        ends.append((size, name))
    return [name for _, name in ends]


def _record(calls: list[tuple[str, Any]], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.append((name, output))

    return record
