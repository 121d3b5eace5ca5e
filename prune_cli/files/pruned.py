"""A pruned network as files: `pruned.yaml` says what it is, `weights.safetensors` holds its numbers.

    format: 2
    model: {builder: prune_cli.models.vgg.vgg, arguments: {depth: 16, ...}}
    num_classes, in_shape      what the builder is given besides
    widths                     layer -> outputs of every convolution and linear layer
    cfg, projection            the same as the builder takes them, where it can build the small network from widths
    kept                       which positions of the dense network's parameters and buffers are left, as ranges
    attributes, scales         numbers in modules that followed; factors on parameters (see surgery.Lineage)
    replaced                   module -> kind and data of what replaces it; `inside`, if anything: its kept, attributes,
                               scales and replaced, by names inside it (format 1 has `stripes`: convolution -> numbers)
    dense_sha256               of the dense network's weights, as in results.csv
    masks                      file of masks, where weights are masked inside the tensors
    sha256                     of the files beside it
    checksum                   of all that is written above it

A compressed file says the same in its header, without masks and hashes. Loading builds the dense network, takes out
what `kept` leaves out, and fills in the weights. Only builders of this package are called, on plain values; anything
else, and any change by hand, is refused. So are kinds of replaced layers that are not in `layers.replacing.KINDS`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.compression import container
from prune_cli.errors import CheckpointError, ConfigError, SurgeryError, nearest
from prune_cli.files import artifacts
from prune_cli.files.builders import FAMILIES, PLAIN, build, construct, require_plain
from prune_cli.files.checkpoint import require_classes, require_shape
from prune_cli.files.fitting import fit_weights
from prune_cli.files.weights import Extent, extent_of, extent_of_state, load_weights, read_state_dict, write_weights
from prune_cli.hashing import file_sha256
from prune_cli.layers import replacing, stripes
from prune_cli.ranges import indices_of, ranges
from prune_cli.reading import mapping, read_yaml, shown
from prune_cli.structure import rebuild
from prune_cli.structure.lineage import Lineage, Replacement
from prune_cli.structure.prunable import PRUNABLE

FORMAT = 2
FORMATS = (1, 2)  # that are read
DEPTH = 8  # of replaced modules inside replaced modules, at most
HEADER = "# A pruned network, to be loaded by prune_cli.load_pruned(FOLDER). Not to be edited: it carries checksums.\n"


@dataclass(frozen=True)
class Record:
    """What `pruned.yaml` says, beside what is computed from the network itself.

    Attributes:
        node: builder and arguments, as in a recipe's `model`; an unknown builder for a user's own network.
        lineage: what is left of the dense network.
        num_classes: outputs of the network, or None where nobody said.
        in_shape: (channels, height, width) of an input, or None.
        dense_sha256: hash of the dense network's weights; None where a library call made the network.
        cfg: arguments from which the builder makes the small network itself: `cfg` and perhaps `projection`.
    """

    node: Mapping[str, Any]
    lineage: Lineage = field(default_factory=Lineage)
    num_classes: int | None = None
    in_shape: tuple[int, ...] | None = None
    dense_sha256: str | None = None
    cfg: Mapping[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------- writing


def write(folder: Path, model: nn.Module, record: Record, masks: masking.Masks | None = None) -> None:
    """Writes `pruned.yaml`, the weights and, where there are any, the masks; the yaml last.

    Raises:
        StorageError: the folder cannot be written.
    """
    files = [artifacts.WEIGHTS]
    write_weights(model.state_dict(), folder / artifacts.WEIGHTS)
    if masks:
        write_weights(dict(masks), folder / artifacts.MASKS)
        files.append(artifacts.MASKS)
    content = description(model, record)
    content["masks"] = artifacts.MASKS if masks else None
    content["sha256"] = {name: file_sha256(folder / name) for name in files}
    content["checksum"] = _checksum(content)
    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(content, Dumper=dumper, sort_keys=False, default_flow_style=None, width=120)
    artifacts.write_text(folder / artifacts.PRUNED, HEADER + text)


def description(model: nn.Module, record: Record) -> dict[str, Any]:
    """What a file says of a network, as JSON data; without what it says of other files."""
    arguments = {k: v for k, v in record.node.items() if k not in ("_target_", "num_classes", "in_shape", "weights")}
    attributes = {name: dict(values) for name, values in record.lineage.attributes.items()}
    if arguments.get("pretrained") and hasattr(model, "transform_input"):  # set by pretrained weights, not by arguments
        attributes.setdefault("", {})["transform_input"] = bool(model.transform_input)
    return {
        "format": FORMAT,
        "model": {"builder": record.node.get("_target_"), "arguments": arguments},
        "num_classes": record.node.get("num_classes", record.num_classes),
        "in_shape": record.node.get("in_shape") or (list(record.in_shape) if record.in_shape else None),
        "widths": recorded_widths(model),
        **_cfg(model, record),
        **_content_of(replace(record.lineage, attributes=attributes)),
        "dense_sha256": record.dense_sha256,
    }


def recorded_widths(model: nn.Module) -> dict[str, int]:
    """Outputs of every convolution and linear layer, by dotted name."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if (kind := replacing.kind_of(module)) is not None:
            width = kind.out_width(module)
        elif isinstance(module, PRUNABLE):
            width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
        else:
            continue
        if width is not None:
            found[name] = width
    return found


def _content_of(lineage: Lineage) -> dict[str, Any]:
    return {
        "kept": _grouped(lineage),
        "attributes": {name: dict(values) for name, values in lineage.attributes.items()},
        "scales": {name: list(values) for name, values in lineage.scales.items()},
        "replaced": {
            name: {"kind": one.kind, "data": dict(one.data)}
            | ({"inside": _content_of(one.inside)} if one.inside else {})
            for name, one in lineage.replaced.items()
        },
    }


def _cfg(model: nn.Module, record: Record) -> dict[str, Any]:
    """`cfg` (and `projection`) where the builder makes exactly this network from them, else nothing."""
    target = str(record.node.get("_target_"))
    if not target.startswith(FAMILIES) or record.lineage.replaced or record.lineage.scales:
        return {}
    family = importlib.import_module(target.rpartition(".")[0])
    found = {
        key: function
        for key, function in (
            ("cfg", getattr(family, "cfg_of", None)),
            ("projection", getattr(family, "projection_of", None)),
        )
        if function is not None
    }
    if not found:
        return {}
    try:
        values = {key: function(model) for key, function in found.items()}
        with torch.device("meta"):
            twin = construct(dict(record.node) | values, record.num_classes, record.in_shape)
    except ConfigError:  # another network than the family's, or one that its builder does not make from widths
        return {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    same = shapes == {name: tensor.shape for name, tensor in twin.state_dict().items()}
    followed = record.lineage.attributes.items()
    modules = dict(twin.named_modules())
    same = same and all(
        name in modules and all(_plainly(getattr(modules[name], key, None)) == value for key, value in values_.items())
        for name, values_ in followed
    )
    return values if same else {}


def _plainly(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _grouped(lineage: Lineage) -> list[dict[str, Any]]:
    """Kept indices, each once, with the axes that share them."""
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, axes in lineage.kept.items():
        for axis, indices in axes.items():
            sharing.setdefault(tuple(indices), []).append(f"{name} {axis}")
    return [{"axes": axes, "indices": ranges(indices)} for indices, axes in sharing.items()]


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Found:
    """A `pruned.yaml` that was read and checked as far as it goes without a network."""

    record: Record
    widths: Mapping[str, int]
    has_masks: bool


def read(folder: Path) -> Found:
    """Reads and checks `pruned.yaml` and the checksums of the files beside it.

    Raises:
        CheckpointError: missing, damaged, altered, or of another format.
    """
    path = folder / artifacts.PRUNED
    content = mapping(read_yaml(path), str(path))
    try:
        for name, expected in content["sha256"].items():
            if name not in (artifacts.WEIGHTS, artifacts.MASKS) or file_sha256(folder / name) != expected:
                raise CheckpointError(
                    f"{folder / name} is not the file that {path.name} was written with: its sha256 differs"
                )
        if artifacts.WEIGHTS not in content["sha256"]:
            raise CheckpointError(f"{path}: no sha256 of {artifacts.WEIGHTS}; the file was edited or cut")
        if content["checksum"] != _checksum(content):
            raise CheckpointError(f"{path} was edited after it was written: its checksum differs")
        record, widths = _described(content, path, extent_of(folder / artifacts.WEIGHTS))
        return Found(record, widths, bool(content["masks"]))
    except _DAMAGES as error:
        raise CheckpointError(f"{path} is not a {artifacts.PRUNED}: {shown(error)}") from error


# What values of other types and forms than `description` makes raise where they are used.
_DAMAGES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def _described(content: Mapping[str, Any], path: Path, extent: Extent) -> tuple[Record, dict[str, int]]:
    """The inverse of `description`: the record, and the widths of the layers.

    Args:
        extent: of the weights. Every kept index is a row or column of theirs, so there are no more indices than numbers.

    Raises:
        CheckpointError: of another format, or values that are never set.
        LookupError, TypeError, ValueError, AttributeError: not what `description` makes.
    """
    if content["format"] not in FORMATS:
        known = ", ".join(map(str, FORMATS))
        raise CheckpointError(f"{path}: format {shown(content['format'])} is none of {known}, which this version reads")
    lineage = _lineage(content, path, [extent.elements])
    if content["format"] == 1:
        lineage = replace(lineage, replaced=_of_stripes(content.get("stripes", {}), extent.elements))
    shape, classes = content["in_shape"], content["num_classes"]
    record = Record(
        node={"_target_": content["model"]["builder"], **content["model"]["arguments"]},
        lineage=lineage,
        num_classes=None if classes is None else require_classes(classes, str(path)),
        in_shape=None if shape is None else require_shape(shape, str(path)),
        dense_sha256=content["dense_sha256"],
        cfg={key: content[key] for key in ("cfg", "projection") if key in content},
    )
    return record, {str(name): int(width) for name, width in content["widths"].items()}


def _lineage(content: Mapping[str, Any], path: Path, left: list[int], depth: int = 0) -> Lineage:
    """The inverse of `_content_of`; raises as `_described` does.

    Args:
        left: how many indices there may still be; what is read is taken off.
    """
    if depth > DEPTH:
        raise CheckpointError(f"{path}: more than {DEPTH} replaced modules inside each other")
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for group in content["kept"]:
        indices = indices_of(group["indices"], left[0])
        left[0] -= len(indices)
        for place in group["axes"]:
            name, axis = str(place).rsplit(" ", 1)
            kept.setdefault(name, {})[int(axis)] = indices
    scales = {str(name): tuple(map(float, values)) for name, values in content["scales"].items()}
    replaced = {}
    for name, one in content["replaced"].items() if content.get("format") != 1 else ():
        if one["kind"] not in replacing.KINDS:
            raise CheckpointError(
                f"{path}: replaced.{name} is of a kind {shown(one['kind'])} that this version does not know"
                f"{nearest(str(one['kind']), replacing.KINDS)}"
            )
        inside = _lineage(one["inside"], path, left, depth + 1) if "inside" in one else Lineage()
        replaced[str(name)] = Replacement(one["kind"], _data(one["data"], f"{path}: replaced.{name}.data"), inside)
    return Lineage(kept, _attributes(content["attributes"], path), scales, replaced)


def _of_stripes(given: Mapping[str, Any], most: int) -> dict[str, Replacement]:
    """What format 1 says of convolutions that consist of stripes."""
    found = {}
    for name, numbers in given.items():
        indices = indices_of(numbers, most)
        most -= len(indices)
        found[str(name)] = Replacement("stripes", stripes.data_of(indices))
    return found


def _data(given: Any, where: str) -> dict[str, Any]:
    """The data of a replacement, if they are plain values and lists of them."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{where} is {shown(given)}; it is a mapping of plain values")
    for key, value in given.items():
        for item in value if isinstance(value, list) else [value]:
            if not (item is None or isinstance(item, (*PLAIN, str))):
                raise CheckpointError(
                    f"{where}.{key} holds {shown(item)}; only plain values and lists of them are read"
                )
    return {str(key): value for key, value in given.items()}


def _attributes(given: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Attribute edits, if all values are numbers or lists of numbers."""
    for module, values in given.items():
        for key, value in values.items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, PLAIN) for item in items):
                raise CheckpointError(
                    f"{path}: attributes.{module}.{key} is {shown(value)}; only numbers, true, false and lists of them are set"
                )
    return {str(module): dict(values) for module, values in given.items()}


def load(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """Builds the network of a folder that `write` filled, on the CPU, in evaluation mode.

    Args:
        model: the dense network, for builders that are not this package's; its weights do not matter.

    Raises:
        CheckpointError: files that are damaged or altered or do not fit, or a builder that is not this package's.
    """
    found = read(folder)
    small = _rebuilt(
        found.record, found.widths, folder / artifacts.PRUNED, model, extent_of(folder / artifacts.WEIGHTS)
    )
    load_weights(small, folder / artifacts.WEIGHTS)
    if found.has_masks:
        masking.apply(small, _fitting(read_masks(folder), small, folder))
    return small.eval()


def _rebuilt(
    record: Record, expected: Mapping[str, int], path: Path, model: nn.Module | None, extent: Extent
) -> nn.Module:
    """The small network of a record, with weights that do not matter yet."""
    dense = model
    if dense is None:
        dense = build(record.node, record.num_classes, record.in_shape, extent, str(path))
    try:
        small = rebuild.rebuild(dense, record.lineage)
    except (SurgeryError, RuntimeError, *_DAMAGES) as error:
        raise CheckpointError(f"{path} does not fit {type(dense).__name__}: {_line(error)}") from error
    widths = recorded_widths(small)
    for name, width in expected.items():
        if widths.get(name) != width:
            raise CheckpointError(
                f"{path}: layer {name!r} should have {width} outputs, the network has {widths.get(name)}"
            )
    if record.lineage and record.in_shape is not None:
        _try(small, record.in_shape, path)
    return small


@torch.no_grad()
def _try(model: nn.Module, in_shape: tuple[int, ...], path: Path) -> None:
    """Runs one image, as attributes and replaced layers of a file can contradict each other in any way."""
    parameter = next(model.parameters(), torch.empty(0))
    try:
        model.eval()(torch.zeros(1, *in_shape, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:
        raise CheckpointError(f"{path}: the network fails on an input of {in_shape}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_compressed(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, Record]:
    """Builds the network of a compressed file, on the CPU, in evaluation mode; see `load`.

    Raises:
        CheckpointError: a file that is damaged, altered or of another kind, that does not say which network it is of,
            or does not fit, or a builder that is not this package's.
    """
    content = container.open_compressed(path)
    extent = extent_of_state(content.state)
    record, widths = _network(content.network, path, extent)
    small = _rebuilt(record, widths, path, model, extent)
    fit_weights(small, content.state, str(path))
    return small.eval(), record


def read_compressed(path: Path) -> Record:
    """What a compressed file says of its network; raises as `load_compressed` does."""
    content = container.open_compressed(path)
    return _network(content.network, path, extent_of_state(content.state))[0]


def _network(network: Any, path: Path, extent: Extent) -> tuple[Record, dict[str, int]]:
    if network is None:
        raise CheckpointError(f"{path} holds tensors but does not say of which network; load it as weights")
    try:
        return _described(network, path, extent)
    except _DAMAGES as error:
        raise CheckpointError(f"{path}: what it says of the network is damaged: {shown(error)}") from error


def read_masks(folder: Path) -> dict[str, Tensor]:
    """The masks of a folder by parameter name, True = keep; empty where nothing is masked."""
    path = folder / artifacts.MASKS
    return {name: mask.bool() for name, mask in read_state_dict(path).items()} if path.is_file() else {}


def _fitting(masks: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        try:
            mask.expand(parameters[name].shape)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder / artifacts.MASKS}: the mask of {name!r} {list(mask.shape)} does not fit the network"
            ) from error
    return masks


def read_cfg(path: Path) -> dict[str, Any]:
    """`cfg`, and `projection` where it is given, of a `pruned.yaml` or of any YAML file with a key `cfg`.

    Raises:
        ConfigError: no such file, or no cfg in it.
        CheckpointError: it names code.
    """
    content = read_yaml(path, ConfigError)
    if not isinstance(content, dict) or not isinstance(content.get("cfg"), list):
        raise ConfigError(
            f"{path} has no `cfg:` list; a {artifacts.PRUNED} has one where its model is built from widths (vgg, resnet)"
        )
    found = {key: content[key] for key in ("cfg", "projection") if content.get(key) is not None}
    for key, value in found.items():
        require_plain(value, f"{path}: {key}")
    return found
