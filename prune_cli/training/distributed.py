"""Several processes as one run: `torchrun --nproc-per-node=N -m prune_cli run recipe=...`.

Every process runs the same stages on its shard of each batch. Only rank 0 locks, reads and writes the store and the
run folder; what it finds or decides is broadcast, and what criteria measure on shares of the calibration images is added
up. Control messages travel on the CPU (gloo), gradients by the backend that fits the device (nccl on GPUs).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prune_cli.errors import ConfigError
from prune_cli.training.batch_norm import BATCH_NORMS

PATIENCE = timedelta(minutes=30)  # for a rank that works on something alone


@dataclass(frozen=True)
class World:
    """This process among those of the run. The default is a run of one process."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process reads and writes files."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size), the share of every batch."""
        return self.rank, self.size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-serialisable value, on every rank."""
        if self.size == 1:
            return value
        text = [json.dumps(value) if self.main else None]
        dist.broadcast_object_list(text, src=0, group=_control())
        return json.loads(str(text[0]))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """One rank's tensors on every rank, on the CPU; the other ranks pass None."""
        if self.size == 1:
            return dict(tensors or {})
        mine = self.rank == source
        own = {name: value.detach().cpu().contiguous() for name, value in (tensors or {}).items()}
        told: list[Any] = [[(name, list(v.shape), str(v.dtype)[6:]) for name, v in own.items()] if mine else None]
        dist.broadcast_object_list(told, src=source, group=_control())
        shared = {}
        for name, shape, dtype in told[0]:
            value = own[name] if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            as_bytes = value.view(torch.uint8) if value.dtype == torch.bool else value
            dist.broadcast(as_bytes, src=source, group=_control())
            shared[name] = value
        return shared

    def any(self, flag: bool) -> bool:
        """Whether some rank says so; the same answer on every rank."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag))) > 0)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks of a small tensor, on the CPU."""
        if self.size == 1:
            return value
        summed = value.detach().double().cpu()
        dist.all_reduce(summed, group=_control())
        return summed

    def add_up(self, value: Tensor) -> None:
        """Makes a tensor on the run's device the sum over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(value)

    def agree(self, what: str, value: str) -> None:
        """Checks that all ranks have the same value.

        Raises:
            ConfigError: they differ.
        """
        if self.size == 1:
            return
        own = hashlib.sha256(value.encode()).hexdigest()
        all_of_them: list[Any] = [None] * self.size
        dist.all_gather_object(all_of_them, own, group=_control())
        if len(set(all_of_them)) > 1:
            ranks = [rank for rank, other in enumerate(all_of_them) if other != all_of_them[0]]
            raise ConfigError(
                f"{what} of rank {', '.join(map(str, ranks))} differs from that of rank 0; start all alike"
            )


ALONE = World()

_groups: dict[str, Any] = {}


def _control() -> Any:
    """The group for messages on the CPU: the default one, or a gloo group beside nccl."""
    if dist.get_backend() == "gloo":
        return None
    if "control" not in _groups:
        _groups["control"] = dist.new_group(backend="gloo")
    return _groups["control"]


def started_by_torchrun() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Joins the other processes of the run, if there are any, for the time of the context."""
    if not started_by_torchrun():
        yield ALONE
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    store = dist.PrefixStore(_start(store, rank, size), store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
        dist.barrier(group=_control())  # nobody takes the connections down while another still uses them
    finally:
        _groups.clear()
        dist.destroy_process_group()


def _start(store: Any, rank: int, size: int) -> str:
    """A name for this start of all ranks, the same on each, that no earlier start had.

    Processes that torchrun restarts find the addresses of the dead ones in its store, under the same keys. So every
    rank says there that it is new, and rank 0, which no dead rank 0 can answer for, hands each the name it drew.
    """
    if rank:
        own = uuid4().hex
        store.set(f"prune/joining/{rank}", own)
        name = str(store.get(f"prune/start/{own}").decode())
        store.set(f"{name}/{rank}", "here")
        return name
    name = f"prune/{uuid4().hex}"
    missing, until = set(range(1, size)), time.monotonic() + PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"ranks {', '.join(map(str, sorted(missing)))} did not start")
        for other in sorted(missing):
            if store.check([f"prune/joining/{other}"]):
                store.set(f"prune/start/{store.get(f'prune/joining/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        time.sleep(0.02)
    return name


def leave() -> NoReturn:
    """Ends a process that is done. The teardown of gloo's threads at exit was seen to abort processes that were."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where several processes share a machine with several."""
    if device.type == "cuda" and device.index is None and started_by_torchrun():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@contextmanager
def parallel(model: nn.Module, world: World, *, sync_norms: bool) -> Iterator[nn.Module]:
    """The module to call in training: the model itself, or a wrapper that averages gradients over all ranks.

    Args:
        sync_norms: batch norms use the statistics of the whole batch (GPUs only); else each rank uses its shard's, and
            rank 0's running statistics are kept.

    Raises:
        ConfigError: synced norms on a CPU, which torch does not have.
    """
    if world.size == 1:
        yield model
        return
    device = next(model.parameters()).device
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)] if sync_norms else []
    if norms and device.type != "cuda":
        raise ConfigError("fit.sync_norms=true needs GPUs: torch synchronises batch norms there only")
    kinds = [type(norm) for norm in norms]
    for norm in norms:
        norm.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
        norm.process_group = None  # type: ignore[assignment]
    try:
        yield DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind


def same_masks(world: World, masks: Mapping[str, Tensor]) -> None:
    """Checks that every rank chose bit-equal masks; called at each mask update.

    Raises:
        RuntimeError: they differ, which is a bug: training on would average gradients of different networks.
    """
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].cpu().contiguous().numpy().tobytes())
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, digest.hexdigest(), group=_control())
    if len(set(found)) > 1:
        raise RuntimeError(f"masks differ between ranks ({found})")
