"""The tables of `mmedit edit`, `mmedit edits` and `mmedit ask --compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output, counted

_MOST = 20  # rows of a table of edits; the rest is in --json
_OF_NEW_EDITS = [
    "edit",
    "question",
    "picture",
    "target",
    "answer before",
    "answer after",
    "holds",
]
_OF_OTHER_WAYS = [
    "asked otherwise",
    "picture",
    "answer before",
    "answer after",
    "holds",
]
_OF_PROBES = ["locality probe", "picture", "answer before", "answer after", "same"]
_OF_LISTED_EDITS = [
    "edit",
    "made",
    "question",
    "picture",
    "answer before",
    "target",
    "",
]


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
        out.line(
            f"{head['editor']} on {head['model']}: {counted(len(entries), 'concept')}"
        )
        rows = []
        for entry in entries:
            row = [
                entry["token"],
                entry["superclass"],
                str(len(entry["images"])),
                f"{entry['bytes']:,}",
                entry["time"],
            ]
            rows.append(row)
        out.table(["token", "superclass", "photos", "bytes", "time"], rows)

    out.result({**head, "concepts": entries}, show)


def concept_edits(
    out: Output, folder: Path, report: Mapping[str, Any], *, made: bool = False
) -> None:
    """Print edits of what is drawn: those that were made now, or those of a folder."""

    def show() -> None:
        edits = report["edits"]
        rows = []
        for edit in edits[:_MOST]:
            drawn_as = " | ".join(map(repr, edit["targets"])) or "(erased)"
            state = "" if edit["active"] else "undone"
            kept = f"{len(edit['keep']):,}"
            rows.append([str(edit["id"]), repr(edit["source"]), drawn_as, kept, state])
        out.line(
            f"{report['editor']} on {report['model']}: {counted(len(edits), 'edit')}"
        )
        out.table(["edit", "text", "drawn as", "texts kept", ""], rows)
        if made:
            out.line(f"{report['seconds']:.2f} s; {report['active']:,} active")
            out.line(f'mmedit generate --edits {folder} "..." --compare')

    out.result(report, show)


def exported_drawing_model(out: Output, report: Mapping[str, Any]) -> None:
    """Print where an edited text-to-image model was written, and its changed weights."""

    def show() -> None:
        out.line(
            f"{report['folder']}: a folder of diffusers, {counted(report['edits'], 'edit')}"
        )
        for file in report["files"]:
            out.line(f"{file}: the {report['changed']} changed weights alone")
        if "url" in report:
            out.line(report["url"])

    out.result(report, show)


def exported_concepts(out: Output, done: Mapping[str, Any]) -> None:
    """Print the LoRA files that were written, and how each subject is called with them."""

    def show() -> None:
        for written in done["written"]:
            out.line(f"{written['file']}: {written['called']}")

    out.result(done, show)


def exported_model(out: Output, report: Mapping[str, Any]) -> None:
    """Print what an export of edits is, how it loads, and how it was checked."""
    from mmedit_cli.knowledge.workflow.exporting import ADAPTERS, RUNTIME, STANDALONE

    def show() -> None:
        kind = report["kind"]
        out.line(f"{report['folder']}: {kind}, {counted(report['edits'], 'edit')}")
        if kind == STANDALONE:
            out.line(
                f"the edits need the code in {RUNTIME}: load it with trust_remote_code=True; mmedit is not needed"
            )
        if "checked" in report:
            out.line(
                f"loaded again and asked {report['checked']} questions: "
                f"logits at most {report['largest_difference']:.3g} from the edited model"
            )
        if "continued" in report:
            out.line(
                "a batch of an edit's question and another: routed as alone; generate says the same without its cache"
            )
        if kind == ADAPTERS:
            out.line(
                "one adapter an edit: which one answers a question is not in the files"
            )
        if "url" in report:
            out.line(report["url"])

    out.result(report, show)


def made(out: Output, report: Mapping[str, Any]) -> None:
    """Print what new edits did: answers before and after, locality probes, time and memory."""

    def show() -> None:
        edits = report["edits"]
        rows = []
        for edit in edits[:_MOST]:
            row = [
                str(edit["id"]),
                edit["prompt"],
                edit["picture"],
                edit["target"],
                edit["before"],
                edit["after"],
                _yes(edit["holds"]),
            ]
            rows.append(row)
        out.table(_OF_NEW_EDITS, rows)
        _more(out, len(edits))
        n_held = sum(edit["holds"] for edit in edits)
        held = _count(n_held, len(edits), "edit holds", "edits hold")
        if report["otherwise"]:
            _print_other_ways(out, report["otherwise"])
        if report["new"]:
            _print_effect(out, report, held)
        else:
            out.line(f"{held}; nothing new was made")
        out.line(f"kept in {report['ledger']}, which has {report['active']:,} active")
        if n_held and report.get("advice"):
            out.line(f"what may be done: {report['advice']}")

    out.result(report, show)


def _print_other_ways(out: Output, ways: Sequence[Mapping[str, Any]]) -> None:
    """Print what is answered where the same facts are asked in other ways."""
    rows = []
    for way in ways[:_MOST]:
        row = [
            way["prompt"],
            way["picture"],
            way["before"],
            way["after"],
            _yes(way["holds"]),
        ]
        rows.append(row)
    out.table(_OF_OTHER_WAYS, rows)
    _more(out, len(ways))
    n_held = sum(way["holds"] for way in ways)
    out.line(
        _count(
            n_held,
            len(ways),
            "other way of asking gets the new answer",
            "other ways of asking get the new answer",
        )
    )


def _print_effect(out: Output, report: Mapping[str, Any], held: str) -> None:
    """Print the locality probes of new edits, and what the edits cost."""
    locality, cost = report["locality"], report["cost"]
    rows = []
    for probe in locality:
        row = [
            probe["prompt"],
            probe["picture"],
            probe["before"],
            probe["after"],
            _yes(probe["same"]),
        ]
        rows.append(row)
    out.table(_OF_PROBES, rows)
    same = sum(probe["same"] for probe in locality)
    out.line(f"{held}; {same} of {len(locality)} locality probes answered as before")
    sizes = []
    for name, size in cost["peak_memory"].items():
        sizes.append(f"{name} {size / (1 << 20):,.0f} MiB")
    seconds = cost["seconds"] / report["new"]
    out.line(f"{seconds:.3g} s an edit; peak memory: {', '.join(sizes)}")


def way_out(report: Mapping[str, Any]) -> str:
    """Return what to do where edits hold and something else is not as it should be; empty where all is well."""
    ledger = report["ledger"]
    missed = [way for way in report["otherwise"] if not way["holds"]]
    touched = [probe for probe in report["locality"] if not probe["same"]]
    ways = []
    if missed:
        also = f"mmedit edit --into {ledger} ..."
        ways.append(f"teach what is asked otherwise as well ({also})")
    if touched:
        ids = [edit["id"] for edit in report["edits"]]
        undo = f"mmedit edits undo {ledger} {_in_short(ids)}"
        ways.append(f"take it back ({undo})")
    if ways:
        ways.append("try another editor in a ledger of its own")
    return "; ".join(ways)


def advice(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to say, and what to do, where none of the edits that were asked for holds."""
    edits, ledger, editor = report["edits"], report["ledger"], report["editor"]
    which = (
        "the edit does not hold"
        if len(edits) == 1
        else f"none of the {len(edits):,} edits holds"
    )
    named = _in_short([edit["id"] for edit in edits])
    ways = [f"`mmedit edits undo {ledger} {named}` takes it back"]
    if editor in ("ft", "grace", "lora", "m-ore", "t-patcher", "wise"):
        ways.append("more steps may do it (--set steps=...)")
    if editor != "multi-melo":
        ways.append("multi-melo holds facts with and without a picture")
    return f"{which}: kept in {ledger} all the same", "; ".join(ways)


def _in_short(ids: Sequence[int]) -> str:
    """Return the ids as `mmedit edits` takes them: 3-7, or 1,4."""
    first = ids[0]
    last = ids[-1]
    between = range(first, last + 1)
    together = list(ids) == list(between)
    if together and first < last:
        return f"{first}-{last}"
    named = map(str, ids)
    return ",".join(named)


def listed(
    out: Output, edits: Sequence[Mapping[str, Any]], head: Mapping[str, Any]
) -> None:
    """Print the edits of a ledger."""

    def show() -> None:
        out.line(
            f"{head['editor']} on {head['model']}: {head['active']:,} active of {counted(head['edits'], 'edit')}"
        )
        rows = []
        for edit in edits:
            row = [
                str(edit["id"]),
                edit["time"],
                edit["prompt"],
                edit["picture"],
                edit["before"],
                edit["target"],
                "" if edit["active"] else "undone",
            ]
            rows.append(row)
        if rows:
            out.table(_OF_LISTED_EDITS, rows)

    out.result({**head, "list": list(edits)}, show)


def verified(out: Output, found: Sequence[Mapping[str, Any]]) -> None:
    """Print which edits hold."""

    def show() -> None:
        asked = [edit for edit in found if edit["replaced_by"] is None]
        failed = [edit for edit in asked if not edit["holds"]]
        rows = []
        for edit in failed[:_MOST]:
            row = [
                str(edit["id"]),
                edit["prompt"],
                edit["picture"],
                edit["target"],
                edit["answer"],
            ]
            rows.append(row)
        if rows:
            out.table(["edit", "question", "picture", "target", "answer"], rows)
            _more(out, len(failed))
        n_held = len(asked) - len(failed)
        out.line(_count(n_held, len(asked), "edit holds", "edits hold"))
        replaced = len(found) - len(asked)
        if replaced:
            out.line(
                f"{replaced} were replaced by a later edit of the same picture and question"
            )

    out.result(list(found), show)


def contradicting(out: Output, found: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Print groups of edits that contradict each other."""

    def show() -> None:
        if not found:
            out.line("no active edits contradict each other")
            return
        rows = []
        sections = []
        for edits in found:
            for edit in edits:
                shown = [edit["prompt"], edit["picture"], edit["target"]]
                rows.append([str(edit["id"]), *map(str, shown)])
            sections.append(len(rows) - 1)
        out.table(["edit", "question", "picture", "target"], rows, sections=sections)
        out.line(
            "the last of each group was made last; `mmedit edits undo` takes one back"
        )

    out.result(found, show)


def compared(out: Output, difference: Mapping[str, Any]) -> None:
    """Print how two ledgers differ."""

    def show() -> None:
        rows = []
        for sign, key in (("<", "only_in_first"), (">", "only_in_second")):
            for edit in difference[key]:
                row = [
                    sign,
                    str(edit["id"]),
                    edit["prompt"],
                    edit["picture"],
                    edit["target"],
                ]
                rows.append(row)
        for pair in difference["other_target"]:
            first, second = pair["first"], pair["second"]
            row = [
                "!",
                f"{first['id']} / {second['id']}",
                first["prompt"],
                first["picture"],
                f"{first['target']} / {second['target']}",
            ]
            rows.append(row)
        if rows:
            out.table(["", "edit", "question", "picture", "target"], rows)
        for key, (one, two) in difference["settings"].items():
            out.line(f"{key}: {_brief(one)} / {_brief(two)}")
        out.line(f"{difference['same']:,} active edits are the same")

    out.result(difference, show)


def answers(out: Output, found: Sequence[Mapping[str, Any]], *, compare: bool) -> None:
    """Print the answers to many questions, or base and edited side by side with the edits that took part."""

    def show() -> None:
        header = ["question", "picture", "answer"]
        if compare:
            header = ["question", "picture", "base", "edited", "edits"]
        rows = []
        for line in found:
            row = [line["prompt"], str(line["image"] or "")]
            if compare:
                row += [line["base"], line["answer"], fired(line)]
            else:
                row.append(line["answer"])
            rows.append(row)
        out.table(header, rows)

    out.result(list(found), show)


def fired(row: Mapping[str, Any]) -> str:
    """Return in a few words which edits took part in an answer."""
    if row["fired"] is None:
        return "all (weights)"
    named = [f"{edit['edit']} ({edit['weight']:.2f})" for edit in row["fired"]]
    return ", ".join(named) or "none"


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
        taken = done["taken_up"]
        lines = done["unreadable_lines"]
        lost = done["without_tensors"]
        if taken:
            out.line(
                f"taken up: {counted(len(taken), 'edit')} ({_ids(taken)}), as active: undo what had been undone"
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
