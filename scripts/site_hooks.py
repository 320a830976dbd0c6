"""What `make docs` adds to the pages below docs/: the reference, and the files of the repository that pages link to.

The reference of the commands is what `--help` prints, that of the library is made of the docstrings. Pages are
also read in the repository, so they link to files outside docs/; these become pages below repository/.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mmedit_cli
from mmedit_cli.app import app

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import TUTORIALS, written

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OTHERS = "repository"  # below it the site has files from outside docs/
ALWAYS = (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "hparams/README.md")
SHOWN_AS_CODE = {".yaml": "yaml", ".py": "python", ".sh": "bash", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")

FOR_PLUGINS = (
    "mmedit_cli.knowledge.methods.base.Editor",
    "mmedit_cli.knowledge.models.base.VisionLanguageModel",
    "mmedit_cli.knowledge.data.base.Dataset",
    "mmedit_cli.drawing.methods.base.Personalizer",
    "mmedit_cli.picture_editing.methods.base.ImageEditor",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, the tutorials as notebooks, and what pages link to."""
    files.append(_written(config, "reference/commands.md", _commands()))
    files.append(_written(config, "reference/python.md", _library()))
    for page in sorted(TUTORIALS.glob("*.md")):
        files.append(_written(config, f"notebooks/{page.stem}.ipynb", written(page)))
    for path in sorted(_linked()):
        files.append(_from_repository(config, path))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turn links to files of the repository into links to their pages."""
    place = _place_in_repository(page.file.src_uri)
    if place is None:
        return markdown
    if place.parent == TUTORIALS:
        link = f"[As a notebook to run](../notebooks/{place.stem}.ipynb){{: download}}"
        title, _, text = markdown.partition("\n")
        markdown = f"{title}\n\n{link}: save it into a checkout.\n{text}"
    here = Path(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        target = _target(place, match[1])
        if target is None:
            return match[1]
        return Path(os.path.relpath(_uri(target), here)).as_posix()

    return LINK.sub(turned, markdown)


def _written(config: MkDocsConfig, uri: str, text: str) -> File:
    return File.generated(config, uri, content=text)


def _from_repository(config: MkDocsConfig, path: Path) -> File:
    language = SHOWN_AS_CODE.get(path.suffix)
    if language is None:
        return File.generated(config, _uri(path), abs_src_path=str(path))
    name = path.relative_to(ROOT).as_posix()
    code = path.read_text(encoding="utf-8")
    return _written(config, _uri(path), f"# {name}\n\n```{language}\n{code}```\n")


def _uri(path: Path) -> str:
    """Return where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    ending = ".md" if path.suffix in SHOWN_AS_CODE else ""
    return f"{OTHERS}/{path.relative_to(ROOT).as_posix()}{ending}"


def _place_in_repository(uri: str) -> Path | None:
    """Return the file that a page was made of, or None if it was made of none."""
    folder, _, rest = uri.partition("/")
    path = ROOT / rest if folder == OTHERS else DOCS / uri
    return path if path.is_file() else None


def _target(place: Path, link: str) -> Path | None:
    """Return the file that a link in a file leads to; of a folder its README. None: there is no such file."""
    path = Path(os.path.normpath(place.parent / link))
    if path.is_dir():
        path = path / "README.md"
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _links(place: Path) -> Iterator[Path]:
    text = place.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        target = _target(place, link)
        if target is not None:
            yield target


def _linked() -> set[Path]:
    """Return the files outside docs/ that pages link to, those that these link to, and so on."""
    found = set(ALWAYS)
    waiting = [*DOCS.rglob("*.md"), *ALWAYS]
    while waiting:
        place = waiting.pop()
        new = {
            target
            for target in _links(place)
            if not target.is_relative_to(DOCS) and target not in found
        }
        found |= new
        waiting += [target for target in new if target.suffix == ".md"]
    return found


def _commands() -> str:
    """Return the page of all commands: what `--help` prints of each."""
    root = typer.main.get_command(app)
    parts = ["# Commands\n\nWhat `--help` says of each.\n"]
    for words in ((), *_names(root)):
        name = " ".join(("mmedit", *words))
        parts.append(f"## {name}\n\n```text\n{_help(words)}\n```\n")
    return "\n".join(parts)


def _names(group: object, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in sorted(getattr(group, "commands", {}).items()):
        words = (*before, name)
        yield words
        yield from _names(command, words)


def _help(words: tuple[str, ...]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        app(args=[*words, "--help"], prog_name="mmedit")
    return printed.getvalue().strip()


def _library() -> str:
    """Return the page of the library, which mkdocstrings fills."""
    public = [name for name in mmedit_cli.__all__ if not name.startswith("_")]
    parts = [
        "# Python\n\n## What is public\n\nAll of it is imported from `mmedit_cli`.\n"
    ]
    parts += [f"::: mmedit_cli.{name}\n" for name in public]
    parts.append("## For plug-ins\n\nWhat a plug-in of your own is a subclass of.\n")
    parts += [f"::: {name}\n" for name in FOR_PLUGINS]
    return "\n".join(parts)
