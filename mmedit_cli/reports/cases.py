"""The cases of finished runs as the cards of a page, for each kind of run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output
from mmedit_cli.page.writing import Answers, Card, Page, Question
from mmedit_cli.records import Run
from mmedit_cli.reports.scores import column_name
from mmedit_cli.reports.thumbnails import thumbnails

Json = Mapping[str, Any]


class _Pictures:
    """The pictures of a page by file, each once, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.places: dict[Path, int] = {}

    def place(self, file: Path) -> int:
        """Return the place of a picture."""
        return self.places.setdefault(file, len(self.places))


def add_cases(
    page: Page, folders: Sequence[Path], reports: Sequence[Json], out: Output
) -> None:
    """Add a card a case of each run to a page, and the pictures that they show."""
    pictures = _Pictures()
    pairs = zip(folders, reports, strict=True)
    for number, (folder, report) in enumerate(pairs):
        for key, cards in _CARDS.items():
            if key in report:
                found = cards(_with_cases(folder, report), number, pictures, page)
                page.cards += found
                break
    with out.progress({"pictures": len(pictures.places)}) as tick:
        small = thumbnails(pictures.places, lambda n: tick("pictures", n))
    page.pictures += [small.get(file, "") for file in pictures.places]
    missing = page.pictures.count("")
    if missing:
        out.note(f"{missing:,} pictures are gone, or have no room on the page")


def _with_cases(folder: Path, report: Json) -> Path:
    """Return the folder with the cases of a run: of several seeds or orders, that of the first."""
    if "runs" not in report or (folder / "cases.jsonl").exists():
        return folder
    first = Path(report["runs"][0]["run"])
    if first.is_dir():
        return first
    # the records were moved: RECORDS/eval-spread/EDITOR/MODEL/DATA/ID beside RECORDS/eval/...
    records = folder.resolve().parents[4]
    place = first.parts[-5:]
    return records.joinpath(*place)


# -- knowledge ------------------------------------------------------------------------------------------------------


def _knowledge(
    folder: Path, run: int, pictures: _Pictures, page: Page
) -> Iterator[Card]:
    """Yield a card a case of an evaluation of knowledge."""
    view = Run.view(folder)
    asked = {line["case"]: line["questions"] for line in view.read("questions")}
    by_case: dict[tuple[int, int], list[Json]] = {}
    for line in view.read("cases"):
        by_case.setdefault((line["group"], line["index"]), []).append(line)
    for (_, index), of_case in by_case.items():
        of_case.sort(key=lambda line: int(line["edits"]))
        first = of_case[0]
        for column in first["answers"]:
            _note_probe(page, column)
        questions = _questions(first, asked.get(first["case"], {}), pictures)
        answers = [_answers(line) for line in of_case]
        request = questions[0]
        title = (
            f"{request.prompt or 'a question that was not recorded'} → {request.target}"
        )
        notes = [f"{first['case']}, edit {index + 1} of its group"]
        yield Card(
            title,
            first["type"],
            run,
            notes,
            questions=questions,
            answers=answers,
        )


def _note_probe(page: Page, column: str) -> None:
    name = column_name(column)
    if name not in page.probes:
        page.probes.append(name)
        if column.startswith("locality."):
            page.kept.append(name)


def _questions(line: Json, asked: Json, pictures: _Pictures) -> list[Question]:
    """Return all questions of a case, the request first."""
    found = []
    for column, answers in line["answers"].items():
        queries = asked.get(column) or [{}] * len(answers)
        for query, said in zip(queries, answers, strict=True):
            image = query.get("image")
            place = -1 if image is None else pictures.place(Path(image))
            found.append(
                Question(
                    column_name(column),
                    query.get("prompt", ""),
                    place,
                    query.get("background", ""),
                    said["target"],
                    said["before"],
                )
            )
    return found


def _answers(line: Json) -> Answers:
    """Return what was said to the questions of a case at a milestone."""
    after = []
    right = []
    fired: list[str] = []
    for column, answers in line["answers"].items():
        after += [said["after"] for said in answers]
        right += [_is_right(column, said) for said in answers]
        fired += line.get("routing", {}).get(column, ())
    return Answers(line["edits"], after, right, fired)


def _is_right(column: str, said: Json) -> bool | None:
    """Whether an answer is as it should be: as wanted or, of a locality probe, as before; None without an answer."""
    from mmedit_cli.knowledge.evaluation.metrics import answer_match, same_answer

    after = said["after"]
    if after is None:
        return None
    if column.startswith("locality."):
        before = said["before"]
        return same_answer(before, after) == 1
    target = said["target"]
    return answer_match(after, target) == 1


# -- pictures -------------------------------------------------------------------------------------------------------


def _edited_pictures(
    folder: Path, run: int, pictures: _Pictures, page: Page
) -> Iterator[Card]:
    """Yield a card a pair of an evaluation of an image editor."""
    for line in Run.view(folder).read("cases"):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "--", line["uid"])
        gallery = folder / "gallery"
        files = {
            "before": gallery / f"{stem}-before.png",
            "edited": folder / "pictures" / f"{stem}.png",
            "wanted": gallery / f"{stem}-wanted.png",
        }
        groups = []
        for name, file in files.items():
            if file.is_file():
                place = pictures.place(file)
                groups.append((name, [place]))
        notes = [_scores_line(line["scores"])]
        if line["expressive"]:
            notes.insert(0, f"{line['expressive']} ({line['expressive_source']})")
        yield Card(line["instruction"], line["kind"], run, notes, groups)


def _drawn_concepts(
    folder: Path, run: int, pictures: _Pictures, page: Page
) -> Iterator[Card]:
    """Yield a card a sheet of an evaluation of a personalizer: the pictures of each side."""
    by_sheet: dict[str, list[Json]] = {}
    for line in Run.view(folder).read("cases"):
        by_sheet.setdefault(line["sheet"], []).append(line)
    for sheet, lines in by_sheet.items():
        groups: list[tuple[str, list[int]]] = []
        notes = []
        for of_side in lines:
            groups += _drawn(folder, sheet, of_side, pictures)
            means = {}
            for name, values in of_side["scores"].items():
                if values:
                    means[name] = sum(values) / len(values)
            notes.append(f"{of_side['side']}: {_scores_line(means)}")
        subject = lines[0]["subject"] or "other things"
        yield Card(subject, lines[0]["test"], run, notes, groups)


def _drawn(
    folder: Path, sheet: str, line: Json, pictures: _Pictures
) -> Iterator[tuple[str, list[int]]]:
    """Yield the pictures of a side of a sheet by prompt; runs of before do not say their prompts."""
    side = line["side"]
    home = folder / "pictures" / side / line.get("pictures", sheet)
    for number, prompt in enumerate(line.get("prompts", [""])):
        drawn = sorted(home.glob(f"{number:02d}-*.png"))
        if drawn:
            places = [pictures.place(file) for file in drawn]
            yield f"{side}: {prompt}", places


def _scores_line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


# a key that a report has -> its cards, as in `show`
_CARDS: dict[str, Callable[[Path, int, _Pictures, Page], Iterator[Card]]] = {
    "milestones": _knowledge,
    "sides": _drawn_concepts,
    "by_kind": _edited_pictures,
}
