"""What else lies in a folder of images: pipes, sockets, links to themselves, folders named like images; and sizes too large."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from prune_cli.data.arrays import check_memory
from prune_cli.data.fake import fake
from prune_cli.data.files import scan
from prune_cli.data.splits import evaluated_at_once, held_out_count
from prune_cli.errors import ConfigError, DataError
from tests.data.test_folders import make


def pipe(place: Path) -> None:
    os.mkfifo(place / "x.png")


def endpoint(place: Path) -> None:
    here = Path.cwd()
    os.chdir(place)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("x.png")
    finally:
        os.chdir(here)


def device(place: Path) -> None:
    (place / "x.png").symlink_to("/dev/zero")


def loop(place: Path) -> None:
    (place / "loop").symlink_to(place)


def loop_above(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep/up").symlink_to(place.parent)


def itself(place: Path) -> None:
    (place / "x.png").symlink_to(place / "x.png")


def nowhere(place: Path) -> None:
    (place / "x.png").symlink_to("gone.png")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (pipe, "x.png is a pipe, a socket or a device, not an image"),
        (endpoint, "x.png is a pipe, a socket or a device, not an image"),
        (device, "x.png is a pipe, a socket or a device, not an image"),
        (loop, "loop is a link to a folder that it is in itself"),
        (loop_above, "up is a link to a folder that it is in itself"),
        (itself, "x.png: Too many levels of symbolic links"),
        (nowhere, "x.png: No such file"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, plant, message):
    root = make(tmp_path / "images", {"": 4})
    plant(root / "cat")
    with pytest.raises(DataError, match=message.replace(".", r"\.")) as caught:
        scan(root)
    assert len(str(caught.value)) < 400


def test_links_to_other_folders_and_a_folder_named_like_an_image_are_followed(tmp_path, caplog):
    root = make(tmp_path / "images", {"": 4})
    other = make(tmp_path / "more", {"": 2})
    (root / "cat/more").symlink_to(other / "cat")
    (root / "dog/x.png").symlink_to(other / "dog")
    with caplog.at_level(logging.WARNING):
        assert len(scan(root)) == 2 * (4 + 2)
    assert "x.png is a folder; the images in it are taken" in caplog.text


@pytest.mark.parametrize("amount", [1.0, 5000.0, -1, -0.5, 1.5])
def test_a_number_with_a_point_is_a_fraction(amount):
    with pytest.raises(ConfigError, match="a fraction in"):
        held_out_count(amount, 100, "dataset.val")
    assert held_out_count(1, 100, "dataset.val") == 1 and held_out_count(0.5, 100, "dataset.val") == 50


def test_images_that_no_memory_holds_are_refused_before_they_are_made():
    with pytest.raises(ConfigError, match=r"need .* GB of memory, and this machine has"):
        fake(shape=(3, 10**6, 10**6))
    check_memory("small", 10, (3, 8, 8))


def test_an_evaluation_of_a_trial_is_of_a_few_images():
    assert evaluated_at_once(500, (3, 224, 224), 1) == 4
    assert evaluated_at_once(500, (1, 8, 8), 1) == 500
    assert evaluated_at_once(500, (3, 2000, 2000), 1) == 1
    assert evaluated_at_once(500, (3, 224, 224), 2) == evaluated_at_once(500, (3, 224, 224), None) == 500
