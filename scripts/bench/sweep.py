"""Six jobs as one sweep with a shared store against six runs with empty stores: ratio of wall times.

    python scripts/bench/sweep.py

Both run recipe=quickstart with criterion in l1, l2, random and seed in 0, 1, each in processes of their own, in a
temporary folder. Also prints how many trainings and prunings the sweep's log shows, and the peak memory and compute of
one quickstart. Marks: 2 trainings, 6 prunings, ratio at most 0.65; quickstart under 60 s of compute and 1.5 GiB.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prune(place: Path, *arguments: str) -> tuple[float, str]:
    """Runs `prune` in a folder; returns wall seconds and its stderr."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PRUNE_STORE", None)
    done = subprocess.run(
        [sys.executable, "-m", "prune_cli", *arguments],
        cwd=place, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - began, done.stderr


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "warm").mkdir()
        prune(place / "warm", "run", "recipe=quickstart")
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"quickstart: {usage.ru_utime + usage.ru_stime:.0f} s of compute, peak {usage.ru_maxrss / 2**20:.2f} GiB")
        (place / "sweep").mkdir()
        together, log = prune(place / "sweep", "run", "-m", "recipe=quickstart", "criterion=l1,l2,random", "seed=0,1")
        apart = 0.0
        for criterion, seed in product(("l1", "l2", "random"), (0, 1)):
            (place / f"{criterion}{seed}").mkdir()
            wall, _ = prune(
                place / f"{criterion}{seed}", "run", "recipe=quickstart", f"criterion={criterion}", f"seed={seed}"
            )
            apart += wall
    print(f"sweep: {log.count(' train: starting')} trainings, {log.count(' prune: starting')} prunings")
    print(f"sweep over six separate runs: {together / apart:.2f} of the wall time")


if __name__ == "__main__":
    main()
