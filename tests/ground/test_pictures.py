"""Pictures from disk: which formats are opened, and that grey ones of 16 and 32 bits are not white."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from PIL import Image

from mmedit_cli.errors import DataError
from mmedit_cli.pictures import (
    Picture,
    check_picture,
    load_picture,
    picture_size,
    upright_rgb,
)

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
showpage
"""
STEPS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "reader",
    [
        check_picture,
        lambda path: load_picture(Picture(path)),
        lambda path: picture_size(Picture(path)),
    ],
)
def test_what_is_eps_inside_starts_no_other_program(tmp_path, monkeypatch, reader):
    def started(*words, **options):
        raise AssertionError(f"started {words}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    path = tmp_path / "cat.png"
    path.write_bytes(EPS)
    with pytest.raises(DataError, match=r"cat\.png: not a readable image"):
        reader(path)


@pytest.mark.parametrize("format", ["FITS", "PCX", "SGI", "TGA", "ICO", "PDF"])
def test_formats_hardly_anyone_has_are_refused(tmp_path, format):
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(
        path, format
    ) if format != "FITS" else path.write_bytes(b"SIMPLE  =" + b" " * 71)
    with pytest.raises(DataError, match="not a readable image"):
        load_picture(Picture(path))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_of_photos_are_opened(tmp_path, format):
    path = tmp_path / "cat"
    Image.new("RGB", (8, 8), "red").save(path, format)
    assert (
        np.abs(np.asarray(load_picture(Picture(path)), dtype=int) - (255, 0, 0)).max()
        < 10
    )


@pytest.mark.parametrize(
    ("values", "format"),
    [
        (STEPS.astype(np.uint16) * 257, "PNG"),
        (STEPS.astype(np.uint16) * 257, "TIFF"),
        (STEPS.astype(np.int32) * 257, "TIFF"),
        (STEPS.astype(np.int32), "TIFF"),
        ((STEPS * ((2**31 - 1) / 255)).astype(np.int32), "TIFF"),
        ((STEPS / np.float32(255)).astype(np.float32), "TIFF"),
        (STEPS.astype(np.float32), "TIFF"),
        (STEPS.astype(np.float32) * 257, "TIFF"),
    ],
)
def test_grey_pictures_of_16_and_32_bits_are_scaled(tmp_path, values, format):
    path = tmp_path / "grey"
    Image.fromarray(values).save(path, format)
    found = np.asarray(load_picture(Picture(path)), dtype=int)
    assert np.abs(found - STEPS[..., None].astype(int)).max() <= 1
    with path.open("rb") as file:
        assert np.array_equal(np.asarray(upright_rgb(file, "grey")), found)


def test_whole_numbers_without_a_sign_are_read_as_such(tmp_path):
    path = tmp_path / "grey.tif"
    values = (STEPS.astype(np.uint64) * ((2**32 - 1) // 255)).astype(np.uint32)
    Image.fromarray(values.view(np.int32)).save(path)
    signed, unsigned = (
        b"\x53\x01\x03\x00\x01\x00\x00\x00" + kind + b"\x00\x00\x00"
        for kind in (b"\x02", b"\x01")
    )
    assert path.read_bytes().count(signed) == 1
    path.write_bytes(path.read_bytes().replace(signed, unsigned))
    found = np.asarray(load_picture(Picture(path)), dtype=int)
    assert np.abs(found - STEPS[..., None].astype(int)).max() <= 1


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    path = tmp_path / "dark.png"
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(path)
    assert np.asarray(load_picture(Picture(path))).max() == 1


def test_a_turned_grey_picture_is_upright(tmp_path):
    path = tmp_path / "turned.tif"
    Image.fromarray(STEPS.astype(np.uint16) * 257).save(
        path, tiffinfo={274: 3}
    )  # upside down
    found = np.asarray(load_picture(Picture(path)), dtype=int)[..., 0]
    assert np.abs(found - STEPS[::-1, ::-1]).max() <= 1


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "nan.tif"
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    with pytest.raises(
        DataError,
        match=r"nan\.tif: not a readable image \(it has values that are not finite\)",
    ):
        load_picture(Picture(path))


def test_a_picture_that_is_one_line_is_refused(tmp_path):
    path = tmp_path / "line.png"
    Image.new("1", (1, 70_000)).save(path)
    with pytest.raises(
        DataError, match="1 x 70000 pixels: a side is longer than 65535"
    ):
        check_picture(path)
