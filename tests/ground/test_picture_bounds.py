"""Pictures that would fill the memory are refused by their header, and large ones are composed in strips."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.pictures import Picture, check_picture, load_picture, picture_digest


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (1, 201), (10_000, 5_001)])
def test_sizes_that_would_fill_the_memory_are_refused(tmp_path, size):
    Image.new("L", size).save(tmp_path / "x.png", compress_level=1)
    with pytest.raises(
        DataError,
        match=rf"x.png: not a readable image \({size[0]} x {size[1]} pixels: ",
    ):
        load_picture(Picture(tmp_path / "x.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_strips_make_the_same_picture(tmp_path, mode, monkeypatch):
    monkeypatch.setattr("mmedit_cli.pictures._STRIP", 700)
    noise = np.random.default_rng(0).integers(0, 256, (53, 71, 4), dtype=np.uint8)
    image = (
        Image.fromarray(noise, "RGBA").convert(mode)
        if mode != "PA"
        else Image.fromarray(noise, "RGBA").quantize()
    )
    image.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as again:
        above = again.convert("RGBA")
    whole = Image.alpha_composite(
        Image.new("RGBA", above.size, "#204060"), above
    ).convert("RGB")
    found = load_picture(Picture(tmp_path / "x.png", "#204060"))
    assert np.array_equal(np.asarray(found), np.asarray(whole))


def test_files_too_large_to_be_pictures_are_neither_opened_nor_hashed(tmp_path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for reader in (
        check_picture,
        picture_digest,
        lambda path: load_picture(Picture(path)),
    ):
        with pytest.raises(
            DataError, match=r"a\.png: not a readable image \(larger than 256 MiB\)"
        ):
            reader(path)


def test_the_digest_of_a_picture_is_that_of_its_file(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2)).save(path)
    assert picture_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"gone\.png: no such image"):
        picture_digest(tmp_path / "gone.png")
