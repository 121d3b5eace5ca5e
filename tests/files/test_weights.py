from __future__ import annotations

import argparse
import errno
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prune_cli.errors import CheckpointError, StorageError
from prune_cli.files.weights import load_weights, read_state_dict, write_weights
from prune_cli.hashing import file_sha256
from prune_cli.tensors import state_sha256


class Net(nn.Module):
    def __init__(self, head: str = "linear", classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.add_module(head, nn.Linear(4, classes))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.decode = nn.Linear(3, 5)
        self.decode.weight = self.embed.weight


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("nested", [None, "state_dict", "model", "model_state_dict", "net", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_training_scripts_write(tmp_path: Path, nested: str | None, prefix: str, legacy: bool) -> None:
    state = Net().state_dict()
    content: object = {prefix + key: tensor for key, tensor in state.items()}
    if nested is not None:
        options = argparse.Namespace(lr=0.1)
        content = {"epoch": 3, "acc": 91.5, nested: content, "optimizer": {"state": {}}, "args": options}
    path = tmp_path / "weights.th"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert same(read_state_dict(path), state)
    model = Net()
    load_weights(model, path)
    assert same(model.state_dict(), state)


def test_format_is_seen_from_the_content(tmp_path: Path) -> None:
    state = Net().state_dict()
    write_weights(state, tmp_path / "weights.pth")
    assert same(read_state_dict(tmp_path / "weights.pth"), state)


def test_tensors_come_back_contiguous_and_tied(tmp_path: Path) -> None:
    model = Net().to(memory_format=torch.channels_last)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state = read_state_dict(tmp_path / "a.pt")
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert same(state, model.state_dict())
    other = Net().to(memory_format=torch.channels_last)
    load_weights(other, tmp_path / "a.pt")
    assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert same(other.state_dict(), state)
    torch.save(Tied().state_dict(), tmp_path / "b.pt")
    tied = read_state_dict(tmp_path / "b.pt")
    assert tied["embed.weight"].data_ptr() == tied["decode.weight"].data_ptr()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "history": [1, 2]}, "hold no state_dict of tensors.*keys epoch, history"),
        ([1, 2], "hold no state_dict of tensors.*list"),
        (torch.zeros(3), "hold no state_dict of tensors.*Tensor"),
        ({"state_dict": {}}, "hold no state_dict of tensors"),
    ],
)
def test_refuses_files_without_weights(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "a.pt")


def test_refuses_torchscript_and_says_so(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a TorchScript archive, which is never opened"):
        read_state_dict(tmp_path / "a.pt")


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(CheckpointError, match=r"can't read .*(it is no file|No such file)") as caught:
            read_state_dict(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_malicious_pickle_is_never_executed(tmp_path: Path, legacy: bool, nested: bool) -> None:
    proof = tmp_path / "executed"
    content: object = {"state_dict": Net().state_dict(), "args": Evil(proof)} if nested else Evil(proof)
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="hold Python objects") as caught:
        read_state_dict(tmp_path / "a.pt")
    assert "mkdir" in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "b.pt")
    assert not proof.exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one network in the three formats."""
    folder = tmp_path_factory.mktemp("formats")
    state = Net().state_dict()
    torch.save(state, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    write_weights(state, folder / "safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, files: dict[str, bytes], kind: str, part: float) -> None:
    content = files[kind]
    path = tmp_path / "cut"
    path.write_bytes(content[: min(int(part * len(content)), len(content) - 1)])
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_an_altered_value_of_a_zip_is_named(tmp_path: Path) -> None:
    state = Net().state_dict()
    torch.save(state, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(state["conv1.weight"].numpy().tobytes()) + 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of a/data/0 does not match"):
        read_state_dict(tmp_path / "a.pt")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_altered_byte_of_a_zip_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    content = bytearray(files["zip"])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "altered"
    path.write_bytes(content)
    expected = tmp_path_factory.getbasetemp() / "whole"
    expected.write_bytes(files["zip"])
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:  # a date or a padding byte
        assert same(state, read_state_dict(expected))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["legacy", "safetensors"]), st.data())
def test_an_altered_byte_elsewhere_is_one_line_or_readable(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], kind: str, data: st.DataObject
) -> None:
    """These formats have no checksum, so an altered value reads; but nothing else than our error escapes."""
    content = bytearray(files[kind])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "altered"
    path.write_bytes(content)
    try:
        load_weights(Net(), path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    whole = tmp_path_factory.getbasetemp() / "whole"
    whole.write_bytes(files[kind])
    assert file_sha256(path) != file_sha256(whole)


# ---------------------------------------------------------------------------------------------------- writing


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    model = Net()
    write_weights(model, tmp_path / "a")
    state = model.state_dict()
    shuffled = {key: state[key].clone() for key in reversed(state)}
    shuffled["conv1.weight"] = shuffled["conv1.weight"].to(memory_format=torch.channels_last)
    write_weights(shuffled, tmp_path / "b")
    write_weights(model, tmp_path / "b")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    length = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0]
    assert b"__metadata__" not in (tmp_path / "a").read_bytes()[8 : 8 + length]
    other = Net()
    load_weights(other, tmp_path / "b")
    assert same(other.state_dict(), state)


def test_ties_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = Tied()
    write_weights(model, tmp_path / "a")
    assert set(read_state_dict(tmp_path / "a")) == {"decode.weight", "decode.bias"}
    other = Tied()
    load_weights(other, tmp_path / "a")
    assert same(other.state_dict(), model.state_dict())
    assert other.embed.weight is other.decode.weight
    assert state_sha256(read_state_dict(tmp_path / "a")) == state_sha256(model.state_dict())


def test_views_of_one_memory_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base[:6], "b": base[3:9], "c": base.view(3, 4).t(), "d": base[:0]}
    write_weights(state, tmp_path / "a")
    assert same(read_state_dict(tmp_path / "a"), state)


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.zeros(0, 2), torch.tensor([True, False]), torch.ones(3, dtype=torch.bfloat16)],
)
def test_all_kinds_of_tensors(tmp_path: Path, tensor: Tensor) -> None:
    write_weights({"x": tensor}, tmp_path / "a")
    back = read_state_dict(tmp_path / "a")["x"]
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    assert state_sha256({"x": back}) == state_sha256({"x": tensor})


def test_failures_leave_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_weights(Net(), path)
    before = file_sha256(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_weights(Net(), path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert file_sha256(path) == before


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_weights(Net(), tmp_path / "file" / "weights")
