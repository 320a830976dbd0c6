"""What makes a benchmark lie: repeated and contradictory edits, odd texts, and what evaluation shares with training.

A finding that the user can mend is a problem; one that lies in the published data is worth knowing, no more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.shared.selection import Pictures
from mmedit_cli.types import EditCase, Query

# what was checked; fine (True), wrong (False) or worth knowing (None); what was found
Finding = tuple[str, bool | None, str]
CLEAN_RULES = (
    "left out: cases whose picture occurs in training, whose question and answer do, or that repeat an earlier case; "
    "of the others, the columns named here: their picture or their question and answer occur in training, or their "
    "picture is edited by another case"
)
_SHORTEST = 4  # letters; shorter words of an answer stand in questions by chance
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
    found: list[Query] = []
    for case in cases:
        for name, queries in case.columns():
            if name == column:
                found.extend(queries)
    return found


def _by_column(cases: Iterable[EditCase]) -> dict[str, list[Query]]:
    """Return the queries of all cases by column."""
    found: dict[str, list[Query]] = {}
    for case in cases:
        for column, queries in case.columns():
            found.setdefault(column, []).extend(queries)
    return found


def label(column: str) -> str:
    """Return the short name of a column."""
    return _LABELS.get(column, column)


def images(cases: Iterable[EditCase]) -> set[Path]:
    """Return every picture that the cases use."""
    found: set[Path | None] = set()
    for case in cases:
        for _, queries in case.columns():
            found.update(query.image for query in queries)
    return {image for image in found if image is not None}


def labelled(prefix: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings with `prefix` in front of what was checked."""
    for check, fine, found in findings:
        yield f"{prefix}{check}", fine, found


# -- one file ---------------------------------------------------------------------------------------------------------


def within(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Count the cases, and look for edits that repeat or contradict each other and for odd texts."""
    yield "cases", bool(cases), f"{len(cases):,}"
    yield from _counts(cases)
    yield from repeated(cases)
    requests = [case.request for case in cases]
    edited = Counter(query.image for query in requests)
    edited.pop(None, None)
    same = sum(edited[query.image] > 1 for query in requests)
    yield _counted(
        "same picture",
        same,
        f"{share(same, len(cases))} edits share their picture with another edit",
    )
    answers: dict[str, set[str]] = defaultdict(set)
    for question, answer in map(fact, requests):
        answers[question].add(answer)
    same = sum(len(answers[question]) > 1 for question, _ in map(fact, requests))
    yield _counted(
        "same question",
        same,
        f"{share(same, len(cases))} edits share a question with another answer",
    )
    local = probes(cases, "locality.image")
    count = sum(query.image in edited for query in local)
    yield _counted(
        "M-Loc pictures",
        count,
        f"{share(count, len(local))} are themselves edited",
    )
    yield from _texts(cases)


def _counts(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Count queries and pictures by column."""
    n_queries = []
    n_pictures = []
    for column, queries in _by_column(cases).items():
        name = label(column)
        n_queries.append(f"{name} {len(queries):,}")
        seen = {query.image for query in queries}
        seen.discard(None)
        if seen:
            n_pictures.append(f"{name} {len(seen):,}")
    yield "queries", True, ", ".join(n_queries)
    total = len(images(cases))
    by_column = ", ".join(n_pictures)
    found = f"{total:,} distinct: {by_column}" if n_pictures else "none"
    yield "pictures", True, found


def repeated(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Look for edits that ask the same of the same picture: again with the same answer, or with another one."""
    first: dict[Ask, EditCase] = {}
    again: list[tuple[EditCase, EditCase]] = []
    against: list[tuple[EditCase, EditCase]] = []
    for case in cases:
        earlier = first.setdefault(asked(case.request), case)
        if earlier is case:
            continue
        if fact(earlier.request) == fact(case.request):
            again.append((case, earlier))
        else:
            against.append((case, earlier))
    yield _counted(
        "duplicates",
        len(again),
        f"{_edits(again, 'repeat')} an earlier one{_places(again)}",
    )
    yield (
        "contradictions",
        not against,
        f"{_edits(against, 'contradict')} an earlier one{_places(against)}",
    )


def _edits(pairs: Sequence[tuple[EditCase, EditCase]], do: str) -> str:
    """Return how many edits do something, in words."""
    count = len(pairs)
    return f"1 edit {do}s" if count == 1 else f"{count:,} edits {do}"


def _places(pairs: Sequence[tuple[EditCase, EditCase]], most: int = 5) -> str:
    if not pairs:
        return ""
    named = []
    for case, earlier in pairs[:most]:
        here = Path(case.place).name
        there = Path(earlier.place).name
        named.append(f"{here} and {there}")
    if len(pairs) > most:
        named.append("...")
    return ": " + ", ".join(named)


def _texts(cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Look for odd answers and odd rephrasings."""
    requests = [case.request for case in cases]
    yield "answers", True, _about_answers([query.target.strip() for query in requests])
    told = blanks = 0
    for query in requests:
        if _content_words(query.target) & _words(query.prompt):
            told += 1
        if query.target != query.target.strip():
            blanks += 1
    contained = told / max(1, len(cases))
    yield _counted(
        "told answers",
        told,
        f"{contained:.1%} of the questions contain a word of the answer",
    )
    yield _counted(
        "blanks",
        blanks,
        f"{share(blanks, len(cases))} answers have white space around them",
    )
    total = quoted = same = 0
    for case in cases:
        for query in case.generality.get("text", ()):
            total += 1
            quoted += query.prompt[:1] == query.prompt[-1:] == '"'
            same += query.prompt == case.request.prompt
    yield _counted(
        "quotation marks",
        quoted,
        f"{share(quoted, total)} rephrased questions are in quotation marks",
    )
    yield _counted(
        "not rephrased",
        same,
        f"{share(same, total)} rephrased questions are the question itself",
    )


def _about_answers(targets: Sequence[str]) -> str:
    """Return how long and how varied some answers are."""
    total = max(1, len(targets))
    lengths = [len(target.split()) for target in targets]
    mean_length = sum(lengths) / total
    one_word = lengths.count(1) / total
    yes_or_no = sum(target.lower() in ("yes", "no") for target in targets) / total
    commonest = Counter(targets).most_common(_COMMONEST)
    covered = sum(count for _, count in commonest) / total
    return (
        f"{mean_length:.1f} words; {one_word:.1%} are one word, "
        f"{yes_or_no:.1%} yes or no; the {_COMMONEST} commonest cover {covered:.1%}"
    )


def _words(text: str) -> set[str]:
    letters = [letter if letter.isalnum() else " " for letter in text.lower()]
    return set("".join(letters).split())


def _content_words(text: str) -> set[str]:
    return {word for word in _words(text) if len(word) >= _SHORTEST}


def _counted(check: str, count: int, found: str) -> Finding:
    """Return the finding for something that is worth knowing where it occurs at all."""
    return check, None if count else True, found


# -- training against evaluation --------------------------------------------------------------------------------------


def shared(train: Sequence[EditCase], cases: Sequence[EditCase]) -> Iterator[Finding]:
    """Count what the cases share with those of training, edit by edit and column by column."""
    yield _overlap("edited picture", train, cases, "reliability", _picture)
    pictures_of_training = images(train)
    used = sum(case.request.image in pictures_of_training for case in cases)
    yield _counted(
        "any picture",
        used,
        f"{share(used, len(cases))} edited pictures have some part in training",
    )
    yield _overlap("question", train, cases, "reliability", _question)
    yield _overlap("question and answer", train, cases, "reliability", fact)
    yield _overlap("question and picture", train, cases, "reliability", asked)
    yield _overlap("M-Gen pictures", train, cases, "generality.image", _picture)
    yield _overlap("M-Loc pairs", train, cases, "locality.image", asked)
    yield _overlap(
        "M-Loc pairs and answers",
        train,
        cases,
        "locality.image",
        lambda query: (asked(query), fact(query)),
    )
    yield _overlap("T-Loc questions", train, cases, "locality.text", asked)


def _overlap(
    check: str,
    train: Sequence[EditCase],
    cases: Sequence[EditCase],
    column: str,
    part: Callable[[Query], Hashable],
) -> Finding:
    """Count how many queries of a column have a part in common with one of the same column in training."""
    known = set(map(part, probes(train, column)))
    ours = list(map(part, probes(cases, column)))
    count = sum(item in known for item in ours)
    distinct = len(known.intersection(ours))
    counted = share(count, len(ours))
    return _counted(
        check,
        count,
        f"{counted} occur in training ({distinct:,} distinct)",
    )


def _picture(query: Query) -> Path | None:
    return query.image


def _question(query: Query) -> str:
    return query.prompt.strip()


def clean(train: Sequence[EditCase], cases: Sequence[EditCase]) -> dict[str, list[str]]:
    """Return the cases that share nothing with training, each with its columns that do: see CLEAN_RULES."""
    pictures_of_training = images(train)
    facts = {fact(case.request) for case in train}
    texts = {asked(query) for query in probes(train, "locality.text")}
    edited = {case.request.image for case in cases}

    def is_shared(query: Query, case: EditCase, column: str) -> bool:
        if query.image in pictures_of_training:
            return True
        if not column.startswith("locality"):
            return False
        return asked(query) in texts or _is_spoilt(query, case, edited)

    seen: set[Ask] = set()
    dropped: set[str] = set()  # places: the cases of one record stay or go together
    found: dict[str, list[str]] = {}
    for case in cases:
        request = case.request
        is_known = request.image in pictures_of_training or fact(request) in facts
        if is_known or asked(request) in seen or case.place in dropped:
            dropped.add(case.place)
        else:
            found[case.uid] = [
                column
                for column, queries in case.columns()
                if column != "reliability"
                and any(is_shared(query, case, column) for query in queries)
            ]
        seen.add(asked(request))
    return found


def _is_spoilt(query: Query, case: EditCase, edited: set[Path | None]) -> bool:
    """Whether a locality probe is about a picture that another case edits."""
    if query.image is None or query.image == case.request.image:
        return False
    return query.image in edited


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
            for query in queries:
                if query.image is not None:
                    places.setdefault(query.image, case.place)
    bad = 0
    for image, place in places.items():
        if image in looked.missing:
            continue
        try:
            check_picture(image)
        except DataError as error:
            bad += 1
            yield "image", False, f"{place}: {error}"
    if looked.missing:
        image, place = next(iter(looked.missing.items()))
        first = f"{place}: {image}"
        found = f"{looked.count()}; the first: {first}; {layout}"
        yield "images", None if skip else False, found
    else:
        yield "images", not bad, f"{len(places):,} distinct, {bad:,} unusable"
