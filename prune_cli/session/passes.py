"""Norm statistics and accuracy of candidates, executed no further than each one's change reaches.

What comes to a cut in front of a change is the same for all candidates that change nothing in front of it: it is kept, of
the training images that norm statistics are estimated on and of the held-out images, as long as memory allows. What is found
that way is bit for bit what the whole execution finds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_cli.data.dataset import Batch
from prune_cli.measure.accuracy import accuracy
from prune_cli.structure.cuts import Cut, Entry, Execution, entered, executed, holds, watched
from prune_cli.structure.modes import composed_attention, evaluating
from prune_cli.training.batch_norm import recalibrate_bn

MEMORY = 1 << 30  # bytes of what comes to cuts, at most
IMAGES = 1 << 28  # bytes of images that are kept as they are fed, at most
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
CLOSE = 1e-3  # logits of two layouts differ by less, of their largest

Weights = dict[str, Tensor]
Batches = Callable[[], Iterable[Batch]]


@dataclass
class _Came:
    """What came to one cut, batch by batch: of calibration images and of held-out ones."""

    calibration: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)


class Passes:
    """Executes one network, and others of its kind, on the images that candidates are scored on.

    Args:
        model: the network.
        calibration, held_out: give the images; the same every time.
        shape: of an image.
        work: gives the multiply-adds of the network's layers by module name; what to keep is decided by it.

    Attributes:
        base: the network in front of all changes, with norm statistics as they are estimated at the cuts that are kept and
            in front of them; None: nothing is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Batches,
        held_out: Batches,
        shape: Sequence[int],
        work: Callable[[], Mapping[str, int]],
    ) -> None:
        self._model = model
        device = next(iter(model.parameters())).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._probe = torch.randn(3, *shape).to(device)
        self._rows = _takes_rows(model, self._probe)
        self._calibration = _Kept(calibration, self._placed)
        self._held_out = _Kept(held_out, self._placed)
        self._norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        self._work = work
        self._execution: Execution | None = None
        self._holding: dict[str, bool] = {}
        self._came: dict[str, _Came] = {}
        self._cuts: list[Cut] = []  # of which it is kept what came
        self.base: Weights | None = None

    def _placed(self, images: Tensor) -> Tensor:
        """Channels last in memory, where the network takes images so on a CPU: that is the faster way there."""
        return images.contiguous(memory_format=torch.channels_last) if self._rows else images

    # ------------------------------------------------------------------------------------------------------- cuts

    @property
    def execution(self) -> Execution:
        """How the network is executed; followed once."""
        if self._execution is None:
            self._execution = executed(self._model, self._placed(self._probe[:1]))
        return self._execution

    def cut_for(self, changed: Iterable[str], among: Sequence[Cut] | None = None) -> Cut | None:
        """The last cut behind which all of the changed parameters are used; None: there is none."""
        place = self.execution.place(changed)
        for cut in reversed(self.execution.cuts if among is None else among):
            if cut.at < place and self._held(cut):
                return cut
        return None

    def _held(self, cut: Cut) -> bool:
        if cut.module not in self._holding:
            self._holding[cut.module] = holds(self._model, cut, self._placed(self._probe))
        return self._holding[cut.module]

    def behind(self, cut: Cut | None) -> float:
        """What part of the network's work lies behind a cut."""
        if cut is None:
            return 1.0
        work, first = self._work(), self.execution.first
        total, later = sum(work.values()), sum(m for name, m in work.items() if first.get(f"{name}.weight", 0) > cut.at)
        return later / total if total else 1.0

    def expect(self, changes: Sequence[Iterable[str]], weights: Weights) -> None:
        """Keeps what comes to the cuts that spare most, if that is worth an execution of its own.

        Args:
            changes: the changed parameters of every candidate that is to come.
            weights: of the network in front of all changes.
        """
        if len(changes) < 2:
            return
        wanted: dict[str, tuple[Cut, float]] = {}
        for changed in changes:
            if cut := self.cut_for(changed):
                spared = wanted.get(cut.module, (cut, 0.0))[1]
                wanted[cut.module] = cut, spared + 1 - self.behind(cut)
        start = self._cuts[-1] if self._cuts else None
        if sum(spared for _, spared in wanted.values()) <= self.behind(start):
            return
        images = sum(len(labels) for source in (self._calibration, self._held_out) for labels in source.labels)
        room = MEMORY - sum(4 * images * cut.size for cut in self._cuts)
        new: list[Cut] = []
        for cut, _ in sorted(wanted.values(), key=lambda one: (-one[1], one[0].at)):
            size = 4 * images * cut.size
            if cut.module not in self._came and size <= room:
                room -= size
                new.append(cut)
        if new:
            self._keep(start, sorted(new, key=lambda cut: cut.at), weights)

    def forget(self, weights: Weights) -> None:
        """Drops what came through weights that are others now; norm statistics follow from the weights.

        Args:
            weights: of the network in front of all changes, as they are now.
        """
        if self.base is None:
            return
        first, base = self.execution.first, self.base
        if any(base[name].shape != weights[name].shape for name in base):
            self._cuts = []
        statistics = {f"{norm}.{name}": norm for norm in self._norms for name in STATISTICS}
        changed = [name for name in base if name not in statistics and not torch.equal(base[name], weights[name])]
        end = self.execution.place(name for name in changed if name in first)
        self._cuts = [cut for cut in self._cuts if cut.at < end]
        self._came = {cut.module: self._came[cut.module] for cut in self._cuts}
        at = self._cuts[-1].at if self._cuts else -1
        estimated = {name for name, norm in statistics.items() if first.get(f"{norm}.running_mean", sys.maxsize) <= at}
        if changed:
            self.base = {name: base[name] if name in estimated else weights[name] for name in base}
        self.base = self.base if self._cuts else None

    def _keep(self, start: Cut | None, new: Sequence[Cut], weights: Weights) -> None:
        if start is not None and new[0].at < start.at:
            start = next((cut for cut in reversed(self._cuts) if cut.at < new[0].at), None)
        self._model.load_state_dict(weights if start is None or self.base is None else self.base)
        for cut in new:
            self._came[cut.module] = _Came()
        with watched(self._model, new, {cut.module: self._came[cut.module].calibration for cut in new}):
            self.estimate(self._model, start)
        with watched(self._model, new, {cut.module: self._came[cut.module].held_out for cut in new}):
            self.score(self._model, start)
        self._cuts = sorted([*self._cuts, *new], key=lambda cut: cut.at)
        self.base = {name: value.detach().clone() for name, value in self._model.state_dict().items()}

    def start(self, changed: Iterable[str]) -> Cut | None:
        """Where to go on from after a change to `base`; None: nothing is kept in front of it."""
        return self.cut_for(changed, self._cuts) if self._cuts else None

    # ----------------------------------------------------------------------------------------------------- passes

    def estimate(self, model: nn.Module, cut: Cut | None) -> None:
        """Estimates the statistics of the norms behind a cut again, where the network has norms with any.

        Args:
            model: the network, or a smaller one that is the same in front of the cut.
        """
        if cut is None and self._norms:
            with composed_attention():
                recalibrate_bn(model, self._calibration())
        if cut is None:
            return
        behind = {name for name in self._norms if self.execution.first.get(f"{name}.running_mean", 0) > cut.at}
        if behind:
            with entered(model, cut) as entry, composed_attention():
                batches = self._through(entry, self._came[cut.module].calibration, self._calibration)
                recalibrate_bn(model, batches, behind.__contains__)

    def score(self, model: nn.Module, cut: Cut | None) -> float:
        """Accuracy in percent on held-out images; see `estimate`."""
        if cut is None:
            with composed_attention():  # the fused one is not taken while modules are watched
                return accuracy(model, self._held_out()).acc1
        with entered(model, cut) as entry, composed_attention():
            return accuracy(model, self._through(entry, self._came[cut.module].held_out, self._held_out)).acc1

    def _through(self, entry: Entry, came: Sequence[Tensor], source: _Kept) -> Iterator[Batch]:
        blank = self._placed(self._probe[:1])
        for given, labels in zip(came, source.labels, strict=True):
            entry.given = given
            yield blank, labels

    def agree(self, model: nn.Module, other: nn.Module) -> bool:
        """Whether two networks give the same for some images, but for rounding."""
        images = self._placed(self._probe)
        with evaluating(model), evaluating(other), torch.no_grad():
            return _close(model(images), other(images))


class _Kept:
    """Images as they are fed, made once where they are few enough."""

    def __init__(self, make: Batches, placed: Callable[[Tensor], Tensor]) -> None:
        self._make, self._placed = make, placed
        self._batches: list[Batch] | None = None

    def __call__(self) -> Iterable[Batch]:
        if self._batches is not None:
            return self._batches
        found: list[Batch] = []
        size = 0
        for images, labels in self._make():
            size += images.numel() * images.element_size()
            if size > IMAGES:
                return ((self._placed(images), labels) for images, labels in self._make())
            found.append((self._placed(images), labels))
        self._batches = found
        return found

    @functools.cached_property
    def labels(self) -> list[Tensor]:
        """Of every batch, in the order of the images."""
        return [labels for _, labels in self()]


def _takes_rows(model: nn.Module, images: Tensor) -> bool:
    """Whether a network on a CPU gives the same for images that lie in memory with their channels last."""
    if images.device.type != "cpu" or images.dim() != 4:
        return False
    with evaluating(model), torch.no_grad():
        wanted = model(images)
        try:
            return _close(wanted, model(images.contiguous(memory_format=torch.channels_last)))
        except RuntimeError:  # views of its own that need the other layout
            return False


def _close(one: object, other: object) -> bool:
    first, second = (value if isinstance(value, Tensor) else value.logits for value in (one, other))  # type: ignore[attr-defined]
    if first.shape != second.shape or not torch.isfinite(first).all():
        return False
    return bool((first - second).abs().max() <= CLOSE * first.abs().max().clamp(min=1e-6))
