"""Accuracy at equal multiply-adds: ways to prune with prune beside the peer (torch-pruning), one neutral loop for all.

    python scripts/bench/accuracy.py resnet20 IMAGES --weights resnet20.th --budgets 0.5,0.333 --epochs 0,1 --seeds 0,1,2
    python scripts/bench/accuracy.py vgg16_narrow IMAGES --dense-epochs 20 --arms default,layer,peer_l2   # trains it first

IMAGES holds train/CLASS/ and test/CLASS/ of images. Fine-tuning sees `--few` of the training images, a dense network that
is trained here sees all. An arm is a name of `ARMS`, or `NAME:OVERRIDES` with what `prune run`
takes (`mine:criterion=l2 granularity.scope=global`) or, behind `peer`, keywords of the peer (`theirs:peer p=1`). The arms
`dense` and `random` are always there.

Every arm removes filters from the same network; then all have the same: norm statistics estimated again on training
images, and the same fine-tuning by SGD. The peer takes a ratio, which is bisected for the most that stays inside the
budget; the others may spend as many multiply-adds as the leanest arm of the peer did, and no more. Shortcuts that pad with
zeros are replaced by 1x1 convolutions that compute the same bits, because the peer fails on the former.

One line of the CSV is one arm after one number of epochs, on the images held out of the training set (val: to choose arms
by) and on the test images. What is in the CSV already is not run again: the same command goes on, or prints the table.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from prune_cli.config.compose import compose
from prune_cli.config.nodes import resolve
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import collect
from prune_cli.models.resnet_cifar import PadShortcut, resnet_cifar
from prune_cli.models.vgg import vgg
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure import surgery
from prune_cli.training.batch_norm import recalibrate_bn

SHAPE = (3, 32, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION = 2048  # training images for norm statistics
NARROW = [16, 16, "M", 32, 32, "M", 64, 64, 64, "M", 128, 128, 128, "M", 128, 128, 128, "M"]
MODELS = {
    "resnet20": lambda classes: resnet_cifar(num_classes=classes, in_shape=SHAPE, depth=20),
    "resnet56": lambda classes: resnet_cifar(num_classes=classes, in_shape=SHAPE, depth=56),
    "resnet56_narrow": lambda classes: resnet_cifar(num_classes=classes, in_shape=SHAPE, depth=56, widths=(8, 16, 32)),
    "vgg16": lambda classes: vgg(num_classes=classes, in_shape=SHAPE, depth=16),
    "vgg16_narrow": lambda classes: vgg(num_classes=classes, in_shape=SHAPE, depth=16, cfg=NARROW),
}
ARMS = {
    "default": "",
    "layer": "granularity.scope=layer",
    "layer_inner": "granularity.scope=layer granularity.dependency=inner_only",
    "layer_votes": "granularity.scope=layer granularity.dependency=union_keep",
    "global": "granularity.scope=global",
    "global_inner": "granularity.scope=global granularity.dependency=inner_only",
    "global_votes": "granularity.scope=global granularity.dependency=union_keep",
    "global_none": "granularity.scope=global granularity.normalize=none",
    "random": "criterion=random",
    "peer_l2": "peer p=2",
    "peer_l1": "peer p=1",
    "peer_l2_global": "peer p=2 global=1",
    "peer_l2_isomorphic": "peer p=2 global=1 isomorphic=1",
}
ALWAYS = ("dense", "random")


@dataclass(frozen=True)
class Data:
    """Images (n, 3, 32, 32) uint8 with labels: to train on, held out of the training set, and to test on."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One arm after so many epochs; accuracies in percent, budget the fraction of multiply-adds, 1 for dense."""

    model: str
    budget: float
    arm: str
    seed: int
    point: str  # pruned | recalibrated | epochs of fine-tuning
    macs: int
    params: int
    val: float
    test: float
    seconds: float  # of this point, measured beside other work

    @property
    def key(self) -> tuple[str, float, str, int, str]:
        """What makes it this row."""
        return self.model, self.budget, self.arm, self.seed, self.point


# ------------------------------------------------------------------------------------------------- data and loop


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a folder of folders, classes in the order of their names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def split(folder: Path, held_out: int) -> Data:
    """The same held-out images in every run."""
    images, labels = load(folder / "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order[:held_out], order[held_out:]
    return Data((images[train], labels[train]), (images[val], labels[val]), load(folder / "test"))


def few(data: Data, count: int | None) -> tuple[Tensor, Tensor]:
    """The training images that fine-tuning sees; they were shuffled once."""
    images, labels = data.train
    return images[:count], labels[:count]


def prepared(images: Tensor) -> Tensor:
    """Pixels as the networks take them."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to four pixels and mirrors, by image."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (4, 4, 4, 4))
    rows, columns = (torch.randint(9, (count, 1), generator=generator) + torch.arange(size) for _ in range(2))
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    index = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[index, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images whose largest output is the label."""
    model.eval()
    with torch.no_grad():
        right = [
            int((model(prepared(some)).argmax(1) == wanted).sum())
            for some, wanted in zip(images.split(256), labels.split(256), strict=True)
        ]
    return 100 * sum(right) / len(labels)


def recalibrated(model: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """A copy with norm statistics of some training images."""
    model = copy.deepcopy(model)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    recalibrate_bn(model, (prepared(images[some]) for some in chosen.split(256)))
    return model


def trained(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, lr: float, seed: int, batch: int
) -> nn.Module:
    """SGD with momentum 0.9 and weight decay 5e-4, cosine from lr to 0; in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(labels), generator=generator).split(batch):
            loss = F.cross_entropy(model(prepared(augmented(images[some], generator))), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


# ------------------------------------------------------------------------------------------------- networks, arms


def without_padding(model: nn.Module) -> nn.Module:
    """The same function with shortcuts of 1x1 convolutions in place of padding with zeros."""
    for module in list(model.modules()):
        shortcut = getattr(module, "shortcut", None)
        if isinstance(shortcut, PadShortcut):
            conv = nn.Conv2d(module.conv1.in_channels, module.conv1.out_channels, 1, shortcut.stride, bias=False)
            with torch.no_grad():
                conv.weight.zero_()
                here = torch.arange(conv.in_channels)
                conv.weight[here + shortcut.front, here] = 1.0
            module.shortcut = conv
    return model


def dense(name: str, data: Data, weights: Path | None, epochs: int, cache: Path) -> nn.Module:
    """The network that all arms begin with: from a file, or trained here once."""
    torch.manual_seed(0)
    model = MODELS[name](int(data.train[1].max()) + 1)
    file = weights or cache / f"{name}_{epochs}.pt"
    if not file.exists():
        print(f"training {name} for {epochs} epochs", flush=True)
        trained(model, *data.train, epochs=epochs, lr=0.1, seed=0, batch=128)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    found = torch.load(file, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    model.load_state_dict({key.removeprefix("module."): value for key, value in found.items()})
    return without_padding(model).eval()


def macs_of(model: nn.Module) -> int:
    """Multiply-adds of one image, by torch's own counter."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    return counter.get_total_flops() // 2


def ours(model: nn.Module, overrides: str, fraction: float, data: Data, seed: int) -> nn.Module:
    """Pruned by an arm of prune to at most that fraction of the multiply-adds."""
    found = compose(["granularity=filter", "criterion=l1", *overrides.split()]).config
    criterion: Criterion = resolve(found["criterion"], "criterion", Criterion)
    granularity: Granularity = resolve(
        found["granularity"] | {"budget": {"macs": fraction}}, "granularity", Granularity
    )
    example = torch.zeros(1, *SHAPE)
    images, labels = (part[:256] for part in data.train)
    batches = [(prepared(some), wanted) for some, wanted in zip(images.split(64), labels.split(64), strict=True)]
    measured = collect(
        model, batches, criterion.needs, lambda net, some, wanted: F.cross_entropy(net(some), wanted), example,
        at=criterion.at,
    )  # fmt: skip
    selection = select(granularity, criterion, model, example, statistics=measured, seed=seed)
    assert selection.candidate is not None
    return surgery.remove_units(model, *selection.candidate).model


def peer(model: nn.Module, options: str, fraction: float) -> nn.Module:
    """Pruned by the peer to at most that fraction of the multiply-adds, as closely as its ratio allows."""
    import torch_pruning

    given = dict(part.split("=") for part in options.split()[1:])
    whole, low, high = macs_of(model), 0.0, 1.0
    best = None
    for _ in range(12):
        ratio = (low + high) / 2
        trial = copy.deepcopy(model)
        torch_pruning.pruner.BasePruner(
            trial,
            torch.zeros(1, *SHAPE),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=int(given.get("p", 2))),
            pruning_ratio=ratio,
            global_pruning=bool(int(given.get("global", 0))),
            isomorphic=bool(int(given.get("isomorphic", 0))),
            ignored_layers=[module for module in trial.modules() if isinstance(module, nn.Linear)],
        ).step()
        if macs_of(trial) <= fraction * whole:
            high, best = ratio, trial
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"the peer does not reach {fraction} of the multiply-adds")
    return best


# ------------------------------------------------------------------------------------------------- the table


def read(file: Path) -> list[Row]:
    """The rows of a CSV, none where there is no file."""
    if not file.exists():
        return []
    kinds = {"str": str, "int": int, "float": float}
    with file.open(newline="") as lines:
        return [
            Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(lines)
        ]


def append(file: Path, row: Row) -> None:
    """One line more."""
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
    print(
        " ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in asdict(row).values()),
        flush=True,
    )


def table(rows: Iterable[Row]) -> str:
    """Markdown: per budget and arm the test accuracy at every point, mean and deviation over seeds; val in brackets."""
    rows = list(rows)
    points = sorted(
        {row.point for row in rows}, key=lambda point: (point.isdigit(), int(point) if point.isdigit() else 0, point)
    )
    lines = [f"| model | MACs | arm | realised | params | {' | '.join(points)} |", "|---" * (5 + len(points)) + "|"]
    for model, budget, arm in dict.fromkeys((row.model, row.budget, row.arm) for row in rows):
        mine = [row for row in rows if (row.model, row.budget, row.arm) == (model, budget, arm)]
        cells = []
        for point in points:
            found = [row for row in mine if row.point == point]
            test, val = [row.test for row in found], [row.val for row in found]
            spread = f" ± {statistics.stdev(test):.2f}" if len(set(test)) > 1 else ""
            cells.append(f"{statistics.mean(test):.2f}{spread} ({statistics.mean(val):.1f})" if found else "")
        macs, params = (statistics.mean(getattr(row, key) for row in mine) for key in ("macs", "params"))
        lines.append(f"| {model} | {budget:g} | {arm} | {macs / 1e6:.2f} M | {params:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    name: str,
    net: nn.Module,
    budget: float,
    arm: str,
    seed: int,
    points: list[str],
    data: Data,
    args: argparse.Namespace,
) -> None:
    """Runs the points of one pruned network that are missing, and writes each down."""
    known = {row.key for row in read(args.out)}
    macs, params = macs_of(net), sum(parameter.numel() for parameter in net.parameters())
    for point in points:
        if (name, budget, arm, seed, point) in known:
            continue
        start = time.monotonic()
        now = net if point == "pruned" else recalibrated(net, data.train[0], seed)
        if point.isdigit():
            trained(now, *few(data, args.few), epochs=int(point), lr=args.lr, seed=seed, batch=args.batch)
        val, test = accuracy(now, *data.val), accuracy(now, *data.test)
        append(args.out, Row(name, budget, arm, seed, point, macs, params, val, test, time.monotonic() - start))


def race(name: str, arms: Mapping[str, str], data: Data, args: argparse.Namespace) -> None:
    """All arms at all budgets; the peer's first, whose spending bounds the others'."""
    model = dense(name, data, args.weights, args.dense_epochs, args.cache)
    whole = macs_of(model)
    points = ["pruned", "recalibrated", *(str(epochs) for epochs in args.epochs if epochs)]
    peers = {arm: options for arm, options in arms.items() if options.startswith("peer")}
    for seed in args.seeds[:1]:
        measure(name, model, 1.0, "dense", seed, ["pruned"], data, args)
    for budget in args.budgets:
        nets: dict[str, nn.Module] = {arm: peer(model, options, budget) for arm, options in peers.items()}
        fraction = min([budget, *(macs_of(net) / whole for net in nets.values())])
        for seed in args.seeds:
            for arm, options in arms.items():
                if arm not in nets or "criterion=random" in options:
                    nets[arm] = ours(model, options, fraction, data, seed)
                again = (
                    seed != args.seeds[0] and "criterion=random" not in options
                )  # right after pruning it is the same
                measure(name, nets[arm], budget, arm, seed, points[again:], data, args)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", type=Path, default=None, help="a state dict; None = train the network here, once")
    parser.add_argument("--dense-epochs", type=int, default=20)
    parser.add_argument("--budgets", default="0.5,0.333", help="fractions of the multiply-adds")
    parser.add_argument(
        "--arms", default="default,layer,layer_inner,global,global_inner,peer_l2,peer_l1,peer_l2_global"
    )
    parser.add_argument("--seeds", default="0,1,2", help="of batches, of norm statistics and of the random arm")
    parser.add_argument("--epochs", default="0,1", help="lengths of fine-tuning, each by itself; 0 = none")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=1000, help="training images to choose arms by")
    parser.add_argument("--few", type=int, default=None, help="training images to fine-tune on; None = all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("outputs/accuracy"), help="where trained networks are kept")
    parser.add_argument("--out", type=Path, default=Path("outputs/accuracy/accuracy.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.budgets = [float(part) for part in args.budgets.split(",")]
    args.seeds = [int(part) for part in args.seeds.split(",")]
    args.epochs = [int(part) for part in args.epochs.split(",")]
    arms: dict[str, str] = {}
    for part in args.arms.split(","):
        arm, _, options = part.partition(":")
        if not options and arm not in ARMS:
            raise SystemExit(f"there is no arm {arm!r}; choose from {', '.join(ARMS)}, or NAME:OVERRIDES")
        arms[arm] = options or ARMS[arm]
    arms |= {arm: ARMS[arm] for arm in ALWAYS if arm in ARMS and arm not in arms}
    race(args.model, arms, split(args.images, args.held_out), args)
    print(table(row for row in read(args.out) if row.model == args.model))


if __name__ == "__main__":
    main()
