"""What a frozen teacher says of every training image in every augmentation, looked up instead of computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_cli.data.dataset import Batch, Numbered, Views
from prune_cli.progress import track

BATCH = 500  # images that a teacher looks at together


@dataclass(frozen=True, eq=False)
class Lesson:
    """The labels of a batch with teachers' logits of its images, in the place of labels alone.

    Attributes:
        labels: (batch,).
        logits: teacher -> (batch, classes).
    """

    labels: Tensor
    logits: Mapping[nn.Module, Tensor]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Lessons:
    """Training batches with lessons; implements `dataset.Batches`.

    Attributes:
        inner: those of a dataset that lists its views.
        tables: teacher -> its logits, (places among the views, classes), on any device.
    """

    inner: Numbered
    tables: Mapping[nn.Module, Tensor]

    def __len__(self) -> int:
        return len(self.inner)

    def size(self, step: int) -> int:
        """Images in the whole batch of `step`, over all shards."""
        return self.inner.size(step)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on."""
        rows = self.inner.rows(epoch, start)
        for (images, labels), places in zip(self.inner.epoch(epoch, start), rows, strict=True):
            said = {
                teacher: table.index_select(0, places.to(table.device)).to(labels.device, non_blocking=True)
                for teacher, table in self.tables.items()
            }
            yield images, Lesson(labels, said)


def logits_of(
    teacher: nn.Module, views: Views, start: int, *, lowered: bool, channels_last: bool, what: str
) -> Iterator[Tensor]:
    """What a teacher says of the views from place `start` on, in float32 on the CPU, a few at a time.

    Args:
        teacher: frozen, in evaluation.
        lowered: compute in bfloat16 (autocast), as the training does.
        channels_last: NHWC memory layout, as the training has it.
        what: for the bar.
    """
    batches = views.batches(BATCH, start)
    for images in track(batches, what, -(-(len(views) - start) // BATCH)):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16) if lowered else nullcontext():
            logits = teacher(images)
        yield logits.float().cpu()
