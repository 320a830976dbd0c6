"""How edits look to people: the tables of `mmedit edit`, `mmedit edits` and `mmedit ask --compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output

_MOST = 20  # rows of a table of edits; the rest is in --json


def learned(out: Output, folder: Path, entry: Mapping[str, Any]) -> None:
    """Print what a text-to-image model has learned, and how it is drawn."""

    def show() -> None:
        out.line(
            f"{entry['token']}: {entry['bytes']:,} bytes in {folder / entry['file']}, {entry['seconds']:.0f} s"
        )
        out.line(
            f'mmedit generate --edits {folder} "a {entry["token"]} in the snow" --compare'
        )

    out.result(entry, show)


def concepts(
    out: Output, head: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> None:
    """Print the concepts of a folder."""

    def show() -> None:
        out.line(f"{head['editor']} on {head['model']}: {len(entries):,} concepts")
        rows = [
            [
                e["token"],
                e["superclass"],
                str(len(e["images"])),
                f"{e['bytes']:,}",
                e["time"],
            ]
            for e in entries
        ]
        out.table(["token", "superclass", "photos", "bytes", "time"], rows)

    out.result({**head, "concepts": entries}, show)


def exported(out: Output, done: Mapping[str, Any]) -> None:
    """Print the LoRA files that were written, and how each subject is called with them."""
    out.result(
        done,
        lambda: (
            [out.line(f"{w['file']}: {w['called']}") for w in done["written"]] and None
        ),
    )


def made(out: Output, report: Mapping[str, Any]) -> None:
    """Print what new edits did: answers before and after, locality probes, time and memory."""

    def show() -> None:
        edits, locality, cost = report["edits"], report["locality"], report["cost"]
        rows = [
            [
                str(e["id"]),
                e["prompt"],
                e["picture"],
                e["target"],
                e["before"],
                e["after"],
                _yes(e["holds"]),
            ]
            for e in edits[:_MOST]
        ]
        out.table(
            [
                "edit",
                "question",
                "picture",
                "target",
                "answer before",
                "answer after",
                "holds",
            ],
            rows,
        )
        _more(out, len(edits))
        changed = [probe for probe in locality if not probe["same"]]
        asked = [
            [p["prompt"], p["picture"], p["before"], p["after"], _yes(p["same"])]
            for p in locality
        ]
        held = _count(
            sum(e["holds"] for e in edits), len(edits), "edit holds", "edits hold"
        )
        if not report["new"]:
            out.line(f"{held}; nothing new was made")
        else:
            out.table(
                ["locality probe", "picture", "answer before", "answer after", "same"],
                asked,
            )
            out.line(
                f"{held}; {len(locality) - len(changed)} of {len(locality)} locality probes answered as before"
            )
            memory = ", ".join(
                f"{name} {size / (1 << 20):,.0f} MiB"
                for name, size in cost["peak_memory"].items()
            )
            out.line(
                f"{cost['seconds'] / report['new']:.3g} s an edit; peak memory: {memory}"
            )
        out.line(f"kept in {report['ledger']}, which has {report['active']:,} active")

    out.result(report, show)


def advice(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to say, and what to do, where none of the edits that were asked for holds."""
    edits, ledger, editor = report["edits"], report["ledger"], report["editor"]
    which = (
        "the edit does not hold"
        if len(edits) == 1
        else f"none of the {len(edits):,} edits holds"
    )
    ids = [edit["id"] for edit in edits]
    together = ids == list(range(ids[0], ids[-1] + 1)) and len(ids) > 1
    named = f"{ids[0]}-{ids[-1]}" if together else ",".join(map(str, ids))
    ways = [f"`mmedit edits undo {ledger} {named}` takes it back"]
    if editor in ("ft", "lora", "t-patcher"):
        ways.append("more steps may do it (--set steps=...)")
    if editor != "multi-melo":
        ways.append("multi-melo holds facts with and without a picture")
    return f"{which}: kept in {ledger} all the same", "; ".join(ways)


def listed(
    out: Output, edits: Sequence[Mapping[str, Any]], head: Mapping[str, Any]
) -> None:
    """Print the edits of a ledger."""

    def show() -> None:
        out.line(
            f"{head['editor']} on {head['model']}: {head['active']:,} active of {head['edits']:,} edits"
        )
        rows = [
            [str(e["id"]), e["time"], e["prompt"], e["picture"], e["before"], e["target"],
             "" if e["active"] else "undone"]
            for e in edits
        ]  # fmt: skip
        if rows:
            out.table(
                ["edit", "made", "question", "picture", "answer before", "target", ""],
                rows,
            )

    out.result({**head, "list": list(edits)}, show)


def verified(out: Output, found: Sequence[Mapping[str, Any]]) -> None:
    """Print which edits hold."""

    def show() -> None:
        asked = [e for e in found if e["replaced_by"] is None]
        failed = [e for e in asked if not e["holds"]]
        rows = [
            [str(e["id"]), e["prompt"], e["picture"], e["target"], e["answer"]]
            for e in failed[:_MOST]
        ]
        if rows:
            out.table(["edit", "question", "picture", "target", "answer"], rows)
            _more(out, len(failed))
        out.line(
            _count(len(asked) - len(failed), len(asked), "edit holds", "edits hold")
        )
        if len(asked) < len(found):
            out.line(
                f"{len(found) - len(asked)} were replaced by a later edit of the same picture and question"
            )

    out.result(list(found), show)


def compared(out: Output, difference: Mapping[str, Any]) -> None:
    """Print how two ledgers differ."""

    def show() -> None:
        sides = (("<", "only_in_first"), (">", "only_in_second"))
        rows = [
            [sign, str(e["id"]), e["prompt"], e["picture"], e["target"]]
            for sign, key in sides
            for e in difference[key]
        ]
        for pair in difference["other_target"]:
            a, b = pair["first"], pair["second"]
            rows.append(
                [
                    "!",
                    f"{a['id']} / {b['id']}",
                    a["prompt"],
                    a["picture"],
                    f"{a['target']} / {b['target']}",
                ]
            )
        if rows:
            out.table(["", "edit", "question", "picture", "target"], rows)
        for key, (one, two) in difference["settings"].items():
            out.line(f"{key}: {_brief(one)} / {_brief(two)}")
        out.line(f"{difference['same']:,} active edits are the same")

    out.result(difference, show)


def answers(out: Output, found: Sequence[Mapping[str, Any]], *, compare: bool) -> None:
    """Print the answers to many questions, or base and edited side by side with the edits that took part."""

    def show() -> None:
        header = (
            ["question", "picture", "base", "edited", "edits"]
            if compare
            else ["question", "picture", "answer"]
        )
        rows = []
        for row in found:
            asked = [row["prompt"], str(row["image"] or "")]
            rows.append(
                [*asked, row["base"], row["answer"], fired(row)]
                if compare
                else [*asked, row["answer"]]
            )
        out.table(header, rows)

    out.result(list(found), show)


def fired(row: Mapping[str, Any]) -> str:
    """Return in a few words which edits took part in an answer."""
    if row["fired"] is None:
        return "all (weights)"
    return (
        ", ".join(f"{edit['edit']} ({edit['weight']:.2f})" for edit in row["fired"])
        or "none"
    )


def _count(some: int, of: int, one: str, many: str) -> str:
    return f"{some:,} of {of:,} {one if of == 1 else many}"


def _more(out: Output, count: int) -> None:
    if count > _MOST:
        out.line(f"and {count - _MOST:,} more: --json lists all")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _brief(value: Any) -> str:
    text = str(value.get("name", value) if isinstance(value, dict) else value)
    return text if len(text) <= 60 else text[:59] + "…"


def repaired(out: Output, folder: Path, done: dict[str, Any]) -> None:
    """Print what a repair did."""

    def show() -> None:
        taken, lines, lost = (
            done["taken_up"],
            done["unreadable_lines"],
            done["without_tensors"],
        )
        if taken:
            out.line(
                f"taken up: {len(taken):,} edits ({_ids(taken)}), as active: undo what had been undone"
            )
        if lines:
            out.line(
                f"left out: {len(lines):,} lines that cannot be read ({_ids(lines)})"
            )
        if done["copy"]:
            out.line(f"the old lines are in {folder / done['copy']}")
        for name in done["left"]:
            out.line(
                f"left: {name} does not say whose tensors it holds, or is older than what is there"
            )
        if lost:
            out.line(
                f"without tensors: {_ids(lost)}; mmedit edits compact {folder} --remake makes them again"
            )
        if not (taken or lines or lost):
            out.line(
                "nothing to repair: every edit is in its line, and its tensors are there"
            )

    out.result({"repair": done}, show)


def _ids(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return shown if len(ids) <= 10 else f"{shown}, ... {ids[-1]}"
