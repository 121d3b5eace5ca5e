"""Compressed files: what comes back, how small they are, and that damaged or hostile ones are refused in one line."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from prune_cli.compression import codec, kmeans
from prune_cli.compression.container import CONV, LINEAR, MAGIC, Bits, compress, read_compressed
from prune_cli.errors import CheckpointError, ConfigError


def written(state, masks, path, conv=CONV, linear=LINEAR):
    """Writes the file with one width for tensors of three or more axes and one for the others; returns the sizes."""
    content, sizes = compress(state, masks, {name: conv if state[name].dim() > 2 else linear for name in masks})
    path.write_bytes(content)
    return sizes


@pytest.fixture
def example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 10))
    masks = {
        name: torch.rand(model.get_parameter(name).shape) < density
        for name, density in (("0.weight", 0.4), ("3.weight", 0.05))
    }
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return model.state_dict(), masks


def test_what_is_written_comes_back(tmp_path, example):
    state, masks = example
    sizes = written(state, masks, tmp_path / "small.prune")
    back = read_compressed(tmp_path / "small.prune")
    assert set(back) == set(state) and set(sizes) == set(masks)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        if name not in masks:
            assert torch.equal(back[name], tensor)
        else:
            assert torch.equal(back[name] != 0, masks[name])
            assert len(torch.unique(back[name])) <= (256 if tensor.dim() > 2 else 32)
            assert float((back[name] - tensor).abs().max()) < 0.02
    size = sizes["3.weight"]  # tables may outweigh what Huffman saves of a tensor this small
    assert size.entropy < size.shared < size.pruned < size.dense and size.entropy < size.huffman < size.pruned
    assert (tmp_path / "small.prune").stat().st_size < sum(t.numel() * t.element_size() for t in state.values()) / 3


def test_shared_weights_come_back_bit_by_bit_and_twice_is_the_same_file(tmp_path, example):
    state, masks = example
    written(state, masks, tmp_path / "a")
    once = read_compressed(tmp_path / "a")
    written(once, masks, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, tensor in read_compressed(tmp_path / "b").items():
        assert torch.equal(tensor, once[name])


def test_all_types_and_empty_tensors(tmp_path):
    state = {str(t): torch.tensor([0, 1, 1]).to(t) for t in (torch.int64, torch.bool, torch.uint8, torch.float16)}
    state |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3), "half": torch.randn(40, 8).bfloat16()}
    written(state, {"half": torch.rand(40, 1) < 0.5, "empty": torch.ones(1, 4).bool()}, tmp_path / "x")
    back = read_compressed(tmp_path / "x")
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert name == "half" or torch.equal(back[name], tensor)


def rewritten(content: bytes, change) -> bytes:
    """A file with a changed header and a right checksum: what a hostile author would make."""
    start = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    header = json.loads(content[start : start + length])
    change(header)
    text = json.dumps(header).encode()
    body = MAGIC + len(text).to_bytes(4, "little") + text + content[start + length : -32]
    return body + hashlib.sha256(body).digest()


def first_coded(header):
    return next(entry for entry in header["tensors"] if entry["coding"] == "shared")


CHANGES = {
    "longer section": lambda h: first_coded(h)["sections"].__setitem__(3, 10**9),
    "negative section": lambda h: first_coded(h)["sections"].__setitem__(0, -4),
    "more entries": lambda h: first_coded(h).__setitem__("entries", 10**11),
    "fewer entries": lambda h: first_coded(h).__setitem__("entries", 3),
    "entries as text": lambda h: first_coded(h).__setitem__("entries", "3"),
    "huge shape": lambda h: first_coded(h).__setitem__("shape", [10**9, 10**9]),
    "large shape": lambda h: first_coded(h).__setitem__("shape", [10**6]),
    "negative shape": lambda h: first_coded(h).__setitem__("shape", [-1, -432]),
    "shape of bools": lambda h: first_coded(h).__setitem__("shape", [True]),
    "gap bits": lambda h: first_coded(h).__setitem__("gap_bits", 40),
    "other type": lambda h: first_coded(h).__setitem__("dtype", "float64"),
    "object type": lambda h: first_coded(h).__setitem__("dtype", "object"),
    "integer type": lambda h: first_coded(h).__setitem__("dtype", "int32"),
    "unknown coding": lambda h: first_coded(h).__setitem__("coding", "pickle"),
    "raw instead": lambda h: first_coded(h).__setitem__("coding", "raw"),
    "sections missing": lambda h: first_coded(h).pop("sections"),
    "name": lambda h: first_coded(h).__setitem__("name", ["x"]),
    "twice": lambda h: [entry.__setitem__("name", "x") for entry in h["tensors"]],
    "no tensors": lambda h: h.__setitem__("tensors", []),
    "format": lambda h: h.__setitem__("format", 2),
    "not a mapping": lambda h: h.__setitem__("tensors", 5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_headers_that_lie_are_refused(tmp_path, example, change):
    written(*example, tmp_path / "x")
    (tmp_path / "y").write_bytes(rewritten((tmp_path / "x").read_bytes(), change))
    with pytest.raises(CheckpointError) as caught:
        read_compressed(tmp_path / "y")
    assert "\n" not in str(caught.value) and "y: " in str(caught.value)


def test_random_damage_behind_a_right_checksum_never_escapes(tmp_path, example):
    written(*example, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        body = bytearray(content[:-32])
        for _ in range(int(generator.integers(1, 4))):
            body[generator.integers(len(body))] = generator.integers(256)
        (tmp_path / "y").write_bytes(bytes(body) + hashlib.sha256(body).digest())
        try:
            state = read_compressed(tmp_path / "y", most=10**6)
            assert sum(t.numel() * t.element_size() for t in state.values()) <= 10**6
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_every_cut_and_flip_is_noticed(tmp_path, example):
    written(*example, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    for damaged in [content[:-1], content[:50], content[:4], b"", content + b"x", b"PK" + content[2:]]:
        (tmp_path / "y").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checksum|begin with"):
            read_compressed(tmp_path / "y")
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "y").write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError):
            read_compressed(tmp_path / "y")


def test_a_file_may_not_take_more_than_allowed(tmp_path, example):
    written(*example, tmp_path / "x")
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_compressed(tmp_path / "x", most=1000)


def test_user_errors(tmp_path, example):
    with pytest.raises(CheckpointError, match="can't read"):
        read_compressed(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="from 1 to 8"):
        written(*example, tmp_path / "x", conv=Bits(9, 8))


def test_a_large_tensor_in_reasonable_time():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1_000_000, generator=generator)
    keep = torch.rand(1_000_000, generator=generator) < 0.1
    shared = kmeans.cluster(weight, keep, 255).weight
    assert torch.equal(codec.decode(codec.encode(shared)), shared)
