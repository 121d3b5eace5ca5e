"""The same command in this checkout and in another one, in turns: ratio of CPU seconds of whole processes.

    python scripts/bench/against.py OTHER [--rounds 5] -- scripts/bench/step.py --rounds 2
    python scripts/bench/against.py OTHER -- -m prune_cli list
    python scripts/bench/against.py OTHER --jobs 30

What follows `--` are arguments of Python, run with the checkout as working directory. `--jobs N` runs a sweep of N
quickstart jobs over seeds, all of one training, twice: the second time everything is in the store, so that what is left is
composing, checking and writing tables. Printed are the medians and their ratio, this checkout over the other.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def seconds(checkout: Path, arguments: list[str], place: Path) -> float:
    """CPU seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], cwd=place, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, arguments = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    checkouts = {"this": HERE, "other": given.other.resolve()}
    with tempfile.TemporaryDirectory() as scratch:
        places = dict(checkouts)
        if given.jobs:
            ratios = ",".join(f"{0.5 + number / 1000:.3f}" for number in range(given.jobs))
            tiny = ["dataset.fake=true", "limit_batches=1", "latency=false", "device=cpu", "stages=[train,prune]"]
            arguments = ["-m", "prune_cli", "run", "-m", "recipe=quickstart", f"granularity.ratio={ratios}", *tiny]
            places = {name: Path(scratch) / name for name in checkouts}
            for name, place in places.items():
                place.mkdir()
                seconds(checkouts[name], arguments, place)
        found: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(given.rounds):
            for name, checkout in checkouts.items():
                found[name].append(seconds(checkout, arguments, places[name]))
    medians = {name: statistics.median(values) for name, values in found.items()}
    per_job = (
        f", {1000 * medians['this'] / given.jobs:.0f} and {1000 * medians['other'] / given.jobs:.0f} ms a job"
        if given.jobs
        else ""
    )
    print(
        f"this {medians['this']:.3f} s, other {medians['other']:.3f} s{per_job}: ratio {medians['this'] / medians['other']:.3f}"
    )


if __name__ == "__main__":
    main()
