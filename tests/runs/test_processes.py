"""Several processes: the same masks and, in float64, the same losses as one process with the whole batch."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from prune_cli.criteria.statistics import collect
from prune_cli.data.fake import fake
from prune_cli.distillation.attention_transfer import attention_transfer
from prune_cli.distillation.distillation import Term
from prune_cli.distillation.fitnet import FitNet
from prune_cli.distillation.losses import hinton
from prune_cli.distillation.objective import Objective, prepared
from prune_cli.training import distributed, filter_skeleton, sr_ste
from prune_cli.training.distributed import World, joined, parallel
from prune_cli.training.fit import Options, fit
from prune_cli.training.lr_schedules import cosine
from tests.conftest import ROOT

RUN = (
    "run", "recipe=quickstart", "model=lenet5", "dataset=digits", "device=cpu", "latency=false", "threads=1",
    "train.epochs=3", "finetune.epochs=2", "granularity.ratio=0.7", "schedule=iterative", "schedule.epochs=3",
    "schedule.retrain_epoch=2", "schedule.prune_freq=1", "deterministic=true",
    *(f"{stage}.fit.checkpoint_seconds=0" for stage in ("train", "prune", "finetune")),
)  # fmt: skip


def torchrun(
    place: Path, *arguments: str, processes: int = 2, restarts: int = 0, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--max-restarts={restarts}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.faulty", *arguments,
        ],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def rank(place: Path, number: int, port: int, *arguments: str) -> subprocess.Popen:
    """One rank by hand, as torchrun starts it."""
    environment = {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "prune_cli", *arguments],
        cwd=place, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(3 * 8 * 8, 20), nn.Tanh(), nn.Linear(20, 4)]
    return nn.Sequential(*layers).double()


def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images.double()), labels)


def curve(world: World) -> dict[str, list]:
    """Losses and final weights of a masked training, with batches that do not divide evenly."""
    data = fake(shape=(3, 8, 8), num_classes=4, train=50, test=10, val=0)
    model = network()
    masks = {"1.weight": torch.rand(20, 192, generator=torch.Generator().manual_seed(1)) > 0.5}
    optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    progress = fit(
        model, data.train(15, 3, shard=world.shard), loss, optimizer=optimizer, lr_schedule=cosine, epochs=4, masks=masks,
        world=world,
    )  # fmt: skip
    return {"loss": [row["loss"] for row in progress.history], "weights": model[1].weight.flatten().tolist()[:50]}


def taught(world: World) -> dict[str, list]:
    """Losses, weights and regressors of a distilled training, with batches that do not divide evenly."""
    data = fake(shape=(3, 8, 8), num_classes=4, train=50, test=10, val=0)
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Conv2d(3, n, 3), nn.Tanh(), nn.Conv2d(n, n, 3), nn.Flatten(), nn.Linear(16 * n, 4)).double()
        for n in (6, 4)
    )
    torch.manual_seed(world.rank)  # as stages do: what the ranks draw from then on differs
    options = {
        "soft": Term(hinton(), "dense"), "hints": Term(FitNet, "dense", features=("0", "2")),
        "maps": Term(attention_transfer, "dense", features=("0",)),
    }  # fmt: skip
    images = torch.zeros(2, 3, 8, 8).double()
    terms = [prepared(term, student, teacher, images, key=key, seed=5) for key, term in options.items()]
    with torch.no_grad():  # of the same teacher, but one that runs for the other terms
        table = torch.cat([teacher(part.double()) for part in data.views.batches(25)])
    terms[0] = replace(terms[0], teacher=copy.deepcopy(teacher), table=table)
    objective = Objective(student, terms, 0.5, 0.1)

    class Doubled:
        def __init__(self) -> None:
            self.batches = data.train(15, 3, shard=world.shard)
            self.size, self.rows = self.batches.size, self.batches.rows

        def __len__(self) -> int:
            return len(self.batches)

        def epoch(self, epoch: int, start: int = 0):
            return ((images.double(), labels) for images, labels in self.batches.epoch(epoch, start))

    progress = fit(
        student, objective.batches(Doubled()), objective, optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9), world=world,
        lr_schedule=cosine, epochs=3, options=Options(clip=0.2, accumulate=2),
    )  # fmt: skip
    own = torch.cat([parameter.detach().flatten() for parameter in objective.parameters()])
    weights = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    return {
        "loss": [row["loss"] for row in progress.history], "weights": weights.tolist()[:80], "regressors": own.tolist(),
    }  # fmt: skip


def measured(world: World) -> dict[str, list]:
    """What criteria measure on a network, each process on its share of 5 batches."""
    data = fake(shape=(3, 8, 8), num_classes=4, train=50, test=10, val=0)
    model = network()
    needs = ("taylor", "gradient", "fisher", "input_norm", "hessian_gradient")
    batches = [(images.double(), labels) for images, labels in data.calibration(50, 11, shard=world.shard)]
    found = collect(model, batches, needs, loss, torch.zeros(1, 3, 8, 8).double(), reduce=world.add_up)
    return {f"{name} {need}": value.flatten().tolist() for name, of in found.items() for need, value in of.items()}


def two_processes(place: Path, module: str, function: str, body: str) -> str:
    """What two processes print that run `body`, which knows `world` and a function of a test's module."""
    script = place / "child.py"
    script.write_text(
        f"import json, torch\nfrom {module} import {function}\n"
        f"from prune_cli.training.distributed import joined, leave\nwith joined(torch.device('cpu')) as world:\n{body}leave()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
         "--rdzv-endpoint=localhost:0", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    two_processes(
        tmp_path,
        __name__,
        "measured",
        "    found = measured(world)\n"
        "    same = world.broadcast(found) == found\n"
        f"    open(f'{tmp_path}/{{world.rank}}.json', 'w').write(json.dumps([same, found]))\n",
    )
    alone = measured(World())
    for number in range(2):
        same, found = json.loads((tmp_path / f"{number}.json").read_text())
        assert same, "bit-equal on every rank"
        assert found.keys() == alone.keys() and len(found) == 10
        assert all(found[key] == pytest.approx(alone[key], rel=1e-9, abs=1e-15) for key in alone)


def test_two_gloo_processes_have_the_loss_curve_of_one(tmp_path):
    out = two_processes(
        tmp_path, __name__, "curve", "    found = curve(world)\n    if world.main:\n        print(json.dumps(found))\n"
    )
    two, one = json.loads(out.strip().splitlines()[-1]), curve(World())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-10)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9, abs=1e-14)


@pytest.mark.slow
def test_two_gloo_processes_learn_from_a_teacher_as_one_does(tmp_path):
    two_processes(
        tmp_path,
        __name__,
        "taught",
        f"    open(f'{tmp_path}/{{world.rank}}.json', 'w').write(json.dumps(taught(world)))\n",
    )
    one = taught(World())
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert ranks[0] == ranks[1], "bit-equal on every rank"
    assert ranks[0]["loss"] == pytest.approx(one["loss"], rel=1e-10)
    assert ranks[0]["weights"] == pytest.approx(one["weights"], rel=1e-9, abs=1e-14)
    assert ranks[0]["regressors"] == pytest.approx(one["regressors"], rel=1e-9, abs=1e-14)


@pytest.mark.slow
def test_a_distilled_recipe_in_two_processes(tmp_path):
    """Rank 0 makes the table of logits that both look up while they prune."""
    process = torchrun(
        tmp_path, *RUN, "distillation=fitnet", "granularity=filter", "prune.distillation=hinton", "prune.distillation.cache=store",
        "limit_batches=3",
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "finetune: done" in err
    assert err.count("logits of the teacher: computing") == 1


@pytest.mark.thorough
def test_a_recipe_in_two_processes_and_its_masks_in_one(tmp_path):
    whole = (*RUN, "criterion=taylor", "stages=[train,prune,finetune,share]", "share.epochs=2")
    process = torchrun(tmp_path, *whole)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("train: starting") == 1, "only rank 0 speaks"
    folder = tmp_path / out.strip().splitlines()[-1]
    assert (folder / "results.csv").read_text().count("\n") == 5
    assert len(list(tmp_path.glob("outputs/quickstart/*"))) == 1
    # What two processes finished, one finds in the store, and the other way round.
    alone = subprocess.run(
        [sys.executable, "-m", "prune_cli", *whole],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.stderr.count("taken from the store") == 4, alone.stderr


@pytest.mark.slow
def test_criteria_that_read_norm_statistics_choose_the_same_masks_on_every_rank(tmp_path):
    network = ("model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "limit_batches=3")
    process = torchrun(tmp_path, *RUN, *network, "criterion=taylor", "stages=[train,prune]", "prune.batch_size=32")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_resumes_from_the_store(tmp_path):
    process = torchrun(tmp_path, *RUN, "finetune.epochs=8", restarts=1, FAULT="finetune 80 SIGKILL 1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("taken from the store") == 2
    assert re.search(r"finetune: going on from epoch \d+", err)


def test_restarted_ranks_never_meet_the_dead_ones():
    store = dist.HashStore()
    starts = []
    for late in (0, 1, 2):
        with ThreadPoolExecutor(3) as pool:
            jobs = {}
            for number in (*(set(range(3)) - {late}), late):  # one comes after the others have read what is old
                jobs[number] = pool.submit(distributed._start, store, number, 3)
                time.sleep(0.05)
            names = {job.result(timeout=30) for job in jobs.values()}
        assert len(names) == 1
        starts += names
    assert len(set(starts)) == 3


@pytest.mark.thorough
def test_ranks_with_different_recipes_are_told(tmp_path):
    port = free_port()
    ranks = [rank(tmp_path, 0, port, *RUN), rank(tmp_path, 1, port, *RUN, "seed=5")]
    outs = [process.communicate(timeout=120) for process in ranks]
    assert ranks[0].returncode == 2, outs
    assert "rank 1 differs" in outs[0][1]


def test_a_sweep_in_several_processes_is_refused(tmp_path):
    process = rank(tmp_path, 0, free_port(), "run", "-m", "recipe=quickstart", "seed=0,1")
    assert process.wait(timeout=60) == 2
    assert "torchrun runs one job" in process.stderr.read()


def test_alone_nothing_is_wrapped():
    model = network()
    with joined(torch.device("cpu")) as world, parallel(model, world, sync_norms=True) as forward:
        assert forward is model
        assert world == World()
        assert world.broadcast({"a": 1}) == {"a": 1}
        assert world.any(True)


SKELETON = (
    "run", "recipe=quickstart", "granularity=stripe", "stages=[skeleton,finetune]", "skeleton.epochs=3",
    "skeleton.alpha=0.03", "skeleton.threshold=0.5", "skeleton.optimizer.lr=0.05", "finetune.epochs=1",
)  # fmt: skip
SR_STE = (
    "run", "recipe=quickstart", "granularity=n_m", "granularity.ratio=0.5", "stages=[sr_ste,finetune]", "sr_ste.epochs=3",
    "finetune.epochs=1",
)  # fmt: skip

RIGL = (
    "run", "recipe=quickstart", "stages=[prune,finetune]", "schedule=rigl", "schedule.epochs=2", "schedule.every=4",
    "prune.batch_size=64", "finetune.epochs=1",
)  # fmt: skip
MOVEMENT = (
    "run", "recipe=quickstart", "stages=[prune,finetune]", "schedule=movement", "criterion=movement", "schedule.epochs=2",
    "prune.batch_size=64", "finetune.epochs=1",
)  # fmt: skip


def learned(world: World, method: str) -> dict[str, list]:
    """Losses and masks of a training whose masks are learned on the way, in float64, batches not divisible by two."""
    data = fake(shape=(3, 8, 8), num_classes=4, train=50, test=10, val=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).double()
    names, constants = ["0.weight", "2.weight"], {"0.weight": ["0.bias"], "2.weight": ["2.bias"]}
    patterns = {"2.weight": (4, 2), "4.weight": (4, 1)}
    regularise = None
    if method == "skeleton":
        filter_skeleton.attach(model, names)
        for module in (model[0], model[2]):  # some near to death
            module.parametrizations.weight[0].strength.data.uniform_(
                0.4, 1.2, generator=torch.Generator().manual_seed(2)
            )
        regularise = filter_skeleton.Shrinkage(model, names, 0.03, 0.5, constants, {"0.weight": 3})
    else:
        sr_ste.attach(model, patterns, 1e-3)
    progress = fit(
        model, data.train(15, 3, shard=world.shard), loss, optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lr_schedule=cosine, epochs=4, regularise=regularise, world=world,
    )  # fmt: skip
    if method == "skeleton":
        masks = filter_skeleton.detach(model, names, 0.5, constants, {"0.weight": 3})
    else:
        masks = sr_ste.detach(model, patterns)
    return {
        "loss": [row["loss"] for row in progress.history],
        "masks": {name: mask.int().flatten().tolist() for name, mask in masks.items()},
        "weights": model[2].weight.flatten().tolist()[:50],
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["skeleton", "sr_ste"])
def test_masks_learned_by_two_gloo_processes_are_those_of_one(tmp_path, method):
    out = two_processes(
        tmp_path,
        __name__,
        "learned",
        f"    found = learned(world, {method!r})\n"
        "    every = [world.broadcast(None)] if not world.main else [world.broadcast(found)]\n"
        "    assert world.main or every[0]['masks'] == found['masks'], 'masks differ between ranks'\n"
        "    if world.main:\n        print(json.dumps(found))\n",
    )
    two, one = json.loads(out.strip().splitlines()[-1]), learned(World(), method)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-8, abs=1e-13)
    assert two["masks"] == one["masks"]
    kept = [value for mask in one["masks"].values() for value in mask]
    assert 0 < sum(kept) < len(kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [SKELETON, SR_STE, RIGL, MOVEMENT], ids=["skeleton", "sr_ste", "rigl", "movement"]
)
def test_learned_masks_in_two_processes_are_found_by_one(tmp_path, arguments):
    arguments = (*arguments, "device=cpu", "latency=false", "threads=1")
    process = torchrun(tmp_path, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    folder = tmp_path / out.strip().splitlines()[-1]
    assert "finetune" in (folder / "results.csv").read_text()
    alone = subprocess.run(
        [sys.executable, "-m", "prune_cli", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.stderr.count("taken from the store") == 3, alone.stderr
