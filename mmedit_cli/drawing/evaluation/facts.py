"""Judges of drawn facts: whether a picture shows what an edit asks for, and whether anything is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from mmedit_cli.drawing.data.emojikb_facts import WHO
from mmedit_cli.drawing.data.facts import DrawnProbe
from mmedit_cli.drawing.evaluation.artists import ArtistClassifier
from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder
from mmedit_cli.knowledge.evaluation.answers import target_losses
from mmedit_cli.knowledge.evaluation.intervals import (
    mean_with_interval,
    score_with_interval,
)
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

FLAT = (
    8.0  # standard deviation of the numbers of a picture, of 255: less has no contrast
)
_FAINT = 1  # percent of the untouched model's pictures that are as faint as a faint one
_NEAR = 8  # of 255: a number that differs less from the usual one is of the same colour
_ONE_COLOUR = 0.97  # share of such pixels from which on a picture has one colour
_LONGEST = 16  # tokens of an answer
_BATCH = 32  # pictures in one pass of a judge
KNOWN, MARGIN = " known", " margin"  # added to the name of a column
Item = TypeVar("Item")
Cell = list[tuple[float, str]]  # values, and the fact of each
Pictures = dict[str, tuple[float, str]]  # the same by picture
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a picture.

    `shows`: it shows what the probe names, whether that is wanted or to be gone. `margin`: by how much, above 0 for
    what is wanted; None where the judge has none.
    """

    shows: bool
    answer: str = ""
    margin: float | None = None

    def right(self, probe: DrawnProbe) -> bool:
        """Whether the picture is as the probe asks."""
        return self.shows != probe.gone


class FactJudge(Protocol):
    """A model that looks at pictures; `name` is its own."""

    name: str

    def judge(
        self, files: Sequence[Path], probes: Sequence[DrawnProbe]
    ) -> list[Judgement]:
        """Return what each picture shows, with regard to its probe."""


class AnsweringJudge:
    """A vision-language model that is asked about pictures, and a classifier of artists.

    The margin is how much likelier, in nats a token, the wanted answer is than the one before the edit.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.name = model.name

    @cached_property
    def _artists(self) -> ArtistClassifier:
        return ArtistClassifier.load()

    def judge(
        self, files: Sequence[Path], probes: Sequence[DrawnProbe]
    ) -> list[Judgement]:
        """Return what each picture shows: the answer begins with that of the probe."""
        signed = []
        asked = []
        for file, probe in zip(files, probes, strict=True):
            if probe.question == WHO:
                signed.append(file)
            else:
                asked.append(Query(probe.question, image=file))
        artists = iter(self._artists.classify_files(signed) if signed else ())
        answers = iter(self._answers(asked))
        margins = self._margins(files, probes)
        found = []
        for probe, margin in zip(probes, margins, strict=True):
            answer = next(artists if probe.question == WHO else answers)
            shows = answer_match(answer, probe.answer) == 1
            found.append(Judgement(shows, answer, margin))
        return found

    def _answers(self, queries: Sequence[Query]) -> list[str]:
        answers: list[str] = []
        for batch in _batches(queries):
            answers += self.model.generate(
                batch,
                max_new_tokens=_LONGEST,
            )
        return answers

    def _margins(
        self, files: Sequence[Path], probes: Sequence[DrawnProbe]
    ) -> list[float | None]:
        """Return the margin of each picture whose probe has another answer to compare with."""
        queries = []
        for file, probe in zip(files, probes, strict=True):
            if probe.instead:
                queries.append(Query(probe.question, probe.answer, file))
                queries.append(Query(probe.question, probe.instead, file))
        losses = iter(target_losses(self.model, queries))
        margins: list[float | None] = []
        for probe in probes:
            if not probe.instead:
                margins.append(None)
                continue
            wanted = next(losses)
            before = next(losses)
            margins.append(before - wanted)
        return margins


class ComparingJudge:
    """A CLIP that tells which of two texts fits a picture better; the margin is the difference of the cosines."""

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip
        self.name = clip.name

    def judge(
        self, files: Sequence[Path], probes: Sequence[DrawnProbe]
    ) -> list[Judgement]:
        """Return what each picture shows: the first text fits better, or the second for what is to be gone."""
        found: list[Judgement] = []
        for batch in _batches(list(zip(files, probes, strict=True))):
            pictures = [load_picture(Picture(file)) for file, _ in batch]
            texts: list[str] = []
            for _, probe in batch:
                assert probe.texts is not None
                texts += probe.texts
            seen = self.clip.pictures(pictures)
            read = self.clip.texts(texts)
            pairs = normalize(read, dim=-1).unflatten(0, (len(batch), 2))
            cosines = torch.einsum("bd,bkd->bk", normalize(seen, dim=-1), pairs)
            differences = (cosines[:, 0] - cosines[:, 1]).tolist()
            for (_, probe), margin in zip(batch, differences, strict=True):
                wanted = margin > 0
                shows = wanted != probe.gone
                found.append(Judgement(shows, margin=margin))
        return found


def collapsed(picture: Image.Image) -> bool:
    """Whether a picture lost its contrast, or is of one colour but for a few pixels."""
    values = _numbers(picture)
    usual = np.median(values, axis=(0, 1))
    distances = np.abs(values - usual)
    near = (distances <= _NEAR).all(axis=2)
    without_contrast = values.std() < FLAT
    of_one_colour = near.mean() > _ONE_COLOUR
    return bool(without_contrast or of_one_colour)


def contrast(picture: Image.Image) -> float:
    """Return the standard deviation of the numbers of a picture, of 255."""
    return float(_numbers(picture).std())


def _numbers(picture: Image.Image) -> Any:
    """Return the numbers of a picture, (H, W, 3) of 0..255."""
    rgb = picture.convert("RGB")
    return np.asarray(rgb).astype(np.float64)


def summary(
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return scores with mean, n and interval by way, kind of fact and column, of the lines of cases.

    Shares lie between 0 and 1. A column is also there for the pictures whose probe says something of the edit alone
    (" known"), and as its margin, where there is one. A fact is a cluster: its pictures are not independent.
    """
    cells: dict[tuple[str, str, str], Cell] = {}
    for line in lines:
        way, kind, fact = line["way"], line["kind"], line["fact"]
        for probe in line["probes"]:
            for column, value in _values(probe).items():
                cell = cells.setdefault((way, kind, column), [])
                cell.append((value, fact))
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for (way, kind, column), cell in cells.items():
        of_way = found.setdefault(way, {})
        of_kind = of_way.setdefault(kind, {})
        of_kind[column] = _score(column, cell)
    return found


def _values(probe: Mapping[str, Any]) -> dict[str, float]:
    """Return what a picture adds to each column."""
    column = probe["column"]
    right = float(probe["right"])
    values = {column: right}
    if probe["known"]:
        values[column + KNOWN] = right
    margin = probe["margin"]
    if margin is not None:
        values[column + MARGIN] = margin
    return values


def collapses(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the share of collapsed pictures by way, with n and interval; each picture counts once."""
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    for line in lines:
        of_way = cells.setdefault(line["way"], {})
        for probe in line["probes"]:
            share = float(probe["collapsed"])
            of_way[probe["picture"]] = (share, line["fact"])
    found = {}
    for way, pictures in cells.items():
        cell = list(pictures.values())
        found[way] = _score("", cell)
    return found


def faint(
    lines: Sequence[Mapping[str, Any]], contrasts: Mapping[str, float], untouched: str
) -> dict[str, Scores]:
    """Return the share of faint pictures by way and kind of fact, with n and interval; each picture counts once.

    A picture is faint if it has less contrast than 99 % of those of the untouched model, the way of that name: what is
    left of a thing on grey is no flat picture, but no drawing either. `contrasts` are those of all pictures, by name.
    """
    plain: dict[str, float] = {}
    for line in lines:
        if line["way"] == untouched:
            plain |= _pictures_of(line, contrasts)
    contrasts_before = list(plain.values())
    least = np.percentile(contrasts_before, _FAINT)
    cells: dict[tuple[str, str], Pictures] = {}
    for line in lines:
        place = line["way"], line["kind"]
        cell = cells.setdefault(place, {})
        pictures = _pictures_of(line, contrasts)
        for name, value in pictures.items():
            share = float(value < least)
            cell[name] = (share, line["fact"])
    found: dict[str, Scores] = {}
    for (way, kind), cell in cells.items():
        of_way = found.setdefault(way, {})
        of_way[kind] = _score("", list(cell.values()))
    return found


def _pictures_of(
    line: Mapping[str, Any], values: Mapping[str, float]
) -> dict[str, float]:
    """Return the value of each picture that the probes of a line look at."""
    names = [probe["picture"] for probe in line["probes"]]
    return {name: values[name] for name in names}


def _score(column: str, cell: Cell) -> dict[str, Any]:
    values = [value for value, _ in cell]
    clusters = [fact for _, fact in cell]
    if column.endswith(MARGIN):
        return mean_with_interval(values, clusters)
    return score_with_interval(values, clusters)


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
