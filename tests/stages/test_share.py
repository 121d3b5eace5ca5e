"""The weight-sharing stage from the command line: its file, its tables, resuming, other networks and masks, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from prune_cli import load_pruned
from prune_cli.compression import huffman
from prune_cli.compression import kmeans as clustering
from prune_cli.compression.container import MAGIC
from prune_cli.errors import CheckpointError
from prune_cli.files.weights import read_state_dict
from tests.compression.test_container import rewritten
from tests.conftest import ROOT

PLAIN = ("latency=false", "device=cpu", "threads=1", "deterministic=true")
DIGITS = ("run", "recipe=lenet_digits_deep_compression", *PLAIN, "train.epochs=2", "schedule=one_shot")
# A small convolutional network with norms, on made-up images.
CONV = (
    "run", "recipe=resnet20_cifar10_filter", *PLAIN, "dataset=fake", "model.depth=8", "model.widths=[8,8,16]",
    "dataset.shape=[3,8,8]", "train.epochs=1", "train.batch_size=64", "finetune.epochs=1", "finetune.batch_size=64",
    "share.epochs=1", "share.batch_size=64", "lr_schedule@share.lr_schedule=constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The run folder of a short run of the recipe."""
    place = tmp_path_factory.mktemp("shared")
    done = subprocess.run(
        [sys.executable, "-m", "prune_cli", *DIGITS, "share.epochs=2"],
        cwd=place, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place / done.stdout.strip().splitlines()[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(folder / "weights.safetensors")


@pytest.mark.thorough
def test_few_values_the_same_zeros_and_trained_centroids(shared):
    before, after = weights(shared / "prune"), weights(shared / "share")
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert torch.equal(after[name] == 0, before[name] == 0)
        assert len(after[name].unique()) <= 2**6
        kmeans = clustering.cluster(before[name], before[name] != 0, 2**6 - 1).weight
        assert not torch.equal(after[name], kmeans)
        assert float((after[name] - kmeans).abs().max()) < 0.2
    assert not torch.equal(after["fc1.bias"], before["fc1.bias"])


def test_bytes_of_the_stages_by_hand(shared):
    rows = pandas.read_csv(shared / "results.csv").set_index("stage")
    layers = pandas.read_csv(shared / "layers.csv").query("stage == 'share'").set_index("layer")
    biases = 4 * (300 + 100 + 10)
    totals = dict.fromkeys(("bytes_pruned", "bytes_shared", "bytes_entropy"), biases)
    for name in ("fc1", "fc2", "fc3"):
        weight = weights(shared / "share")[f"{name}.weight"]
        bias = 4 * weight.shape[0]
        places = np.flatnonzero(weight.numpy())
        runs = np.diff(np.concatenate([[-1], places, [weight.numel()]])) - 1
        fillers = int((runs // 32).sum())
        entries = len(places) + fillers
        values = weight.flatten()[places].numpy()
        counts = (
            np.append(np.unique(values, return_counts=True)[1], fillers)
            if fillers
            else np.unique(values, return_counts=True)[1]
        )
        book = 4 * len(counts)
        codes = math.ceil(math.log2(len(counts)))
        assert layers.loc[name, "bytes_pruned"] == math.ceil(entries * 37 / 8) + bias
        assert layers.loc[name, "bytes_shared"] == math.ceil(entries * (codes + 5) / 8) + book + bias
        gaps = np.bincount(np.concatenate([runs[:-1] % 32, np.full(fillers, 31)]).astype(int))
        ideal = entries * (huffman.entropy(counts) + huffman.entropy(gaps))
        assert layers.loc[name, "bytes_entropy"] == math.ceil(math.ceil(ideal) / 8) + book + bias
        bits = sum(int((huffman.code_lengths(count).astype(int) * count).sum()) for count in (counts, gaps))
        tables = len(counts) + 32 + 2 * 2 * math.ceil(entries / 1024)
        assert layers.loc[name, "bytes_huffman"] == pytest.approx(bits / 8 + tables + book + bias, abs=2)
        assert layers.loc[name, "bytes_codebooks"] == book
        for key in totals:
            totals[key] += layers.loc[name, key] - bias
    assert {key: rows.loc["share", key] for key in totals} == totals
    assert rows.loc["share", "bytes_stored"] == rows.loc["share", "bytes_huffman"] == layers.bytes_stored.sum()
    sizes = rows.loc["share", ["bytes", "bytes_pruned", "bytes_shared", "bytes_huffman", "bytes_entropy"]].tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert rows.loc["share", "compression_bytes"] == pytest.approx(1066440 / rows.loc["share", "bytes_stored"])
    assert rows.loc["share", "bytes_huffman"] < (shared / "share/weights.compressed").stat().st_size < (
        rows.loc["share", "bytes_huffman"] + 1500
    )  # fmt: skip
    assert rows.bytes_pruned.isna().tolist() == [True, True, False]


def test_the_file_alone_gives_the_same_logits_in_a_fresh_process(shared, tmp_path):
    (tmp_path / "any.name").write_bytes((shared / "share/weights.compressed").read_bytes())
    images = torch.randn(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = load_pruned(shared / "share")(images)
    code = (
        "import sys, torch; from prune_cli import load_pruned\n"
        "torch.set_num_threads(1)\n"
        "def no(*a, **k): raise AssertionError('pickle')\n"
        "import pickle; pickle.load = pickle.loads = pickle.Unpickler = no\n"
        "x = torch.randn(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))\n"
        "sys.stdout.write(load_pruned('any.name')(x).detach().numpy().tobytes().hex())"
    )
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.detach().numpy().tobytes().hex()


def test_evaluate_reads_the_file_in_its_run_and_alone(shared, prune, workplace):
    stage = prune("evaluate", str(shared / "share"))
    assert stage.code == 0, stage.err
    inside = prune("evaluate", str(shared / "share/weights.compressed"))
    assert inside.out == stage.out, inside.err
    (workplace / "alone").write_bytes((shared / "share/weights.compressed").read_bytes())
    alone = prune("evaluate", "alone", "dataset=digits", "dataset.image_size=28")
    assert alone.out == stage.out, alone.err
    assert "give dataset=NAME" in prune("evaluate", "alone").err
    other = prune("run", *DIGITS[1:], "stages=[prune]", "model.weights=alone")  # its tensors are weights like others
    assert other.code == 0, other.err
    assert other.rows.loc["initial", "acc1"] == pytest.approx(
        float(stage.out.split("acc1 ")[1].split(",")[0]), abs=0.01
    )


def network(header):
    return header["network"]


LIES = {
    "foreign builder": (lambda h: network(h)["model"].__setitem__("builder", "os.system"), "outside prune"),
    "other class": (lambda h: network(h)["model"].__setitem__("builder", "prune_cli.models.lenet.LeNet5"), "outside"),
    "other network": (lambda h: network(h)["model"].__setitem__("builder", "prune_cli.models.lenet.lenet5"), "widths"),
    "other widths": (lambda h: network(h)["model"]["arguments"].__setitem__("widths", [300, 101]), "outputs"),
    "unknown argument": (lambda h: network(h)["model"]["arguments"].__setitem__("depth", 3), "depth"),
    "no network": (lambda h: h.pop("network"), "does not say of which network"),
    "text": (lambda h: h.__setitem__("network", "lenet"), "damaged"),
    "missing key": (lambda h: network(h).pop("kept"), "damaged"),
    "format": (lambda h: network(h).__setitem__("format", 7), "format 7"),
    "attributes": (lambda h: network(h).__setitem__("attributes", {"fc1": {"forward": "x"}}), "only numbers"),
    "renamed tensor": (lambda h: h["tensors"][0].__setitem__("name", "fc1.shift"), "missing"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES.keys())
def test_files_that_lie_about_the_network_are_refused_in_one_line(shared, tmp_path, change, message):
    content = rewritten((shared / "share/weights.compressed").read_bytes(), change)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pruned(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused_in_one_line_by_every_reader(shared, prune, workplace):
    content = (shared / "share/weights.compressed").read_bytes()
    assert content.startswith(MAGIC)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 16
    for damaged in (
        content[:-1],
        content[: len(content) // 2],
        content[:20],
        content[:8],
        bytes(flipped),
        content + b"0",
    ):
        (workplace / "x").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            load_pruned("x")
        result = prune("evaluate", "x", "dataset=digits", "dataset.image_size=28")
        assert result.code == 4 and len(result.err.strip().splitlines()) == 1
    for other in (b"", content[:5], (shared / "share/weights.safetensors").read_bytes()):
        (workplace / "x").write_bytes(other)
        with pytest.raises(CheckpointError, match="would begin with"):
            load_pruned("x")


@pytest.mark.parametrize("stop_after", [pytest.param(1, marks=pytest.mark.thorough), 30])
def test_stopping_and_going_on_gives_the_same_bits(prune, monkeypatch, stop_after):
    from prune_cli.training import fit as loop

    whole = (*DIGITS, "share.epochs=3", "share.fit.ema=0.9", "optimizer@share.optimizer=adamw")
    first = prune(*whole)
    assert first.code == 0, first.err
    monkeypatch.setenv("PRUNE_STORE", "parts")

    def interrupting(*arguments, **options):
        if hasattr(arguments[0].fc1, "parametrizations"):  # the sharing stage
            count = iter(range(1, 1000))
            options |= {"stop": lambda: next(count) >= stop_after}
        return original(*arguments, **options)

    original = loop.fit
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", interrupting)
        stopped = prune(*whole)
        assert stopped.code == 75, stopped.err
    second = prune(*whole)
    assert second.code == 0, second.err
    assert "share: going on from epoch" in second.err
    for file in ("weights.safetensors", "weights.compressed", "masks.safetensors"):
        assert (first.folder / "share" / file).read_bytes() == (second.folder / "share" / file).read_bytes()


def test_without_fine_tuning_it_is_k_means(prune):
    result = prune(*DIGITS, "share.epochs=0", "share.linear.value=3")
    assert result.code == 0, result.err
    before, after = weights(result.folder / "prune"), weights(result.folder / "share")
    for name in ("fc1.weight", "fc3.weight"):
        assert torch.equal(
            after[name], clustering.cluster(before[name], before[name] != 0, 2**3 - ("fc3" not in name)).weight
        )
    assert torch.equal(before["fc1.bias"], after["fc1.bias"])


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        (("granularity=filter", "granularity.ratio=0.5"), "[train,prune,share]"),
        (("granularity=filter", "granularity.ratio=0.5", "granularity.shrink=false"), "[train,prune,share]"),
        (("granularity=stripe", "granularity.ratio=0.7", "criterion=l2"), "[train,prune,finetune,share]"),
        ((), "[train,share]"),
    ],
)
def test_every_kind_of_mask_and_none(prune, keys, stages):
    result = prune(*CONV, *keys, f"stages={stages}")
    assert result.code == 0, result.err
    folder = result.folder / "share"
    after = weights(folder)
    for name, value in after.items():
        if name.endswith("weight") and value.dim() > 1:
            assert len(value.unique()) <= (32 if name.startswith("fc") else 256)
    small = load_pruned(folder / "weights.compressed")
    state = small.state_dict()
    assert all(value.numpy().tobytes() == after[name].numpy().tobytes() for name, value in state.items())
    row, bound = result.rows.loc["share"], sum(value.nbytes for value in after.values())
    assert row.bytes == bound and row.bytes_entropy <= row.bytes_huffman < row.bytes
    assert prune("evaluate", str(folder / "weights.compressed")).out == prune("evaluate", str(folder)).out
    layers = pandas.read_csv(result.folder / "layers.csv").query("stage == 'share'").set_index("layer")
    buffers = sum(v.nbytes for k, v in after.items() if k.rpartition(".")[0] not in layers.index)
    for key in ("bytes_stored", "bytes_pruned", "bytes_shared", "bytes_huffman", "bytes_entropy"):
        assert layers[key].sum() + buffers == row[key]
    assert set(layers.format.dropna()) == {"shared", "dense"}


def test_rules_choose_layers_and_widths(prune):
    rules = "share.rules=[{names: [fc1], value: 2}, {names_re: fc.*, gap: 4}, {names: [fc2], exclude: true}]"
    result = prune(*DIGITS, "share.epochs=1", rules)
    assert result.code == 0, result.err
    after = weights(result.folder / "share")
    assert len(after["fc1.weight"].unique()) > 5  # the last match wins: fc.* says nothing of values
    assert len(after["fc2.weight"].unique()) > 1000
    header = (result.folder / "share/weights.compressed").read_bytes()
    length = int.from_bytes(header[8:12], "little")
    entries = {entry["name"]: entry for entry in json.loads(header[12 : 12 + length])["tensors"]}
    assert (entries["fc1.weight"]["gap_bits"], entries["fc2.weight"]["coding"]) == (4, "raw")
    assert torch.equal(after["fc2.weight"] == 0, weights(result.folder / "prune")["fc2.weight"] == 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("share.linear.value=9",), "share.linear.value"),
        (("share.conv.gap=0",), "share.conv.gap"),
        (("share.linear.valeu=3",), "valeu"),
        (("share.rules=[{names: [fc9]}]",), "share.rules[0].names: no layer 'fc9'"),
        (("share.rules=[{types: [Conv2d]}]",), "share.rules[0]: matches no layer"),
        (("share.rules=[{types: [default], exclude: true}]",), "no layer is left"),
        (("share.rules=[{names: [fc1], value: 0}]",), "share.rules"),
        (("share.epochs=-1",), "share.epochs: input should be greater"),
        (("stages=[train,prune,share,finetune]",), "finetune after share would lose the shared weights"),
        (("share.fit.select_on=val", "dataset.val=0"), "share.fit.select_on"),
        (("distillation=hinton", "stages=[train,share]"), "distillation.teacher=dense"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_training(prune, keys, message):
    result = prune(*DIGITS, *keys)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1 and "starting" not in result.err


def test_tied_weights_are_refused(prune, workplace):
    (workplace / "tied.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes: int):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, num_classes)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(self.a(x.flatten(1)).relu()).relu())\n"
    )
    (workplace / "recipes/model").mkdir(parents=True)
    (workplace / "recipes/model/tied.yaml").write_text("# two layers, one weight\n_target_: tied.Net\nweights: null\n")
    run = ("run", "recipe=quickstart", *PLAIN, "model=tied", "train.epochs=1", "stages=[train,share]", "share.epochs=1")
    result = prune(*run)
    assert result.code == 2 and "a.weight and b.weight are one tensor" in result.err
    result = prune(*run, "share.rules=[{names: [a, b], exclude: true}]")
    assert result.code == 0, result.err
    file = result.folder / "share/weights.compressed"
    with pytest.raises(CheckpointError, match="outside prune"):
        load_pruned(file)
    import tied

    loaded = load_pruned(file, model=tied.Net(10))
    assert torch.equal(loaded.b.weight, weights(result.folder / "share")["a.weight"])
