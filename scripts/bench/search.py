"""Candidates per second of every search, against copying the network, pruning the copy and evaluating it.

    python scripts/bench/search.py [--models resnet20,mobilenet_v2] [--images 1000] [--rounds 3] [--threads 1]

The same requests of the same schedule are answered both ways, in turns: a request by us, then some of its candidates by
copies (medians over `--rounds`; a request is a round). A copy is masked, as most tools do it, or made smaller; its norm
statistics are estimated on the same 256 images. Printed beside the ratios: the largest difference between our scores and
those of masked copies, the candidates that arithmetic refused, those whose score was known, and the part of the search that
the schedule itself takes. Marks: 3 for sensitivity and netadapt, 1.2 for the others, 10 % for the schedule of amc.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from prune_cli import masks as masking
from prune_cli.console import Console
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration
from prune_cli.data.fake import fake
from prune_cli.distillation.distillation import Distillation
from prune_cli.granularities.filter import Filter
from prune_cli.measure.accuracy import accuracy
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.pipeline.state import Architecture, Outcome, State
from prune_cli.pipeline.store import Slot
from prune_cli.schedules.amc import amc
from prune_cli.schedules.netadapt import netadapt
from prune_cli.schedules.optuna_search import optuna_search
from prune_cli.schedules.requests import Evaluate, Kept
from prune_cli.schedules.sensitivity import sensitivity
from prune_cli.schedules.simulated_annealing import simulated_annealing
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.session.course import Turn
from prune_cli.session.perform import perform
from prune_cli.session.session import Session
from prune_cli.structure import surgery
from prune_cli.training.batch_norm import recalibrate_bn
from prune_cli.training.fit import Options
from prune_cli.training.training import Training

HALF = Granularity(Filter(), budget=Budget(macs=0.5), scope="layer")
L2 = Criterion(weights.l2)
SEARCHES: dict[str, Callable] = {
    "sensitivity": functools.partial(sensitivity, grid=(0.25, 0.5, 0.75)),
    "netadapt": functools.partial(netadapt, step=0.1, short_epochs=0),
    "simulated_annealing": functools.partial(simulated_annealing, candidates=200),
    "amc": functools.partial(amc, episodes=200, warmup=3),
    "optuna": functools.partial(optuna_search, candidates=200),
}


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2 as build

    return build(num_classes=10)


MODELS = {
    "resnet20": (functools.partial(resnet_cifar, num_classes=10, in_shape=(3, 32, 32), depth=20), 32),
    "mobilenet_v2": (mobilenet_v2, 64),
}


@dataclass
class Found:
    """Of one search: candidates per second by way, and what else is told."""

    rates: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "masked": [], "smaller": []})
    candidates: int = 0
    refused: int = 0
    known: int = 0
    off: float = 0.0
    asking: float = 0.0
    answering: float = 0.0


def begun(model: nn.Module, size: int, images: int, place: Path) -> Session:
    state = State(
        model=copy.deepcopy(model).eval(),
        data=fake((3, size, size), 10, train=512, test=16, val=images),
        architecture=Architecture(lambda purpose="model": copy.deepcopy(model), {}, "bench"),
        device=torch.device("cpu"), seed=0, console=Console(), slot=Slot(place), stage="prune", outcome=Outcome(),
    )  # fmt: skip
    training = Training(
        batch_size=64,
        optimizer=functools.partial(torch.optim.SGD, lr=0.01),
        lr_schedule=lambda now, epochs: 1.0,
        fit=Options(),
    )
    session = Session(
        state, criterion=L2, granularity=HALF, calibration=Calibration(256, 64), distillation=Distillation(),
        training=training,
    )  # fmt: skip
    session.pose()
    return session


def by_copying(session: Session, kept: Kept, *, smaller: bool) -> float:
    """The score of a candidate as one would write it with this library's parts, from a network and what it is to keep."""
    model, image = copy.deepcopy(session.model), session.state.example_inputs()
    selection = select(HALF, L2, model, image, kept=kept, quiet=True)
    masking.apply(model, selection.masks)
    if smaller and selection.candidate:
        model = surgery.remove_units(model, *selection.candidate).model
    recalibrate_bn(model, session.state.data.calibration(256, 64))
    return accuracy(model, session.state.data.evaluation("val", 500)).acc1


def taken(action: Callable[[], object]) -> tuple[object, float]:
    began = time.perf_counter()
    result = action()
    return result, time.perf_counter() - began


def requests(schedule: Callable, session: Session, found: Found) -> Iterator[tuple[int, Evaluate, list[float | None]]]:
    """The requests that look at candidates, with our answers."""
    asking, position = schedule(session.problem), 0
    request, spent = taken(lambda: next(asking))
    while True:
        found.asking += spent
        turn = Turn(position, {}, lambda *_: None, lambda *_: None)
        before = copy.deepcopy(session.model.state_dict())
        answer, spent = taken(lambda request=request, turn=turn: perform(request, session, turn))
        found.answering += spent
        if isinstance(request, Evaluate):
            after = copy.deepcopy(session.model.state_dict())
            session.model.load_state_dict(before)  # for the copies
            yield spent, request, answer
            session.model.load_state_dict(after)
        try:
            request, spent = taken(lambda answer=answer: asking.send(answer))
        except StopIteration:
            return
        position += 1


def measured(model: nn.Module, size: int, name: str, images: int, rounds: int, copies: int) -> Found:
    found = Found()
    with tempfile.TemporaryDirectory() as place:
        session = begun(model, size, images, Path(place))
        tried: set[tuple] = set()
        for seconds, request, scores in itertools.islice(requests(SEARCHES[name], session, found), rounds):
            run = [index for index, score in enumerate(scores) if score is not None]
            found.candidates += len(scores)
            found.refused += len(scores) - len(run)
            keys = [tuple(sorted(request.candidates[index].items())) for index in run]
            found.known += len(keys) - len(set(keys) - tried)
            tried |= set() if request.adopt else set(keys)
            found.rates["ours"].append(len(run) / seconds)
            for way in ("masked", "smaller"):
                chosen = run[:: max(len(run) // copies, 1)][:copies]
                copied = functools.partial(by_copying, session, smaller=way == "smaller")
                theirs, spent = taken(lambda f=copied, c=chosen, r=request: [f(r.candidates[index]) for index in c])
                found.rates[way].append(len(chosen) / spent)
                if way == "masked":
                    found.off = max(found.off, *(abs(scores[i] - s) for i, s in zip(chosen, theirs, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4, help="candidates of a request that are copied")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        "| network | search | a second | masked copies | smaller copies | ratio | ratio | off | refused | known | schedule |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        build, size = MODELS[name]
        model = build()
        for search in arguments.searches.split(","):
            # One request of a search that asks for single candidates says little.
            rounds = {"sensitivity": 1, "netadapt": arguments.rounds}.get(search, 4 * arguments.rounds)
            one = measured(model, size, search, arguments.images, rounds, arguments.copies)
            rates = {way: statistics.median(values) for way, values in one.rates.items()}
            print(
                f"| {name} | {search} | {rates['ours']:.3g} | {rates['masked']:.3g} | {rates['smaller']:.3g} "
                f"| {rates['ours'] / rates['masked']:.2f} | {rates['ours'] / rates['smaller']:.2f} | {one.off:.2f} "
                f"| {one.refused / one.candidates:.0%} | {one.known / one.candidates:.0%} "
                f"| {one.asking / (one.asking + one.answering):.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
