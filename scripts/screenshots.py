"""Take the pictures of docs/ui/ and docs/view/: each tab of `mmedit ui` and the page of `mmedit report view`.

    python scripts/screenshots.py              # again, as small WebP files; needs Chromium and the extra ui

Each is taken in a wide and in a narrow window. What stands on the pages is made here: an edit, a changed picture, a
thing that is learned, and an evaluation of 40 edits.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mmedit_cli.storage import write_atomic

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser, PageOfTabs  # noqa: E402

WINDOWS = {
    "wide": (1200, 2 / 3),
    "narrow": (400, 0.8),
}  # pixels, and how they are scaled
_LEAST = 500  # pixels of a window
_HIGHEST = 1650
_OF_MANY = 900  # where the same goes on below
_QUALITY = 28
_PATIENCE = 600.0  # seconds for what is slow
_MMEDIT = (sys.executable, "-m", "mmedit_cli")
_EVALUATION = ("eval", "--limit", "40", "--sequential", "20", "--records", "records")
_PORT = re.compile(r"http://[\w.:]+/")
_LONG = "document.documentElement.scrollHeight"


def taken(page: Browser, file: Path, highest: int = _HIGHEST) -> None:
    """Look at the page in each window, as high as it is or the highest, and write what is seen beside `file`."""
    page.call("Emulation.setScrollbarsHidden", hidden=True)
    for name, (width, scale) in WINDOWS.items():
        page.resize(width, _LEAST, scale)
        time.sleep(2)
        height = min(int(page.do(_LONG)), highest)
        page.resize(width, max(height, _LEAST), scale)
        time.sleep(1)
        with tempfile.TemporaryDirectory() as folder:
            drawing = Path(folder) / "page.png"
            page.draw(drawing)
            image = Image.open(drawing).convert("RGB")
        small = io.BytesIO()
        image.save(small, "WEBP", quality=_QUALITY, method=6)
        target = file.with_name(f"{file.name}-{name}.webp")
        write_atomic(target, small.getvalue())
        print(target, f"{len(small.getvalue()):,} bytes")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the page within the block; yield its address."""
    said = folder / "said.txt"
    with said.open("w") as out:
        words = [*_MMEDIT, "ui", "--port", "0", "--records", "records"]
        program = subprocess.Popen(words, cwd=folder, stdout=out)
    try:
        while not (found := _PORT.search(said.read_text())):
            assert program.poll() is None, "the page has ended"
            time.sleep(0.2)
        yield found[0]
    finally:
        program.terminate()
        program.wait(60)


def ask(page: PageOfTabs) -> None:
    """Teach an edit, and ask."""
    page.tab("Ask and teach")
    page.choose("1f9ad.png")
    page.write("New answer", "a sea lion")
    page.click("Teach")
    page.read("What the edit did", _PATIENCE)
    page.click("Ask")
    page.read("Answer", _PATIENCE)


def draw(page: PageOfTabs) -> None:
    """Learn a goose, and draw it."""
    page.tab("Draw")
    page.click("Teach it a thing of your own")
    page.click("Take four drawings of a goose")
    page.wait_until(lambda: page.files() == 4)
    page.click("Learn")
    page.read("Learned", _PATIENCE)
    page.wait_until(lambda: page.pictures() == 1, _PATIENCE)


def change(page: PageOfTabs) -> None:
    """Change a picture."""
    page.tab("Change a picture")
    page.choose("1f9ad.png")
    page.click("Change")
    page.read("Expressive instruction of the model", _PATIENCE)
    page.wait_until(lambda: page.pictures() == 2)


def runs(page: PageOfTabs) -> None:
    """Look at the run."""
    page.tab("Runs")
    page.wait_for("document.querySelectorAll('.prose table, table').length > 2")


TABS: dict[str, Callable[[PageOfTabs], None]] = {
    "ask": ask,
    "draw": draw,
    "change": change,
    "runs": runs,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    pages = args.out.resolve()
    for name in ("ui", "view"):
        (pages / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*_MMEDIT, *_EVALUATION], cwd=folder, check=True)
        shown = [*_MMEDIT, "report", "view", "latest", "--out", "page.html"]
        subprocess.run(shown, cwd=folder, check=True)
        view = folder / "page.html"
        with Browser(view.as_uri()) as page:
            page.do("document.querySelector('.card').scrollIntoView()")
            taken(page, pages / "view" / "page", _OF_MANY)
        with served(folder) as address, PageOfTabs(address) as page:
            for tab, show in TABS.items():
                page.resize(1200, 900)
                show(page)
                highest = _OF_MANY if tab == "runs" else _HIGHEST
                taken(page, pages / "ui" / tab, highest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
