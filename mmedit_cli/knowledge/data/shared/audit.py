"""What makes a benchmark lie: repeated and contradictory edits, odd texts, and what evaluation shares with training.

A finding that the user can mend is a problem; one that lies in the published data is worth knowing, no more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.shared.selection import Pictures
from mmedit_cli.types import EditCase, Query

Finding = tuple[
    str, bool | None, str
]  # what was checked; fine, wrong, or (None) worth knowing; what was found
CLEAN_RULES = (
    "left out: cases whose picture occurs in training, whose question and answer do, or that repeat an earlier case; "
    "of the others, the columns named here: their picture or their question and answer occur in training, or their "
    "picture is edited by another case"
)
_TELLING = 4  # letters; shorter words of an answer stand in questions by chance
_COMMONEST = 10
_LABELS = {
    "generality.text": "T-Gen",
    "generality.image": "M-Gen",
    "locality.text": "T-Loc",
    "locality.image": "M-Loc",
}

Ask = tuple[str, Path | None]  # a question, and the picture it is about


def asked(query: Query) -> Ask:
    """Return what a query asks, blanks around it aside."""
    return query.prompt.strip(), query.image


def fact(query: Query) -> tuple[str, str]:
    """Return question and answer, blanks around them aside."""
    return query.prompt.strip(), query.target.strip()


def share(count: int, total: int) -> str:
    """Return `1,380 of 2,093`."""
    return f"{count:,} of {total:,}"


def probes(cases: Iterable[EditCase], column: str) -> list[Query]:
    """Return the queries of one column of all cases."""
    return [
        query
        for case in cases
        for name, queries in case.columns()
        if name == column
        for query in queries
    ]


def _columns(cases: Iterable[EditCase]) -> list[str]:
    return list(dict.fromkeys(column for case in cases for column, _ in case.columns()))


def label(column: str) -> str:
    """Return the short name of a column."""
    return _LABELS.get(column, column)


def images(cases: Iterable[EditCase]) -> set[Path]:
    """Return every picture that the cases use."""
    return {
        q.image
        for case in cases
        for _, queries in case.columns()
        for q in queries
        if q.image is not None
    }


# -- one file ---------------------------------------------------------------------------------------------------------


def within(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Count the cases, and look for edits that repeat or contradict each other and for odd texts."""
    requests = [case.request for case in cases]
    yield "cases", bool(cases), f"{len(cases):,}"
    columns = {column: probes(cases, column) for column in _columns(cases)}
    asked_of = {
        column: len({query.image for query in queries} - {None})
        for column, queries in columns.items()
    }
    yield (
        "queries",
        True,
        ", ".join(
            f"{label(column)} {len(queries):,}" for column, queries in columns.items()
        ),
    )
    named = ", ".join(
        f"{label(column)} {count:,}" for column, count in asked_of.items() if count
    )
    yield "pictures", True, f"{len(images(cases)):,} distinct: {named}"
    yield from repeated(cases)
    edited = Counter(query.image for query in requests if query.image is not None)
    same = sum(edited[query.image] > 1 for query in requests)
    yield (
        "same picture",
        _fine(same),
        f"{share(same, len(cases))} edits share their picture with another edit",
    )
    answers: dict[str, set[str]] = defaultdict(set)
    for query in requests:
        answers[query.prompt.strip()].add(query.target.strip())
    same = sum(len(answers[query.prompt.strip()]) > 1 for query in requests)
    yield (
        "same question",
        _fine(same),
        f"{share(same, len(cases))} edits share a question with another answer",
    )
    local = probes(cases, "locality.image")
    count = sum(query.image in edited for query in local)
    yield (
        "M-Loc pictures",
        _fine(count),
        f"{share(count, len(local))} are themselves edited",
    )
    yield from _texts(cases)


def repeated(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Look for edits that ask the same of the same picture: again with the same answer, or with another one."""
    first: dict[Ask, EditCase] = {}
    again, against = [], []
    for case in cases:
        earlier = first.setdefault(asked(case.request), case)
        if earlier is not case:
            same = fact(earlier.request) == fact(case.request)
            (again if same else against).append((case, earlier))
    yield (
        "duplicates",
        _fine(len(again)),
        f"{len(again):,} edits repeat an earlier one{_places(again)}",
    )
    yield (
        "contradictions",
        not against,
        f"{len(against):,} edits contradict an earlier one{_places(against)}",
    )


def _places(pairs: Sequence[tuple[EditCase, EditCase]], most: int = 5) -> str:
    named = [
        f"{Path(case.place).name} and {Path(earlier.place).name}"
        for case, earlier in pairs[:most]
    ]
    return (
        (": " + ", ".join(named) + (", ..." if len(pairs) > most else ""))
        if pairs
        else ""
    )


def _texts(cases: Sequence[EditCase]) -> Iterator[Finding]:
    targets = [case.request.target.strip() for case in cases]
    total = max(1, len(targets))
    words = [len(target.split()) for target in targets]
    common = sum(count for _, count in Counter(targets).most_common(_COMMONEST))
    short = sum(target.lower() in ("yes", "no") for target in targets)
    yield (
        "answers",
        True,
        f"{sum(words) / total:.1f} words; {sum(n == 1 for n in words) / total:.1%} are one word, "
        f"{short / total:.1%} yes or no; the {_COMMONEST} commonest cover {common / total:.1%}",
    )
    told = sum(
        bool(_content_words(case.request.target) & _words(case.request.prompt))
        for case in cases
    )
    yield (
        "told answers",
        _fine(told),
        f"{told / total:.1%} of the questions contain a word of the answer",
    )
    blanks = sum(case.request.target != case.request.target.strip() for case in cases)
    yield (
        "blanks",
        _fine(blanks),
        f"{share(blanks, len(cases))} answers have white space around them",
    )
    rephrased = [
        (case.request.prompt, query.prompt)
        for case in cases
        for query in case.generality.get("text", ())
    ]
    quoted = sum(other[:1] == other[-1:] == '"' for _, other in rephrased)
    yield (
        "quotation marks",
        _fine(quoted),
        f"{share(quoted, len(rephrased))} rephrased questions are in quotation marks",
    )
    same = sum(question == other for question, other in rephrased)
    yield (
        "not rephrased",
        _fine(same),
        f"{share(same, len(rephrased))} rephrased questions are the question itself",
    )


def _words(text: str) -> set[str]:
    return set(
        "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    )


def _content_words(text: str) -> set[str]:
    return {word for word in _words(text) if len(word) >= _TELLING}


def _fine(count: int) -> bool | None:
    return None if count else True


# -- training against evaluation --------------------------------------------------------------------------------------


def shared(train: Sequence[EditCase], cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Count what the cases share with those of training, edit by edit and column by column."""
    seen, requests = [case.request for case in train], [case.request for case in cases]
    yield _row("edited picture", [q.image for q in seen], [q.image for q in requests])
    everything = images(train)
    used = sum(query.image in everything for query in requests)
    yield (
        "any picture",
        _fine(used),
        f"{share(used, len(requests))} edited pictures have some part in training",
    )
    yield _row(
        "question",
        [q.prompt.strip() for q in seen],
        [q.prompt.strip() for q in requests],
    )
    yield _row(
        "question and answer", [fact(q) for q in seen], [fact(q) for q in requests]
    )
    yield _row(
        "question and picture", [asked(q) for q in seen], [asked(q) for q in requests]
    )
    theirs, ours = probes(train, "generality.image"), probes(cases, "generality.image")
    yield _row("M-Gen pictures", [q.image for q in theirs], [q.image for q in ours])
    theirs, ours = probes(train, "locality.image"), probes(cases, "locality.image")
    yield _row("M-Loc pairs", map(asked, theirs), map(asked, ours))
    yield _row(
        "M-Loc pairs and answers",
        [(asked(q), fact(q)) for q in theirs],
        [(asked(q), fact(q)) for q in ours],
    )
    yield _row(
        "T-Loc questions",
        map(asked, probes(train, "locality.text")),
        map(asked, probes(cases, "locality.text")),
    )


def _row(label: str, theirs: Iterable[object], ours: Iterable[object]) -> Finding:
    known, mine = set(theirs), list(ours)
    count = sum(item in known for item in mine)
    return (
        label,
        _fine(count),
        f"{share(count, len(mine))} occur in training ({len(known & set(mine)):,} distinct)",
    )


def clean(train: Sequence[EditCase], cases: Sequence[EditCase]) -> dict[str, list[str]]:
    """Return the cases that share nothing with training, each with its columns that do: see CLEAN_RULES."""
    pictures, facts = images(train), {fact(case.request) for case in train}
    texts = {asked(query) for query in probes(train, "locality.text")}
    edited = {case.request.image for case in cases}
    first: set[Ask] = set()
    dropped: set[str] = set()  # places: the cases of one record stay or go together
    kept = {}
    for case in cases:
        before = asked(case.request) in first
        first.add(asked(case.request))
        if (
            before
            or case.request.image in pictures
            or fact(case.request) in facts
            or case.place in dropped
        ):
            dropped.add(case.place)
            continue
        kept[case.uid] = [
            column
            for column, queries in case.columns()
            if column != "reliability"
            and any(
                query.image in pictures
                or (
                    column.startswith("locality")
                    and (asked(query) in texts or _spoilt(query, case, edited))
                )
                for query in queries
            )
        ]
    return kept


def _spoilt(query: Query, case: EditCase, edited: set[Path | None]) -> bool:
    """Whether a locality probe is about a picture that another case edits."""
    return (
        query.image is not None
        and query.image != case.request.image
        and query.image in edited
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures(
    cases: Iterable[EditCase], *, skip: bool, layout: str
) -> Iterator[Finding]:
    """Look for every distinct picture and open it; the missing ones are one line, with their place."""
    from mmedit_cli.pictures import check_picture

    looked = Pictures(skip)
    places: dict[Path, str] = {}
    for case in cases:
        looked.check(case)
        for _, queries in case.columns():
            places.update(
                (q.image, case.place)
                for q in queries
                if q.image is not None and q.image not in places
            )
    bad = 0
    for image, place in places.items():
        if image not in looked.missing:
            try:
                check_picture(image)
            except DataError as error:
                bad += 1
                yield "image", False, f"{place}: {error}"
    if looked.missing:
        image, place = next(iter(looked.missing.items()))
        yield (
            "images",
            None if skip else False,
            f"{looked.count()}; the first: {place}: {image}; {layout}",
        )
    else:
        yield "images", not bad, f"{len(places):,} distinct, {bad:,} unusable"
