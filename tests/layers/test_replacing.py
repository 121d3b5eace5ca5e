"""Stripe pruning to the end: smaller networks from masks, on disk and back, trained on, exported, in the tables."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from prune_cli import load_pruned, shrink
from prune_cli import masks as masking
from prune_cli.api import save_pruned
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError, SurgeryError
from prune_cli.files import pruned
from prune_cli.files.weights import read_state_dict
from prune_cli.granularities.stripe import Stripe
from prune_cli.layers.stripe_conv import StripeConv2d
from prune_cli.measure import cost, latency
from prune_cli.models.resnet import resnet
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.torchvision import torchvision
from prune_cli.models.vgg import vgg
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure import rebuild, verified
from prune_cli.structure.lineage import Lineage, Replacement
from tests.conftest import ROOT

STRIPES = (
    "run", "recipe=quickstart", "granularity=stripe", "granularity.ratio=0.7", "limit_batches=2", "train.epochs=1",
    "finetune.epochs=2", "latency=false", "device=cpu", "threads=1",
)  # fmt: skip
L1 = Criterion(weights.l1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(model: nn.Module) -> nn.Module:
    """Norms with statistics, and biases and affine numbers that say something."""
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def chosen(model: nn.Module, image: torch.Tensor, ratio: float = 0.8, dead: dict[str, list[int]] | None = None):
    """Masks by magnitude, with some filters dead, completed and applied."""
    masks = select(Granularity(Stripe(), ratio), L1, model, image).masks
    for name, filters in (dead or {}).items():
        masks[name] = masks[name].clone()
        masks[name][filters] = False
    masks = Stripe().complete(model, image, masks)
    masking.apply(model, masks)
    return masks


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4, dilation=2),
        nn.Sigmoid(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.Conv2d(12, 6, (1, 3)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


NETWORKS = {
    "vgg": (lambda: vgg(num_classes=10, in_shape=(3, 32, 32), depth=11), {"features.4.weight": [0, 5, 100]}),
    "resnet20": (
        lambda: resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=20),
        {"layer1.0.conv1.weight": [1, 2]},
    ),
    "bottleneck": (lambda: resnet(num_classes=10, in_shape=(3, 32, 32), depth=50), {"layer2.0.conv2.weight": [7]}),
    "grouped": (grouped, {"7.weight": [0, 1]}),
    "depthwise": (lambda: torchvision(name="mobilenet_v2", num_classes=10, in_shape=(3, 32, 32)), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_shrunk_equals_masked_and_comes_back_from_its_lineage(name):
    make, dead = NETWORKS[name]
    torch.manual_seed(0)
    model = stirred(make())
    image, x = torch.zeros(1, 3, 32, 32), draw(2, 3, 3, 32, 32)
    masks = chosen(model, image, dead=dead)
    small = verified.shrink(Stripe(), model, image, masks, check_on=[x[:1]])
    with torch.no_grad():
        want, got = model(x), small.model(x)
    assert float((want - got).abs().max() / want.abs().max()) <= 1e-5
    assert any(isinstance(module, StripeConv2d) for module in small.model.modules())
    assert not small.masks
    for parameter in dead:
        layer = small.model.get_submodule(parameter.removesuffix(".weight"))
        assert layer.out_channels < model.get_submodule(parameter.removesuffix(".weight")).out_channels
    # what was counted on masks is what is left
    before, after = cost.cost(model, image, masks), cost.cost(small.model, image)
    assert after.params == after.params_nonzero <= before.params_nonzero
    for layer in after.layers:
        if layer.kind == "StripeConv2d":
            module = small.model.get_submodule(layer.name)
            assert layer.macs == module.weight.numel() * layer.output_shape[2] * layer.output_shape[3]
    lineage = Lineage.from_dict(small.lineage.to_dict())
    again = rebuild.rebuild(make(), lineage)
    again.load_state_dict(small.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), got)


def test_a_filter_that_died_leaves_nothing_behind_its_norm():
    """Without the completion the norm's shift would speak on through the ReLU."""
    model = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()))
    image, x = torch.zeros(1, 3, 8, 8), draw(0, 2, 3, 8, 8)
    raw = {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    raw["0.weight"][1] = False
    masks = Stripe().complete(model, image, raw)
    assert set(masks) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
    assert masks["1.bias"].tolist() == [True, False, True, True]
    masking.apply(model, masks)
    small = verified.shrink(Stripe(), model, image, masks)
    assert small.model[0].out_channels == small.model[3].in_channels == 3
    with torch.no_grad():
        assert torch.allclose(small.model(x), model(x), atol=1e-6)
    # incomplete masks remove nothing that still speaks
    other = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()))
    masking.apply(other, raw)
    kept = verified.shrink(Stripe(), other, image, raw)
    assert kept.model[0].out_channels == 4
    with torch.no_grad():
        assert torch.allclose(kept.model(x), other(x), atol=1e-6)


@pytest.mark.parametrize("which", ["conv1", "conv2", "both"])
def test_a_residual_branch_without_stripes_gives_the_network_without_it(which):
    torch.manual_seed(0)
    model = stirred(resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=20))
    image, x = torch.zeros(1, 3, 32, 32), draw(1, 2, 3, 32, 32)
    names = {"conv1": ["conv1"], "conv2": ["conv2"], "both": ["conv1", "conv2"]}[which]
    masks = select(Granularity(Stripe(), 0.5), L1, model, image).masks
    masks |= {f"layer2.1.{name}.weight": torch.zeros(32, 1, 3, 3, dtype=torch.bool) for name in names}
    masks = Stripe().complete(model, image, masks)
    masking.apply(model, masks)
    small = verified.shrink(Stripe(), model, image, masks, check_on=[x[:1]])
    with torch.no_grad():
        want, got = model(x), small.model(x)
    assert float((want - got).abs().max() / want.abs().max()) <= 1e-5
    block = small.model.get_submodule("layer2.1")
    if which != "conv2":
        assert block.conv1.out_channels == 1
        assert block.conv1.weight.numel() == 0
    small.model.train()(x).sum().backward()  # and it still trains


def test_a_family_never_dies_whole():
    model = grouped()
    image = torch.zeros(1, 3, 32, 32)
    masks = {
        name: torch.zeros_like(mask) for name, mask in select(Granularity(Stripe()), L1, model, image).masks.items()
    }
    masks = Stripe().complete(model.eval(), image, masks)
    masking.apply(model, masks)
    small = verified.shrink(Stripe(), model, image, masks, check_on=[image])
    assert all(getattr(module, "out_channels", 1) >= 1 for module in small.model.modules())


def test_a_weight_that_the_network_reads_itself_stays_masked():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.read = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(self.conv(x), self.read.weight).mean((2, 3))

    model = Own().eval()
    image = draw(0, 1, 3, 9, 9)
    masks = chosen(model, image, 0.6)
    small = verified.shrink(Stripe(), model, image, masks, check_on=[image])
    assert type(small.model.conv) is StripeConv2d
    assert type(small.model.read) is nn.Conv2d
    assert set(small.masks) == {"read.weight"}


def test_only_layers_that_get_faster_are_converted_where_asked(monkeypatch):
    model = grouped().eval()
    image = torch.zeros(1, 3, 32, 32)
    masks = chosen(model, image, 0.6)
    clock = itertools.cycle([2.0, 1.0])  # stripes take half of the dense time
    timed = latency.Latency(0, 0, 0, 1, "cpu", "float32", 1, 1)

    def said(layer, images, device, **_):
        verdict = isinstance(layer[0], StripeConv2d) == (layer[0].out_channels == 12)
        next(clock)
        return latency.Latency(**{**vars(timed), "median_ms": 1.0 if verdict else 2.0})

    monkeypatch.setattr("prune_cli.granularities.stripe.latency", said)
    small = verified.shrink(Stripe("faster"), model, image, masks, check_on=[image])
    kinds = {name: type(module) for name, module in small.model.named_modules() if hasattr(module, "out_channels")}
    assert kinds == {"0": nn.Conv2d, "3": StripeConv2d, "5": StripeConv2d, "7": nn.Conv2d}
    assert set(small.masks) == {"0.weight", "7.weight"}


def test_a_lineage_of_stripes_is_not_sliced_again():
    stripes = Replacement("stripes", {"stripes": "1 2"})
    first = Lineage(replaced={"block.conv": stripes})
    assert Lineage({"other.weight": {0: (1,)}}).after(first).replaced == {"block.conv": stripes}
    for second in (
        Lineage({"block.conv.weight": {0: (1,)}}),
        Lineage(attributes={"block.conv": {"out_channels": 1}}),
        Lineage(replaced={"block.conv": stripes}),
        Lineage(replaced={"block": stripes}),
    ):
        with pytest.raises(SurgeryError, match="expand the network first"):
            second.after(first)


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.thorough
def test_stripes_shrink_train_on_reload_and_evaluate(prune):
    result = prune(*STRIPES)
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.loc["finetune", "params"] == rows.loc["finetune", "params_nonzero"] < rows.loc["train", "params"]
    assert rows.loc["finetune", "macs"] == rows.loc["finetune", "macs_nonzero"] < 0.5 * rows.loc["train", "macs"]
    folder = result.folder / "finetune"
    assert not (folder / "masks.safetensors").exists()
    assert "StripeConv2d" in (result.folder / "layers.csv").read_text()
    code = (
        "import sys, torch; from prune_cli import load_pruned\n"
        "images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): print(load_pruned(sys.argv[1])(images).flatten().tolist())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert fresh.stdout.strip() == str(pruned.load(folder)(images).flatten().tolist())
    evaluated = prune("evaluate", str(result.folder))
    assert f"acc1 {rows.loc['finetune', 'acc1']:.2f}" in evaluated.out, evaluated.err
    assert f"({int(rows.loc['finetune', 'params'])})" in evaluated.out
    assert f"({int(rows.loc['finetune', 'macs'])})" in evaluated.out
    again = prune(*STRIPES)
    assert again.err.count("taken from the store") == 3


def test_masked_and_shrunk_runs_say_the_same(prune):
    shrunk = prune(*STRIPES, "granularity.ratio=0.9", "stages=[train,prune]")
    kept = prune(*STRIPES, "granularity.ratio=0.9", "stages=[train,prune]", "granularity.shrink=false")
    assert shrunk.code == kept.code == 0, shrunk.err + kept.err
    small, masked = shrunk.rows.loc["prune"], kept.rows.loc["prune"]
    assert small.loss == pytest.approx(masked.loss, rel=1e-5)
    assert small.params < masked.params == kept.rows.loc["train", "params"]
    assert small.macs == pytest.approx(masked.macs_nonzero, rel=1e-3)
    assert small.params == masked.params_nonzero


def test_a_second_round_goes_on_from_what_is_left(prune):
    stages = "stages=[train,prune,finetune,prune,finetune]"
    first, second = prune(*STRIPES, stages, "granularity.ratio=0.4"), prune(*STRIPES, stages, "granularity.ratio=0.4")
    assert first.code == 0, first.err
    assert first.rows.params.is_monotonic_decreasing
    assert first.rows.loc["prune_2", "ratio_prunable"] == pytest.approx(0.4, abs=0.01)
    assert second.err.count("taken from the store") == 5
    higher = prune(*STRIPES, stages, "granularity.ratio=0.4", "granularity=filter", "granularity.ratio=0.5")
    assert higher.code == 0, higher.err


def test_an_iterative_schedule_ends_in_a_smaller_network(prune):
    result = prune(
        *STRIPES, "stages=[prune,finetune]", "schedule=iterative", "schedule.epochs=3", "schedule.retrain_epoch=2",
        "schedule.prune_freq=1", "granularity.ratio=0.9",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.rows.loc["prune", "params"] < 0.9 * result.rows.loc["initial", "params"]


def test_stripes_are_exported_and_checked(prune, workplace):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = prune(*STRIPES, "stages=[train,prune]")
    done = prune("export", str(result.folder), "--onnx", "small.onnx", "--program", "small.pt2")
    assert done.code == 0, done.err
    assert done.out.count("outputs differ by") == 2


def test_python_shrinks_what_a_folder_holds_unless_it_is_stripes(prune, tmp_path):
    images = draw(0, 2, 1, 8, 8)
    filters = prune(*STRIPES, "stages=[prune]", "granularity=filter", "granularity.ratio=0.3")
    small = shrink(load_pruned(filters.folder / "prune"), images, 0.5)
    save_pruned(small, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "again")(images), small(images))
    stripes = prune(*STRIPES, "stages=[prune]")
    loaded = load_pruned(stripes.folder / "prune")
    with pytest.raises(ConfigError, match="consists of single stripes"):
        shrink(loaded, images, 0.5)
    save_pruned(loaded, tmp_path / "stripes")
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "stripes")(images), loaded(images))


def test_damaged_stripes_in_pruned_yaml_are_refused(prune):
    result = prune(*STRIPES, "stages=[train,prune]")
    path = result.folder / "prune" / "pruned.yaml"
    text = path.read_text()
    assert "\nreplaced:" in text
    path.write_text(text.replace("\nreplaced:", "\nreplaced_:"))
    done = prune("evaluate", str(result.folder))
    assert done.code == 4
    assert len(done.err.strip().splitlines()) == 1, done.err
    state = read_state_dict(result.folder / "prune" / "weights.safetensors")
    assert any(name.endswith(".stripes") for name in state)


def test_layers_of_1x1_are_refused_in_one_line(prune):
    result = prune(
        "run", "recipe=quickstart", "model=resnet50", "dataset=cifar10", "dataset.fake=true", "device=cpu",
        "granularity=stripe", "granularity.rules=[{names_re: '.*conv1', ratio: 0.5}]",
    )  # fmt: skip
    assert result.code == 2
    assert "needs a convolution with kernels larger than 1x1" in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
