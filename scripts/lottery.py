"""Accuracy by round of lottery tickets and their control arms, as a CSV and a plot.

    python scripts/lottery.py OUT [--rounds 1-10] [--seeds 0,1,2] [--epochs 40] [overrides of recipe=lenet300_lottery]

Every point is a run of its own to that round: the last round is the one whose ticket the control arms replace. Rows have the
fraction of weights that are left and percent right on the test split; what the store has is not trained again. Writes
OUT/lottery.csv, OUT/lottery.png, and a table of means and deviations over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas

from prune_cli.cli import dispatch

ARMS = {"ticket": "none", "random ticket": "random_ticket", "random initial weights": "random_init"}
SHARE = 0.2  # of what is left that each round takes


def run(folder: Path, rounds: int, control: str, seed: int, epochs: int, overrides: list[str]) -> pandas.Series:
    """The row of the prune stage."""
    if not (folder / "results.csv").is_file():
        left = (1 - SHARE) ** rounds
        code = dispatch(
            ["run", "recipe=lenet300_lottery", f"schedule.rounds={rounds}", f"granularity.ratio={1 - left:.6f}",
             f"schedule.control={control}", f"schedule.epochs={epochs}", f"seed={seed}", "latency=false", f"hydra.run.dir={folder}", *overrides]
        )  # fmt: skip
        if code:
            sys.exit(code)
    return pandas.read_csv(folder / "results.csv").set_index("stage").loc["prune"]


def dense(folder: Path, seed: int, epochs: int, overrides: list[str]) -> pandas.Series:
    """The row of the dense network after the same epochs of one training."""
    if not (folder / "results.csv").is_file():
        options = ["optimizer@train.optimizer=adam", "lr_schedule@train.lr_schedule=constant", "train.optimizer.lr=1.2e-3",
                   "train.optimizer.weight_decay=0", "train.batch_size=60", f"train.epochs={epochs}"]  # fmt: skip
        code = dispatch(["run", "recipe=lenet300_lottery", "stages=[train]", *options, f"seed={seed}", "latency=false",
                         f"hydra.run.dir={folder}", *overrides])  # fmt: skip
        if code:
            sys.exit(code)
    return pandas.read_csv(folder / "results.csv").set_index("stage").loc["train"]


def table(rows: pandas.DataFrame) -> str:
    """Means and deviations over the seeds, a line per round."""
    found = rows.groupby(["round", "arm"]).acc1.agg(["mean", "std"])
    text = found.apply(lambda one: f"{one['mean']:.2f} ± {one['std']:.2f}", axis=1).unstack("arm")
    left = rows.groupby("round").left.mean()
    lines = ["| round | weights left | " + " | ".join(ARMS) + " |", "|---" * (2 + len(ARMS)) + "|"]
    for number, line in text.iterrows():
        cells = [line.get(arm) if isinstance(line.get(arm), str) else "" for arm in ARMS]
        lines.append(f"| {number} | {100 * left[number]:.1f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: pandas.DataFrame, path: Path) -> None:
    """Accuracy against weights left, with the range of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for arm in ARMS:
        found = rows[(rows.arm == arm) | (rows["round"] == 0)].groupby("left").acc1.agg(["mean", "min", "max"])
        axes.plot(100 * found.index, found["mean"], marker="o", label=arm)
        axes.fill_between(100 * found.index, found["min"], found["max"], alpha=0.15)
    axes.set(
        xscale="log",
        xlabel="weights left (%)",
        ylabel="acc1 on test (%)",
        title="LeNet-300-100, lottery tickets by round",
    )
    axes.invert_xaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", default="1-10", help="as 1-10 or 1,2,4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=40)
    given, overrides = parser.parse_known_args()
    first, dash, last = given.rounds.partition("-")
    rounds_asked = range(int(first), int(last) + 1) if dash else [int(number) for number in given.rounds.split(",")]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rows = [
        {
            "round": 0,
            "left": 1.0,
            "arm": "ticket",
            "seed": seed,
            "acc1": dense(given.out / f"dense_{seed}", seed, given.epochs, overrides).acc1,
        }
        for seed in seeds
    ]
    for rounds in rounds_asked:
        for arm, control in ARMS.items():
            for seed in seeds:
                found = run(given.out / f"{control}_{rounds}_{seed}", rounds, control, seed, given.epochs, overrides)
                rows.append(
                    {"round": rounds, "left": 1 - found.ratio_total, "arm": arm, "seed": seed, "acc1": found.acc1}
                )
    frame = pandas.DataFrame(rows)
    frame.to_csv(given.out / "lottery.csv", index=False)
    plot(frame, given.out / "lottery.png")
    sys.stdout.write(table(frame) + "\n")


if __name__ == "__main__":
    main()
