"""Which networks prune, and exactly: one row per network, as CSV and as a table.

Every network loses half of its channels (random scores) by `prune_cli.shrink`. Then, without the engine: a copy of the
dense network has zeros where `Lineage.kept` leaves something out, and is compared with the small one on the example, on
other values and on a batch of three; the small network trains a step, is saved and loaded bit for bit, counts as many
parameters as were predicted; the dense network is what it was, bit for bit. Each network has a process of its own with
60 s of CPU time for `shrink` and 4 GiB of memory. Packages that are not there are skipped.

    python scripts/coverage.py --models 'resnet.*' --out outputs/coverage.csv
    python scripts/coverage.py --out outputs/a.csv --part 0/2            # one half of everything
    python scripts/coverage.py --table outputs/coverage.csv              # the counts of a CSV

A row says exact, frozen (nothing could go; why), refused (one line of ours; why), wrong, hung, memory, or crashed (a
traceback of ours); `broken` is a network that does not run by itself. Networks that are in the CSV are not tried again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import math
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from zoo import Case, adversarial, oracle, packages, toys, transformer_models, vision  # noqa: E402

from prune_cli import load_pruned, save_pruned, shrink  # noqa: E402
from prune_cli import report as report_on  # noqa: E402
from prune_cli.errors import PruneError  # noqa: E402
from prune_cli.structure.interpreter import call_model  # noqa: E402

SECONDS, GIB = 60, 4
WALL = 900  # a process that sleeps
COLUMNS = (
    "source", "model", "verdict", "why", "params", "share_kept", "macs_share", "counted", "error", "error_values",
    "error_batch", "precision", "trains", "loads", "stay_whole", "shrink_s", "forward_s",
)  # fmt: skip
LIMITS = {"float64": 1e-8, "float32": 2e-4}


def cases() -> list[Case]:
    """All networks of the packages that are there."""
    found: list[Case] = []
    for module in (vision, toys, adversarial, transformer_models, packages):
        found += module.cases()
    return found


def randomise(model: nn.Module) -> None:
    """Fills weights, norm parameters, biases and running statistics with values that are far from special."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                low, high = (0.5, 1.0) if name.endswith("weight") else (-0.25, 0.25)
                parameter.uniform_(low, high, generator=generator)
            else:
                fan = max(math.prod(parameter.shape[1:]), 1)
                parameter.uniform_(-1.7 / math.sqrt(fan), 1.7 / math.sqrt(fan), generator=generator)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)


def made(case: Case) -> tuple[nn.Module, Any]:
    """The dense network, in evaluation, and how inputs are made."""
    torch.manual_seed(0)
    model, inputs = case.build()
    if not case.plain:
        randomise(model)
    return model.eval(), inputs


def doubled(value: Any) -> Any:
    """Floating-point tensors in double precision."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, value)


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The model's floating-point outputs, on inputs of its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        copied = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, example)
        return [t.detach().clone() for t in oracle.outputs(call_model(model, copied))]


def trained(model: nn.Module, example: Any) -> str:
    """One step of SGD in training mode: `yes`, or what went wrong."""
    model.train()
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        found = [t for t in oracle.outputs(call_model(model, example)) if t.requires_grad]
        if not found:
            return "no gradients"
        sum(t.abs().square().mean() for t in found).backward()  # type: ignore[union-attr]
        optimizer.step()
        return "yes"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    finally:
        model.eval()


def state_of(model: nn.Module) -> list[Any]:
    """Everything that must not change: tensors, modes, what is trained."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return [digest.digest(), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]


def examine(case: Case, told: Any) -> None:
    """Prunes one network and tells what was found, by parts: what a process that is killed has told stays."""
    random = torch.Generator().manual_seed(1)
    model, inputs = made(case)
    total = sum(p.numel() for p in model.parameters())
    told(params=total, verdict="broken")
    samples = [inputs(1, random), inputs(1, random), inputs(3, random)]
    precision = "float32"
    if total < 60e6:
        with suppress(Exception):
            twin = model.double()
            if all(bool(t.isfinite().any()) for t in run(twin, doubled(samples[0]))):
                model, samples, precision = twin, doubled(samples), "float64"
        if precision == "float32":
            model = model.float()
    try:
        start = time.process_time()
        if not all(bool(t.isfinite().any()) for t in run(model, samples[0])):
            told(verdict="broken", why="its outputs are not finite")
            return
        told(forward_s=round(time.process_time() - start, 3), precision=precision)
    except Exception as error:
        told(verdict="broken", why=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        return
    before, given = state_of(model), [t.clone() for t in tree_leaves(samples[0]) if isinstance(t, Tensor)]
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + SECONDS + 1, resource.RLIM_INFINITY))
    told(verdict="hung", why="in shrink")
    try:
        small = shrink(model, samples[0], ratio=0.5, criterion="random", warn=False)
    except PruneError as error:
        lines = str(error).splitlines()
        told(verdict="refused" if len(lines) == 1 else "crashed", why=lines[0][:300])
        return
    except MemoryError:
        told(verdict="memory", why="in shrink")
        return
    except Exception as error:
        memory = "can't allocate memory" in str(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        told(verdict="memory" if memory else "crashed",
             why=f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})".replace("\n", " ")[:300])  # fmt: skip
        return
    told(shrink_s=round(time.process_time() - start, 3), verdict="hung", why="in the check")
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    report = report_on(small)
    kept = sum(p.numel() for p in small.parameters())
    stay = [one for one in report.whole if not one.output]
    told(
        share_kept=round(kept / total, 4) if total else 1.0,
        macs_share=round(report.predicted.macs / report.dense.macs, 4) if report.dense.macs else "",
        counted="" if report.realised is None else report.realised.macs == report.predicted.macs,
        stay_whole=len(stay),
        why="; ".join(dict.fromkeys(one.reason for one in stay or report.whole))[:300],
    )
    faults = []
    if report.predicted.params != kept:
        faults.append(f"{report.predicted.params} parameters predicted, {kept} there")
    if before != state_of(model):
        faults.append("the dense network was changed")
    if any(not torch.equal(a, b) for a, b in
           zip(given, (t for t in tree_leaves(samples[0]) if isinstance(t, Tensor)), strict=True)):  # fmt: skip
        faults.append("the example was changed")
    faults += compared(model, small, samples, precision, told)
    faults += loaded(case, small, samples[0], precision, told)
    now = trained(small, samples[2])
    told(trains=now)
    if now not in ("yes", "no gradients") and trained(model, samples[2]) == "yes":
        faults.append(f"does not train: {now}")
    if faults:
        told(verdict="wrong", why="; ".join(faults)[:300])
    else:
        told(verdict="frozen" if kept == total else "exact")
        if kept < total:
            told(why="")


def compared(model: nn.Module, small: nn.Module, samples: list[Any], precision: str, told: Any) -> list[str]:
    """Where the small network differs from the masked one: on the example, other values, another batch."""
    kept = small._prune_record.lineage.kept
    twin = oracle.masked(model, kept)
    norms = oracle.CutNorms(model, twin, kept)
    faults = []
    for name, example in zip(("error", "error_values", "error_batch"), samples, strict=True):
        try:
            run(model, example)
        except Exception:
            continue  # the dense network does not take it either
        try:
            torch.manual_seed(0)
            with oracle.composed(), norms:
                want = run(twin, example)
        except Exception as error:
            told(**{name: f"no reference: {type(error).__name__}: {error}".splitlines()[0][:80]})
            continue
        if any(not bool(t.isfinite().any()) for t in want):
            told(**{name: "reference is not finite"})
            continue
        try:
            worst = oracle.difference(want, run(small, example))
        except Exception as error:
            faults.append(f"{name}: the small network fails: {type(error).__name__}: {error}".splitlines()[0][:160])
            continue
        told(**{name: f"{worst:.1e}"})
        if not worst <= LIMITS[precision]:
            faults.append(f"{name} {worst:.1e}")
    return faults


def loaded(case: Case, small: nn.Module, example: Any, precision: str, told: Any) -> list[str]:
    """Whether it comes back bit for bit from two files and a dense network made anew."""
    fresh, _ = made(case)
    if precision == "float64":
        fresh = fresh.double()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_pruned(small, folder)
            again = load_pruned(folder, model=fresh)
        except PruneError as error:
            told(loads="refused")
            return [f"is not loaded: {error}"]
    a, b = small.state_dict(), again.state_dict()
    if a.keys() != b.keys() or any(
        not torch.equal(a[name], b[name]) for name in a if isinstance(a[name], Tensor) and not a[name].isnan().any()
    ):
        told(loads="differs")
        return ["weights that are loaded differ"]
    if any(not torch.equal(x, y) for x, y in zip(run(small, example), run(again, example), strict=True)):
        told(loads="differs")
        return ["outputs of what is loaded differ"]
    told(loads="yes")
    return []


# ------------------------------------------------------------------------------------------------------- processes


def in_process(case: Case) -> dict[str, Any]:
    """The row of a network, examined in a process of its own that is stopped at its limits."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(case, writing)
    os.close(writing)
    row: dict[str, Any] = {"source": case.source, "model": case.name, "verdict": "crashed", "why": "died"}
    begin, state, text, slept = time.monotonic(), None, b"", False
    os.set_blocking(reading, False)
    while state is None:
        time.sleep(0.05)
        with suppress(BlockingIOError):
            text += os.read(reading, 1 << 20)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            state = status
        elif time.monotonic() - begin > WALL:
            os.kill(child, signal.SIGKILL)
            slept = True
            state = os.waitpid(child, 0)[1]
    with suppress(BlockingIOError):
        while part := os.read(reading, 1 << 20):
            text += part
    os.close(reading)
    for line in text.decode(errors="replace").splitlines():
        row |= json.loads(line)
    if os.WIFSIGNALED(state) and os.WTERMSIG(state) == signal.SIGKILL and not slept:
        row |= {"verdict": "memory", "why": f"killed {row['why']}"}
    elif os.WIFSIGNALED(state) and os.WTERMSIG(state) not in (signal.SIGXCPU, signal.SIGKILL):
        row |= {"verdict": "crashed", "why": f"signal {os.WTERMSIG(state)}"}
    return row


def _child(case: Case, writing: int) -> None:
    """Examines and leaves; never returns."""
    with os.fdopen(writing, "w", buffering=1) as pipe:

        def told(**found: Any) -> None:
            pipe.write(json.dumps(found, default=str) + "\n")

        resource.setrlimit(resource.RLIMIT_DATA, (GIB << 30, GIB << 30))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            examine(case, told)
        except MemoryError:
            told(verdict="memory", why="outside shrink")
        except Exception as error:
            memory = "can't allocate memory" in str(error)
            last = traceback.extract_tb(error.__traceback__)[-1]
            told(verdict="memory" if memory else "broken",
                 why=f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})".replace("\n", " ")[:300])  # fmt: skip
    os._exit(0)


# ------------------------------------------------------------------------------------------------------- the table


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by source, and every row that is not exact."""
    verdicts = ("exact", "frozen", "refused", "wrong", "hung", "memory", "crashed", "broken")
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row)
    lines = [
        "| set | networks | exact, median kept | " + " | ".join(verdicts) + " |",
        "|---" * (len(verdicts) + 3) + "|",
    ]
    for source, mine in [*by_source.items(), ("all", rows)]:
        count = Counter(row["verdict"] for row in mine)
        kept = [float(row["share_kept"]) for row in mine if row["verdict"] == "exact"]
        median = f"{statistics.median(kept):.2f}" if kept else "-"
        lines.append(f"| {source} | {len(mine)} | {median} | " + " | ".join(str(count[v]) for v in verdicts) + " |")
    lines += [""] + [
        f"{r['source']} {r['model']}: {r['verdict']} {r.get('why', '')}" for r in rows if r["verdict"] != "exact"
    ]
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV."""
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=".*", help="regular expression on the network's name or source")
    parser.add_argument("--out", type=Path, default=Path("outputs/coverage.csv"), help="CSV; a .txt is put beside it")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth network from the Ith on, for several processes")
    parser.add_argument("--list", action="store_true", help="print the names only")
    parser.add_argument("--table", type=Path, nargs="*", help="print the table of CSV files only")
    args = parser.parse_args()
    if args.table:
        print(table([row for path in args.table for row in read(path)]))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.CRITICAL)
    first, step = map(int, args.part.split("/"))
    wanted = [c for c in cases() if re.fullmatch(args.models, c.name) or re.fullmatch(args.models, c.source)][
        first::step
    ]
    if args.list:
        print("\n".join(f"{case.source} {case.name}" for case in wanted))
        return
    report_on(shrink(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4), warn=False))  # imports, once
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read(args.out) if args.out.exists() else []
    known = {(row["source"], row["model"]) for row in rows}
    for case in wanted:
        if (case.source, case.name) in known:
            continue
        rows.append(in_process(case))
        print({key: value for key, value in rows[-1].items() if key != "source"}, flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    args.out.with_suffix(".txt").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
