"""Replaced layers of any kind: pruned inside, on disk and back, and expanded to plain ones.

The two kinds here exist in this file only: a convolution split into two, and a module behind another one.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from prune_cli import load_pruned, shrink
from prune_cli import masks as masking
from prune_cli.api import save_pruned
from prune_cli.errors import CheckpointError, SurgeryError
from prune_cli.files import artifacts, pruned
from prune_cli.granularities.filter import Filter
from prune_cli.layers import replacing
from prune_cli.layers.kind import Data, Expanded, Stored
from prune_cli.masks import Masks
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure import rebuild, verified
from prune_cli.structure.lineage import Lineage, Replacement
from tests.conftest import ROOT
from tests.files.test_pruned import IMAGE, L1, built, images, node, signed, small

FORMAT_1 = Path(__file__).parent / "format_1"  # written by version 0.1, with the logits of `images()`
RESNET = node("resnet_cifar", depth=8)


class Open:
    """What the kinds here have in common: ordinary layers inside."""

    closed = ""

    def masks_left(self, layer: nn.Module, masks: Masks) -> dict[str, Tensor]:
        return dict(masks)

    def out_width(self, layer: nn.Module) -> None:
        return None

    def stored(self, layer: nn.Module) -> dict[str, Stored]:
        return {}


class Split(Open):
    """A convolution as one with its filters in another order, and a 1x1 that puts them back."""

    def build(self, dense: nn.Module, data: Data) -> nn.Module:
        if type(dense) is not nn.Conv2d:
            raise SurgeryError("only convolutions are split")
        order = torch.tensor(data["order"])
        if sorted(data["order"]) != list(range(dense.out_channels)):
            raise SurgeryError(f"order is no permutation of {dense.out_channels} filters")
        first = copy.deepcopy(dense)
        first.bias = None
        back = nn.Conv2d(dense.out_channels, dense.out_channels, 1, bias=dense.bias is not None)
        with torch.no_grad():
            first.weight.copy_(dense.weight[order])
            back.weight.zero_()[order, torch.arange(len(order))] = 1
            if dense.bias is not None:
                back.bias.copy_(dense.bias)
        return nn.Sequential(first, back).train(dense.training)

    def expand(self, layer: nn.Module, masks: Masks) -> Expanded:
        first, back = layer
        whole = nn.Conv2d(
            first.in_channels, back.out_channels, first.kernel_size, first.stride, first.padding,
            bias=back.bias is not None,
        )  # fmt: skip
        with torch.no_grad():
            whole.weight.copy_(torch.einsum("om,mikl->oikl", back.weight[:, :, 0, 0], first.weight))
            if back.bias is not None:
                whole.bias.copy_(back.bias)
        return Expanded(
            whole.train(layer.training),
            axes={("0.weight", 1): ("weight", 1), ("1.weight", 0): ("weight", 0), ("1.bias", 0): ("bias", 0)},
            attributes={"in_channels": whole.in_channels, "out_channels": whole.out_channels},
        )


class Behind(nn.Module):
    """A block behind something; here only a number that it is multiplied by."""

    def __init__(self, block: nn.Module, factor: float) -> None:
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.factor


class Gate(Open):
    def build(self, dense: nn.Module, data: Data) -> nn.Module:
        return Behind(dense, data["factor"]).train(dense.training)

    def expand(self, layer: nn.Module, masks: Masks) -> Expanded:
        own = {name.removeprefix("block."): mask for name, mask in masks.items()}
        return Expanded(layer.block, own, inner="block")


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setitem(replacing.KINDS, "split", Split())
    monkeypatch.setitem(replacing.KINDS, "gate", Gate())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images())


def split(model: nn.Module, *names: str) -> dict[str, Replacement]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Replacement(
            "split", {"order": torch.randperm(model.get_submodule(name).out_channels, generator=generator).tolist()}
        )
        for name in names
    }


def placed(came: verified.Small, replaced: dict[str, Replacement]) -> verified.Small:
    """A network with some modules replaced, as a stage would do it: the function stays."""
    model = copy.deepcopy(came.model)
    rebuild.place(model, replaced)
    assert torch.allclose(logits(model), logits(came.model), atol=1e-6)
    return verified.Small(model, came.masks, Lineage(replaced=replaced).after(came.lineage))


def written(folder: Path, now: verified.Small) -> nn.Module:
    """The network once more, from its files alone."""
    pruned.write(folder, now.model, pruned.Record(RESNET, now.lineage))
    torch.manual_seed(99)
    again = load_pruned(folder)
    assert torch.equal(logits(again), logits(now.model))
    return again


def same_when_plain(now: verified.Small) -> nn.Module:
    """The network with plain layers again, which its new lineage leads to from the dense one."""
    plain, masks, lineage = rebuild.expanded(now.model, now.masks, now.lineage, everything=True)
    assert not masks and not lineage.replaced and not list(replacing.replaced(plain))
    assert torch.allclose(logits(plain), logits(now.model), atol=1e-5)
    again = rebuild.rebuild(built(RESNET), Lineage.from_dict(json.loads(json.dumps(lineage.to_dict()))))
    again.load_state_dict(plain.state_dict())
    assert torch.equal(logits(again), logits(plain))
    return plain


CONVS = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "conv1")


def test_a_split_network_is_pruned_inside_written_loaded_and_expanded(tmp_path):
    first = small(built(RESNET), 0.3)
    halves = placed(first, split(first.model, *CONVS))
    second = small(halves.model, 0.4, halves.lineage)
    for name in CONVS:
        inner = second.model.get_submodule(name)
        assert inner[0].out_channels < halves.model.get_submodule(name)[0].out_channels, "the middle was pruned"
        inside = second.lineage.replaced[name].inside
        assert len(inside.kept["0.weight"][0]) == len(inside.kept["1.weight"][1]) == inner[0].out_channels
        assert not any(kept.startswith(f"{name}.0") for kept in second.lineage.kept)
    assert second.model.layer1[0].conv1[1].out_channels < halves.model.layer1[0].conv1[1].out_channels
    again = written(tmp_path, second)
    assert type(again.layer1[0].conv1) is nn.Sequential
    plain = same_when_plain(second)
    assert type(plain.layer1[0].conv1) is nn.Conv2d
    # a library user goes on from there, with a third round on record
    third = shrink(again, IMAGE, 0.3)
    save_pruned(third, tmp_path / "third")
    assert torch.equal(logits(load_pruned(tmp_path / "third")), logits(third))
    assert third.layer1[0].conv1[0].out_channels < again.layer1[0].conv1[0].out_channels


def test_a_block_behind_a_gate_holds_a_split_convolution_that_is_pruned_on(tmp_path):
    dense = verified.Small(built(RESNET), {}, Lineage())
    halves = placed(dense, split(dense.model, "layer1.0.conv1", "layer2.0.conv2"))
    gated = placed(halves, {name: Replacement("gate", {"factor": 1.0}) for name in ("layer1.0", "layer3.0")})
    later = placed(gated, split(gated.model, "layer3.0.block.conv1"))
    assert set(later.lineage.replaced) == {"layer1.0.conv1", "layer2.0.conv2", "layer1.0", "layer3.0"}
    assert set(later.lineage.replaced["layer3.0"].inside.replaced) == {"block.conv1"}
    now = small(later.model, 0.5, later.lineage)
    assert now.model.layer1[0].block.conv1[0].out_channels == 8
    written(tmp_path, now)
    content = yaml.safe_load((tmp_path / "pruned.yaml").read_text())
    assert content["format"] == 2 and content["replaced"]["layer3.0"]["inside"]["replaced"]["block.conv1"]["inside"]
    plain = same_when_plain(now)
    assert plain.layer1[0].conv1.out_channels == 8


def test_open_kinds_stay_where_weights_are_chosen(tmp_path):
    model = built(RESNET)
    lineage = Lineage(replaced=split(model, "conv1"))
    rebuild.place(model, lineage.replaced)
    same, masks, kept = rebuild.expanded(model, {}, lineage)
    assert same is model and kept is lineage and masks == {}


def test_a_module_under_two_names_is_replaced_and_expanded_once():
    def make() -> nn.Module:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 3, 3, padding=1)
        return nn.ModuleDict({"a": conv, "b": conv})

    model = make()
    replaced = dict.fromkeys(("a", "b"), Replacement("split", {"order": [2, 0, 1]}))
    rebuild.place(model, replaced)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Sequential
    cut = Lineage({f"{name}.{half}.weight": {axis: (0, 2)} for name in "ab" for half, axis in ((0, 0), (1, 1))})
    lineage = cut.after(Lineage(replaced=replaced))
    again = rebuild.rebuild(make(), lineage)
    assert again["a"] is again["b"] and again["a"][0].weight.shape[0] == 2
    plain, _, left = rebuild.expanded(again, {}, lineage, everything=True)
    assert plain["a"] is plain["b"] and type(plain["b"]) is nn.Conv2d and not left.replaced
    with pytest.raises(SurgeryError, match="in different ways"):
        rebuild.place(make(), {**replaced, "b": Replacement("split", {"order": [0, 1, 2]})})


def test_what_is_replaced_is_not_replaced_again():
    model = built(RESNET)
    first = Lineage(replaced=split(model, "conv1"))
    with pytest.raises(SurgeryError, match="replaced already"):
        Lineage(replaced=split(model, "conv1")).after(first)


# ------------------------------------------------------------------------------------------------------- files


def test_stripes_written_by_version_0_1_still_load(tmp_path):
    content = yaml.safe_load((FORMAT_1 / "pruned.yaml").read_text())
    assert content["format"] == 1 and content["stripes"] and "replaced" not in content
    found = load_pruned(FORMAT_1)
    expected = torch.tensor(json.loads((FORMAT_1 / "logits.json").read_text()))
    assert torch.allclose(logits(found), expected, atol=1e-5)
    assert {name for name, _, _ in replacing.replaced(found)} == set(content["stripes"])
    save_pruned(found, tmp_path)
    now = yaml.safe_load((tmp_path / "pruned.yaml").read_text())
    assert now["format"] == 2 and "stripes" not in now
    for name, numbers in content["stripes"].items():
        assert now["replaced"][name] == {"kind": "stripes", "data": {"stripes": numbers}}
    assert torch.equal(logits(load_pruned(tmp_path)), logits(found))


def unknown_kind(replaced):
    replaced["conv1"]["kind"] = "splitt"


def kind_that_is_a_path(replaced):
    replaced["conv1"]["kind"] = ["os.system"]


def data_with_code(replaced):
    replaced["conv1"]["data"]["order"] = {"_target_": "os.getcwd"}


def data_that_are_no_mapping(replaced):
    replaced["conv1"]["data"] = [1, 2]


def data_missing(replaced):
    replaced["conv1"]["data"] = {}


def data_outside(replaced):
    replaced["conv1"]["data"]["order"][0] = 99


def module_that_is_not_there(replaced):
    replaced["conv9"] = replaced.pop("conv1")


def module_of_another_sort(replaced):
    replaced["bn1"] = replaced.pop("conv1")


def indices_outside_inside(replaced):
    replaced["conv1"]["inside"]["kept"][0]["indices"] = "0-999"


def name_outside_inside(replaced):
    replaced["conv1"]["inside"]["kept"][0]["axes"] = ["7.weight 0"]


def negative_axis(replaced):
    replaced["conv1"]["inside"]["kept"][0]["axes"] = ["0.weight -1"]


def method_inside(replaced):
    replaced["conv1"]["inside"]["attributes"]["0"] = {"forward": 1}


def private_attribute_inside(replaced):
    replaced["conv1"]["inside"]["attributes"]["0"] = {"_backward_hooks": 1}


def text_attribute_inside(replaced):
    replaced["conv1"]["inside"]["attributes"]["0"] = {"out_channels": "8"}


def kind_inside_itself(replaced):
    for _ in range(20):
        replaced["conv1"]["inside"] = {
            "kept": [], "attributes": {}, "scales": {},
            "replaced": {"0": copy.deepcopy(replaced["conv1"])},
        }  # fmt: skip


def inside_stripes(replaced):
    replaced["conv1"]["kind"], replaced["conv1"]["data"] = "stripes", {"stripes": "0-5"}


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (unknown_kind, "did you mean 'split'"),
        (kind_that_is_a_path, "TypeError"),
        (data_with_code, "only plain values"),
        (data_that_are_no_mapping, "a mapping of plain values"),
        (data_missing, "the data do not fit the kind split"),
        (data_outside, "no permutation"),
        (module_that_is_not_there, "no module 'conv9'"),
        (module_of_another_sort, "only convolutions"),
        (indices_outside_inside, "do not fit its shape"),
        (name_outside_inside, "no tensor '7.weight'"),
        (negative_axis, "do not fit its shape"),
        (method_inside, "no number of this network"),
        (private_attribute_inside, "no number of this network"),
        (text_attribute_inside, "only numbers"),
        (kind_inside_itself, "inside each other|more than 64 levels"),
        (inside_stripes, "inside which nothing is sliced"),
    ],
)
def test_forged_replacements_are_refused_in_one_line(tmp_path, forge, message):
    dense = verified.Small(built(RESNET), {}, Lineage())
    halves = placed(dense, split(dense.model, "conv1"))
    now = small(halves.model, 0.4, halves.lineage)
    pruned.write(tmp_path, now.model, pruned.Record(RESNET, now.lineage))
    content = yaml.safe_load((tmp_path / "pruned.yaml").read_text())
    forge(content["replaced"])
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump(signed(content), sort_keys=False))
    with pytest.raises(CheckpointError, match=message) as error:
        load_pruned(tmp_path)
    assert "\n" not in str(error.value) and error.value.exit_code == 4


def test_a_format_that_lacks_its_key_is_refused(tmp_path):
    for name in ("pruned.yaml", "weights.safetensors"):
        (tmp_path / name).write_bytes((FORMAT_1 / name).read_bytes())
    content = yaml.safe_load((tmp_path / artifacts.PRUNED).read_text())
    content["format"] = 2
    (tmp_path / artifacts.PRUNED).write_text(yaml.safe_dump(signed(content), sort_keys=False))
    with pytest.raises(CheckpointError, match="KeyError"):
        load_pruned(tmp_path)


def test_another_process_without_the_kind_says_so(tmp_path):
    model = built(RESNET)
    lineage = Lineage(replaced=split(model, "conv1"))
    rebuild.place(model, lineage.replaced)
    pruned.write(tmp_path, model, pruned.Record(RESNET, lineage))
    code = (
        "import sys; from prune_cli import load_pruned\ntry: load_pruned(sys.argv[1])\nexcept Exception as e: print(e)"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "a kind 'split' that this version does not know; there is stripes" in fresh.stdout, fresh.stderr


def test_a_broken_cfg_of_is_not_hidden(tmp_path, monkeypatch):
    content = node("vgg", depth=11)
    model = built(content)

    def broken(model: nn.Module) -> list:
        return model.no_such_attribute

    monkeypatch.setattr("prune_cli.models.vgg.cfg_of", broken)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        pruned.description(model, pruned.Record(content))


def test_masks_inside_a_split_layer_follow_it():
    model = built(RESNET)
    lineage = Lineage(replaced=split(model, "layer1.0.conv1"))
    rebuild.place(model, lineage.replaced)
    fine = {"layer1.0.conv1.0.weight": torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.7}
    masking.apply(model, fine)
    units = select(Granularity(Filter(), ratio=0.5), L1, model, IMAGE).masks
    both = {name: fine.get(name, mask) & mask for name, mask in units.items()}
    masking.apply(model, units)
    shrunk = verified.shrink(Filter(), model, IMAGE, both, lineage=lineage, check_on=[images(1)])
    mask = shrunk.masks["layer1.0.conv1.0.weight"]
    weight = shrunk.model.get_parameter("layer1.0.conv1.0.weight")
    assert mask.shape == weight.shape and not weight[~mask].any() and weight.shape[0] < 16
