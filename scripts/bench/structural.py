"""Cost of structural pruning in CPU seconds of one thread, beside the model's forward pass and the peer (torch-pruning).

    python scripts/bench/structural.py --models resnet18,mobilenet_v2 --rounds 5
    python scripts/bench/structural.py --models '.*' --rounds 3 --quick --out outputs/structural.csv   # all

Models that are in the CSV already are not measured again: the same command goes on, or prints the summary.

Contenders take turns (A B A B ...); every figure is a median of CPU time, so other load on the machine matters little.
Neither side scores channels: ours removes the first ones, the peer random ones. Per model:

- forwards: analyse + shrink, in forward passes at batch 1; less_copy: the same without one copy of the parameters
- speedup: the peer's time over ours, at least that where the peer was given up; peer: whether it runs, or why not
- count_speedup: building and counting a candidate, over counting it by arithmetic
- memory: peak of a fresh process that analyses and shrinks, in (model + one forward pass)

--quick leaves out the last two.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import math
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from prune_cli.structure import follow, surgery
from prune_cli.structure.keep import lowest_units

DEFAULT = "resnet18,resnet50,mobilenet_v2,efficientnet_b0,densenet121"
COLUMNS = (
    "model", "forward_ms", "copy_ms", "analyse_ms", "shrink_ms", "peer_ms", "forwards", "less_copy", "speedup",
    "count_speedup", "memory", "peer",
)  # fmt: skip
SUMMARY = ("forwards", "less_copy", "speedup", "count_speedup", "memory")


def timed(function: Callable[[], Any]) -> float:
    """CPU seconds of one call, which does not collect the garbage of the one before."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A torchvision classifier at its own input size, weights as they come."""
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **options).eval(), torch.randn(1, 3, size, size)


def ours(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Analyse, halve every family, shrink; CPU seconds of analysis, and of selection and shrinking."""
    gc.collect()
    start = time.process_time()
    plan = follow.analyse(model, example)
    middle = time.process_time()
    surgery.remove_units(model, plan, lowest_units(plan, None, 0.5))
    return middle - start, time.process_time() - middle


def peer(model: nn.Module, example: Tensor) -> None:
    """The same with torch-pruning, which changes the model in place."""
    import torch_pruning

    classifiers = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000]
    torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=classifiers,
    ).step()


def forward(model: nn.Module, example: Tensor) -> None:
    """One forward pass."""
    with torch.no_grad():
        model(example)


def counting(model: nn.Module, example: Tensor) -> float:
    """How many times faster a candidate is counted by arithmetic than by building and counting it."""
    plan = follow.analyse(model, example)
    keep = lowest_units(plan, None, 0.5)

    def built() -> None:
        small = surgery.remove_units(model, plan, keep).model
        with FlopCounterMode(display=False), torch.no_grad():
            small.to("meta")(example.to("meta"))

    many = 500
    arithmetic = timed(lambda: [plan.count(keep) for _ in range(many)]) / many
    return statistics.median(timed(built) for _ in range(3)) / arithmetic


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the code inside after so many CPU seconds."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(name: str, rounds: int, with_peer: bool, patience: float, limit: float, quick: bool) -> dict[str, Any]:
    """One row."""
    model, example = build(name)
    forward(model, example)
    ours(model, example)
    times: dict[str, list[float]] = {key: [] for key in ("forward", "copy", "analyse", "shrink", "ours", "peer")}
    verdict = "runs" if with_peer else ""
    for _ in range(rounds):
        times["forward"].append(timed(lambda: forward(model, example)))
        analyse, shrink = ours(model, example)
        times["analyse"].append(analyse)
        times["shrink"].append(shrink)
        times["ours"].append(analyse + shrink)
        times["copy"].append(timed(lambda: [p.detach().clone() for p in model.parameters()]))
        if verdict == "runs" and sum(times["peer"]) < patience:
            theirs = copy.deepcopy(model)
            try:
                with limited(limit):
                    times["peer"].append(timed(partial(peer, theirs, example)))
            except TimeoutError as error:
                times["peer"].append(limit)
                verdict = str(error)
            except Exception as error:
                verdict = f"fails: {type(error).__name__}: {error}".splitlines()[0][:80]
    middle = {key: statistics.median(values) if values else float("nan") for key, values in times.items()}
    return {
        "model": name,
        **{f"{key}_ms": 1e3 * middle[key] for key in ("forward", "copy", "analyse", "shrink", "peer")},
        "forwards": middle["ours"] / middle["forward"],
        "less_copy": (middle["ours"] - middle["copy"]) / middle["forward"],
        "speedup": middle["peer"] / middle["ours"],
        "count_speedup": math.nan if quick else counting(model, example),
        "memory": math.nan if quick else memory(name),
        "peer": verdict,
    }


def tiny() -> tuple[nn.Module, Tensor]:
    """What warms everything up."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    return model, torch.randn(1, 3, 8, 8)


def resident() -> float:
    """Highest resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the usage counter below may start at the parent's memory
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return float(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024.0)


def peak(name: str, prune: bool) -> float:
    """Bytes that the model and a forward pass, with or without pruning, add to a process that has run a small model."""
    forward(*tiny())
    ours(*tiny())
    import torchvision  # noqa: F401 (its memory is no part of the model)

    start = resident()
    model, example = build(name)
    if prune:
        ours(model, example)
    else:
        forward(model, example)
    return resident() - start


def memory(name: str) -> float:
    """Peak memory of pruning in units of the model plus one forward pass."""
    found = []
    for mode in ("forward", "prune"):
        command = [sys.executable, __file__, "--peak", name, mode]
        found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return found[1] / found[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=DEFAULT, help="names or regular expressions, comma separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds after which the peer is given up")
    parser.add_argument("--quick", action="store_true", help="times only: no counting, no memory")
    parser.add_argument("--patience", type=float, default=20.0, help="CPU seconds per model after which the peer rests")
    parser.add_argument("--out", type=Path, default=None, help="CSV")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(peak(args.peak[0], args.peak[1] == "prune"))
        return
    import torchvision

    if not args.no_peer:  # imports and caches of both sides are warm
        peer(*tiny())
    known = torchvision.models.list_models(module=torchvision.models)
    listed = [n for n in known if any(re.fullmatch(part, n) for part in args.models.split(","))]
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        with args.out.open(newline="") as file:
            rows = [
                {k: v if k in ("model", "peer") else float(v) for k, v in row.items()} for row in csv.DictReader(file)
            ]
    for name in listed:
        if any(row["model"] == name for row in rows):
            continue
        rows.append(measure(name, args.rounds, not args.no_peer, args.patience, args.limit, args.quick))
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else v for k, v in rows[-1].items()), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    for key in SUMMARY:
        values = [row[key] for row in rows if row[key] == row[key]]
        if values:
            print(
                f"median {key}: {statistics.median(values):.2f} over {len(values)} models, "
                f"lowest {min(values):.2f}, highest {max(values):.2f}"
            )


if __name__ == "__main__":
    main()
