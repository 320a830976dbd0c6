"""Pictures that a program holds are asked about like files of the same content."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from conftest import SHAPES
from PIL import Image

from mmedit_cli import Query
from mmedit_cli.errors import DataError
from mmedit_cli.pictures import Picture, load_picture

STAR = SHAPES / "solid" / "red-star.png"


def seen(image: object) -> np.ndarray:
    """What a model sees of a picture."""
    query = Query("What is this?", image=image)
    assert isinstance(query.image, Path)
    return np.asarray(load_picture(Picture(query.image, query.background)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "LA", "CMYK", "F"])
def test_a_picture_of_pil_is_seen_as_its_file_is(tmp_path, mode):
    with Image.open(STAR) as opened:
        picture = opened.convert("RGB").convert(mode)
    file = tmp_path / "star.tif"
    if mode in ("RGBA", "LA"):
        picture.putalpha(0)
    picture.save(file)
    assert np.array_equal(seen(picture), seen(file))


def test_a_photo_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # lying on its side
    photo = tmp_path / "photo.jpg"
    left = np.zeros((8, 16, 3), np.uint8)
    left[:, :8] = 255
    Image.fromarray(left).save(photo, exif=exif)
    with Image.open(photo) as opened:
        assert np.array_equal(seen(opened), seen(photo))
    assert seen(photo).shape == (16, 8, 3)


def test_arrays_and_texts_are_taken():
    colours = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(seen(colours), colours)
    text = base64.b64encode(STAR.read_bytes()).decode()
    for head in ("data:image/png;base64,", "data:IMAGE/x-icon;base64,"):
        assert np.array_equal(seen(head + text), seen(STAR))
    grey = colours[:, :, 0]
    assert np.array_equal(seen(grey), np.stack([grey] * 3, -1))
    clear = np.zeros((4, 5, 4), np.uint8)
    assert (seen(clear) == 255).all()
    assert Query("?", image=str(STAR)) == Query("?", image=STAR)
    assert Query("?", image=colours) == Query("?", image=colours.copy())
    assert Query("?", image=colours) != Query("?", image=colours + 1)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("ftp://example.com/cat.png", "cat.png: not an address of the web"),
        ("data:image/png;base64,####", "data:image/png;base64,####...: not base64 ("),
        ("data:text/plain;base64,AAAA", "AAAA...: not a picture"),
        (np.zeros((4, 5, 3)), "not a picture: an array (4, 5, 3) of float64"),
        (np.zeros((3, 4, 5), np.uint8), "not a picture: an array (3, 4, 5) of uint8"),
        (np.zeros((0, 4), np.uint8), "not a picture: an array (0, 4) of uint8"),
        (3, "not a picture: int"),
    ],
)
def test_what_is_no_picture_is_named(image, problem):
    with pytest.raises(DataError) as caught:
        Query("What is this?", image=image)
    assert problem in str(caught.value)


def test_a_picture_that_is_cut_off_is_named(tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(STAR.read_bytes()[:-60])
    with Image.open(cut) as opened, pytest.raises(DataError, match="cannot be kept"):
        Query("What is this?", image=opened)


def test_the_files_go_with_the_process():
    code = (
        "import numpy\n"
        "from mmedit_cli import Query\n"
        "print(Query('?', image=numpy.zeros((4, 4), numpy.uint8)).image)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    assert (path.suffix, path.exists(), path.parent.exists()) == (".png", False, False)


@pytest.fixture
def site(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """The address of a site with a picture and a text, and what was asked of it."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            asked.append(self.path)

    (tmp_path / "star.png").write_bytes(STAR.read_bytes())
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "program.png", "EPS")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_picture_of_the_web_is_fetched_once(site):
    address, asked = site
    assert np.array_equal(seen(f"{address}/star.png?large=1"), seen(STAR))
    assert np.array_equal(seen(f"{address}/star.png?large=1"), seen(STAR))
    assert asked == ["/star.png?large=1"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("text.png", "text.png: not a picture"),
        ("program.png", "program.png: not a picture"),
        ("none.png", "cannot be fetched"),
    ],
)
def test_what_the_web_does_not_have_is_one_line(site, cli, path, problem):
    address, _ = site
    address = address.replace("//", "//me:secret@")
    code, out, err = cli("ask", "What is this?", "--image", f"{address}/{path}")
    assert (code, out) == (2, "")
    assert problem in err
    assert "secret" not in err
    assert "Traceback" not in err


def test_a_picture_of_the_web_is_asked_about(site, cli):
    address, _ = site
    question = ("ask", "What is this?", "--model", "tiny-llava", "--image")
    code, out, _ = cli(*question, f"{address}/star.png")
    assert code == 0
    assert out == cli(*question, str(STAR))[1]
