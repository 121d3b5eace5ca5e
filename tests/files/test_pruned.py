"""Pruned networks as files: bit-equal after the way out and back, and nothing that was altered comes in."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_cli import masks as masking
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.files import builders, pruned
from prune_cli.files.weights import load_weights
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.models.resnet import resnet
from prune_cli.models.vgg import vgg
from prune_cli.ranges import indices_of, ranges
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure import verified

IMAGE = torch.zeros(1, 3, 32, 32)
L1 = Criterion(weights.l1)


def node(family: str, **arguments) -> dict:
    target = f"prune_cli.models.{family}.{family}"
    return {"_target_": target, **arguments, "num_classes": 10, "in_shape": [3, 32, 32]}


def built(content: dict) -> nn.Module:
    """A network with norm statistics and biases that are not the initial ones."""
    torch.manual_seed(1)
    model = builders.construct(content, None, None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    return model.eval()


def small(model: nn.Module, ratio: float = 0.5, lineage=None) -> verified.Small:
    chosen = select(Granularity(Filter(), ratio=ratio), L1, model, IMAGE)
    masking.apply(model, chosen.masks)
    return verified.shrink(Filter(), model, IMAGE, chosen.masks, lineage=lineage, check_on=[torch.rand_like(IMAGE)])


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A folder of a pruned ResNet-20."""
    content = node("resnet_cifar", depth=8)
    shrunk = small(built(content))
    pruned.write(tmp_path, shrunk.model, pruned.Record(content, shrunk.lineage))
    return tmp_path


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_and_back(indices):
    ordered = tuple(sorted(indices))
    assert indices_of(ranges(ordered), len(ordered)) == ordered
    with pytest.raises(ValueError, match="more indices than there can be"):
        indices_of(ranges(ordered), len(ordered) - 1)


@pytest.mark.parametrize("text", ["3-1", "4 4", "a", "1,2", "0-9999999999", "-1", "0-3 3-5", "٣"])
def test_ranges_that_are_none(text):
    with pytest.raises(ValueError):
        indices_of(text, 10**9)


@pytest.mark.parametrize(
    "content",
    [
        node("resnet_cifar", depth=8),  # shortcuts padded with zeros
        node("torchvision", name="mobilenet_v3_small"),
        node("torchvision", name="shufflenet_v2_x0_5"),
        node("wide_resnet", depth=10, width=1),
    ],
    ids=lambda content: content.get("name", content["_target_"]),
)
def test_two_rounds_come_back_with_the_same_bits(tmp_path, content):
    first = small(built(content))
    second = small(first.model, 0.3, first.lineage)
    with torch.no_grad():
        wanted = second.model.eval()(images())
    pruned.write(tmp_path, second.model, pruned.Record(content, second.lineage))
    found = pruned.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(found(images()), wanted)
    assert sum(p.numel() for p in found.parameters()) < 0.6 * sum(p.numel() for p in built(content).parameters())


def test_element_masks_come_back(tmp_path):
    content = node("vgg", depth=11)
    model = built(content)
    chosen = select(Granularity(Element(), ratio=0.7), L1, model, IMAGE)
    masking.apply(model, chosen.masks)
    pruned.write(tmp_path, model, pruned.Record(content), chosen.masks)
    assert (tmp_path / "masks.safetensors").is_file()
    found = pruned.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(found(images()), model(images()))
    assert {name: mask.sum() for name, mask in pruned.read_masks(tmp_path).items()} == {
        name: mask.sum() for name, mask in chosen.masks.items()
    }


def test_element_masks_inside_a_shrunk_network():
    model = built(node("vgg", depth=11))
    elements = select(Granularity(Element(), ratio=0.5), L1, model, IMAGE).masks
    masking.apply(model, elements)
    filters = select(Granularity(Filter(), ratio=0.5), L1, model, IMAGE).masks
    both = {name: elements.get(name, mask) & mask for name, mask in filters.items()}
    masking.apply(model, filters)
    shrunk = verified.shrink(Filter(), model, IMAGE, both, check_on=[images(1)])
    assert shrunk.masks
    parameters = dict(shrunk.model.named_parameters())
    for name, mask in shrunk.masks.items():
        assert mask.shape == parameters[name].shape
        assert not parameters[name][~mask].any()


@pytest.mark.parametrize("family", ["vgg16", "resnet18", "resnet50"])
def test_a_network_built_from_the_cfg_takes_the_weights(tmp_path, family):
    depth = int(family.strip("vgresnt"))
    content = node(family.rstrip("0123456789"), depth=depth)
    shrunk = small(built(content), 0.6)
    pruned.write(tmp_path, shrunk.model, pruned.Record(content, shrunk.lineage))
    written = yaml.safe_load((tmp_path / "pruned.yaml").read_text())
    build = {"vgg16": vgg, "resnet18": resnet, "resnet50": resnet}[family]
    extra = {"projection": written["projection"]} if "projection" in written else {}
    model = build(num_classes=10, in_shape=(3, 32, 32), depth=depth, cfg=written["cfg"], **extra)
    load_weights(model, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), shrunk.model.eval()(images()))
        assert torch.equal(pruned.load(tmp_path)(images()), shrunk.model(images()))


def test_no_cfg_where_widths_do_not_say_it_all(folder):
    assert "cfg" not in yaml.safe_load((folder / "pruned.yaml").read_text())
    with pytest.raises(ConfigError, match="no `cfg:`"):
        pruned.read_cfg(folder / "pruned.yaml")


def signed(content: dict) -> dict:
    """The content as somebody would forge it, with a checksum that matches."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def other_builder(content):
    content["model"] = {"builder": "subprocess.check_output", "arguments": {"args": ["true"]}}


def function_that_is_no_builder(content):
    content["model"] = {"builder": "prune_cli.models.torchvision._downloaded", "arguments": {"url": "http://x"}}


def nested_code(content):
    content["model"]["arguments"]["depth"] = {"_target_": "os.getcwd"}


def attribute_that_is_no_number(content):
    content["attributes"]["conv1"]["out_channels"] = "8"


def attribute_that_is_a_method(content):
    content["attributes"]["conv1"]["forward"] = 1


def fewer_indices(content):
    group = content["kept"][0]
    group["indices"] = ranges(indices_of(group["indices"], 1000)[:-1])


def indices_outside(content):
    content["kept"][0]["indices"] = "0-7 99999"


def another_width(content):
    content["widths"]["linear"] = 11


def another_file(content):
    content["sha256"] = {"../weights.safetensors": "0"}


def newer_format(content):
    content["format"] = 99


def no_kept(content):
    del content["kept"]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (other_builder, "outside prune"),
        (function_that_is_no_builder, "outside prune"),
        (nested_code, "plain values"),
        (attribute_that_is_no_number, "only numbers"),
        (attribute_that_is_a_method, "no number of this network"),
        (fewer_indices, "fit"),
        (indices_outside, "fit"),
        (another_width, "'linear' should have 11 outputs"),
        (another_file, "sha256 differs"),
        (newer_format, "format 99"),
        (no_kept, "KeyError"),
    ],
)
def test_forged_files_are_refused_in_one_line(folder, forge, message):
    content = yaml.safe_load((folder / "pruned.yaml").read_text())
    forge(content)
    (folder / "pruned.yaml").write_text(yaml.safe_dump(signed(content), sort_keys=False))
    with pytest.raises(CheckpointError, match=message) as error:
        pruned.load(folder)
    assert "\n" not in str(error.value)


def test_a_change_by_hand_is_refused_although_it_fits(folder):
    path = folder / "pruned.yaml"
    assert "dense_sha256: null" in path.read_text()
    path.write_text(path.read_text().replace("dense_sha256: null", "dense_sha256: abc"))
    with pytest.raises(CheckpointError, match="edited"):
        pruned.load(folder)


def test_other_weights_are_refused(folder):
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        pruned.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="can't read"):
        pruned.load(folder)
    with pytest.raises(CheckpointError, match="can't read"):
        pruned.load(folder / "nowhere")
