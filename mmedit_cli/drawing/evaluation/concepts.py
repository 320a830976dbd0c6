"""Scores of drawn concepts: likeness to their photos, whose picture it is, and what happened to everything else.

The prompts of a test are drawn with the same seeds; every score has one value for each prompt. The name of a score
contains that of its encoder, so two encoders never share a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from mmedit_cli.drawing.data.emojikb_facts import ARTISTS
from mmedit_cli.drawing.data.facts import BACKGROUND_QUESTION, NAMING
from mmedit_cli.drawing.evaluation import picture_scores
from mmedit_cli.drawing.evaluation.artists import ArtistClassifier
from mmedit_cli.drawing.evaluation.picture_scores import ClipEncoder, all_pairs
from mmedit_cli.knowledge.evaluation.intervals import mean_with_interval
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.pictures import Picture, load_picture
from mmedit_cli.types import Query

STYLE = re.compile(rf"\b({'|'.join(ARTISTS)}) drawing\b")  # in a prompt
BACKGROUND = re.compile(r"\bon an? (\w+) background\b")  # in a prompt
_LONGEST_NAME = 16  # tokens
_BATCH = 32  # pictures in one pass of an encoder
Scores = dict[str, list[float]]
Item = TypeVar("Item")


class PictureEncoder(Protocol):
    """Anything that turns pictures into vectors."""

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (B, D)."""


@dataclass
class ScoringModels:
    """The models that look at pictures: encoders by the name of their column, CLIP for texts, a model that says names.

    A drawn picture is compared with the `gallery` of (name, picture). `unknown` are the subjects that the model has no
    name for.
    """

    encoders: Mapping[str, PictureEncoder]
    gallery: Sequence[tuple[str, Path]]
    clip: ClipEncoder | None = None
    namer: VisionLanguageModel | None = None
    unknown: frozenset[str] = frozenset()
    _gallery_encodings: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def artists(self) -> ArtistClassifier:
        """The classifier of artists, which is read when it is asked first."""
        return ArtistClassifier.load()

    def encode(self, column: str, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the encodings (B, D) of pictures by one encoder."""
        encoder = self.encoders[column]
        encodings = [encoder.pictures(batch) for batch in _batches(pictures)]
        return torch.cat(encodings)

    def encode_files(self, column: str, files: Sequence[Path]) -> Tensor:
        """Return the encodings (B, D) of picture files by one encoder."""
        encodings = []
        for batch in _batches(files):
            encodings.append(self.encode(column, _load(batch)))
        return torch.cat(encodings)

    def nearest(self, column: str, encodings: Tensor) -> list[str]:
        """Return, for encodings (B, D), the name of the picture in the gallery with the largest cosine."""
        if column not in self._gallery_encodings:
            files = [path for _, path in self.gallery]
            known = self.encode_files(column, files)
            self._gallery_encodings[column] = normalize(known, dim=-1)
        cosines = normalize(encodings, dim=-1) @ self._gallery_encodings[column].T
        names = []
        for index in cosines.argmax(1).tolist():
            name, _ = self.gallery[index]
            names.append(name)
        return names


@dataclass(frozen=True)
class DrawnTest:
    """The pictures of a test: `files` (P prompts, S seeds), and those of the same seeds by the base model.

    `plain` are the prompts in plain words, `subjects` the names of who should be seen. If it is a single one, `photos`
    are its photos and `answer` is its name in plain words.
    """

    files: Sequence[Sequence[Path]]
    base: Sequence[Sequence[Path]]
    plain: Sequence[str]
    subjects: Sequence[str] = ()
    photos: Sequence[Path] = ()
    answer: str = ""

    def pictures(self, files: Sequence[Sequence[Path]]) -> list[Image.Image]:
        """Return all pictures, prompt by prompt."""
        return _load(_flat(files))

    def by_prompt(self, values: Sequence[Any] | Tensor) -> list[Any]:
        """Return values of all pictures as one piece for each prompt."""
        seeds = len(self.files[0])
        pieces = []
        for start in range(0, len(values), seeds):
            end = start + seeds
            pieces.append(values[start:end])
        return pieces

    def percent(self, hits: Sequence[bool]) -> list[float]:
        """Return the percentage of hits for each prompt."""
        return [100 * fmean(some) for some in self.by_prompt(hits)]


def score_subject(drawn: DrawnTest, models: ScoringModels) -> Scores:
    """Score pictures of a subject: likeness to its photos, whose picture it is, and how well prompts are followed."""
    pictures = drawn.pictures(drawn.files)
    scores: Scores = {}
    for column in models.encoders:
        photos = models.encode(column, _load(drawn.photos))
        encodings = models.encode(column, pictures)
        by_prompt = drawn.by_prompt(encodings)
        scores[f"{column}-I"] = [all_pairs(some, photos) for some in by_prompt]
        names = models.nearest(column, encodings)
        is_nearest = [name in drawn.subjects for name in names]
        scores[f"nearest by {column}"] = drawn.percent(is_nearest)
        if column == "CLIP" and models.clip is not None:
            texts = models.clip.texts(drawn.plain)
            pieces = zip(by_prompt, texts, strict=True)
            scores["CLIP-T"] = [all_pairs(some, text[None]) for some, text in pieces]
        if models.namer is not None and column == models.namer.name:
            scores |= _background_scores(drawn, models.namer)
            scores |= _style_scores(drawn, models)
            if drawn.answer:
                scores |= _naming_scores(drawn, models, models.namer, is_nearest)
    return scores


def score_photos(photos: Sequence[Path], models: ScoringModels) -> Scores:
    """Score the photos among themselves, the best a drawn picture can expect; nothing for a single photo."""
    scores: Scores = {}
    for column in models.encoders:
        encodings = models.encode(column, _load(photos))
        value = picture_scores.among_themselves(encodings)
        if value is not None:
            scores[f"{column}-I"] = [value]
    return scores


def score_locality(drawn: DrawnTest, models: ScoringModels) -> Scores:
    """Score pictures of other things against those of the base model with the same seeds."""
    now = drawn.pictures(drawn.files)
    before = drawn.pictures(drawn.base)
    distances = []
    for one, other in zip(now, before, strict=True):
        distances.append(
            picture_scores.l1(
                picture_scores.pixels(one),
                picture_scores.pixels(other),
            )
        )
    scores: Scores = {
        # An L1 of zero is equality of all values of all pixels.
        "identical": drawn.percent([distance == 0 for distance in distances]),
        "L1": [fmean(some) for some in drawn.by_prompt(distances)],
    }
    for column in models.encoders:
        ours = drawn.by_prompt(models.encode(column, now))
        theirs = drawn.by_prompt(models.encode(column, before))
        both = list(zip(ours, theirs, strict=True))
        paired = [picture_scores.paired(one, other) for one, other in both]
        scores[f"{column}-I paired"] = paired
        scores[f"{column}-I all pairs"] = [all_pairs(*pair) for pair in both]
    return scores


def score_pairs(drawn: DrawnTest, models: ScoringModels) -> Scores:
    """Score pictures of two subjects: one is seen if it is nearest to the whole picture or to a part of it."""
    parts = []
    counts = []
    for picture in drawn.pictures(drawn.files):
        some = windows(picture)
        parts += some
        counts.append(len(some))
    wanted = set(drawn.subjects)
    scores: Scores = {}
    for column in models.encoders:
        names = iter(models.nearest(column, models.encode(column, parts)))
        seen = []
        for count in counts:
            of_picture = set(islice(names, count))
            seen.append(len(of_picture & wanted))
        both = [number >= 2 for number in seen]
        scores[f"both by {column}"] = drawn.percent(both)
        one_at_least = [number >= 1 for number in seen]
        scores[f"one at least by {column}"] = drawn.percent(one_at_least)
    return scores


def windows(picture: Image.Image) -> list[Image.Image]:
    """Return a picture, and squares of half its longer edge that overlap by half; they are no higher than it is."""
    width, height = picture.size
    edge = min(max(width, height) // 2, width, height)
    edge = max(1, edge)
    step = max(1, edge // 2)
    parts = [picture]
    for top in range(0, height - edge + 1, step):
        for left in range(0, width - edge + 1, step):
            box = (left, top, left + edge, top + edge)
            parts.append(picture.crop(box))
    return parts


def _naming_scores(
    drawn: DrawnTest,
    models: ScoringModels,
    namer: VisionLanguageModel,
    is_nearest: Sequence[bool],
) -> Scores:
    """Score how often a model names the subject, or its picture is nearest."""
    answers = _ask(namer, NAMING, _flat(drawn.files))
    named = [answer_match(text, drawn.answer) == 1 for text in answers]
    scores: Scores = {}
    if models.unknown.isdisjoint(drawn.subjects):
        scores[f"named by {namer.name}"] = drawn.percent(named)
    pairs = zip(is_nearest, named, strict=True)
    recognised = [any(pair) for pair in pairs]
    scores[f"recognised by {namer.name}"] = drawn.percent(recognised)
    return scores


def _background_scores(drawn: DrawnTest, namer: VisionLanguageModel) -> Scores:
    """Score how often the background has the colour that a prompt names; nothing if no prompt names one."""

    def look(files: Sequence[Path]) -> list[str]:
        return _ask(namer, BACKGROUND_QUESTION, files)

    def is_right(answer: str, colour: str) -> bool:
        return answer_match(answer, colour) == 1

    scores = _named_in_prompts(drawn, BACKGROUND, look, is_right)
    return {f"background by {namer.name}": scores} if scores else {}


def _style_scores(drawn: DrawnTest, models: ScoringModels) -> Scores:
    """Score how often a picture has the style of the artist that a prompt names; nothing if no prompt names one."""

    def is_right(artist: str, word: str) -> bool:
        return artist == ARTISTS[word]

    scores = _named_in_prompts(drawn, STYLE, models.artists.classify_files, is_right)
    return {"style": scores} if scores else {}


def _named_in_prompts(
    drawn: DrawnTest,
    pattern: re.Pattern[str],
    look: Callable[[Sequence[Path]], list[str]],
    is_right: Callable[[str, str], bool],
) -> list[float]:
    """Return how often pictures show what their prompt names, in %, one for each prompt in which a pattern is found.

    `look` says what it sees in each picture, `is_right` whether that is what was named.
    """
    files: list[Path] = []
    named = []
    for row, text in zip(drawn.files, drawn.plain, strict=True):
        match = pattern.search(text)
        if match:
            files += row
            named.append(match[1])
    if not named:
        return []
    seen = look(files)
    scores = []
    for name, some in zip(named, drawn.by_prompt(seen), strict=True):
        right = [is_right(text, name) for text in some]
        scores.append(100 * fmean(right))
    return scores


def _ask(namer: VisionLanguageModel, question: str, files: Sequence[Path]) -> list[str]:
    """Return the model's answers to a question about each picture."""
    queries = [Query(question, image=path) for path in files]
    answers: list[str] = []
    for batch in _batches(queries):
        answers += namer.generate(batch, max_new_tokens=_LONGEST_NAME)
    return answers


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _flat(files: Sequence[Sequence[Path]]) -> list[Path]:
    return [path for row in files for path in row]


def _load(files: Sequence[Path]) -> list[Image.Image]:
    return [load_picture(Picture(path)) for path in files]


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean, n and interval by side, test and score, of lines with `side`, `test`, `subject` and `scores`.

    Scores about a subject count once for the subject (the mean of its prompts), others once for each prompt.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        for name, scores in line["scores"].items():
            key = (line["side"], line["test"], name)
            cell = values.setdefault(key, [])
            if line["subject"]:
                cell.append(fmean(scores))
            else:
                cell += scores
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (side, test, name), cell in values.items():
        by_test = table.setdefault(side, {})
        by_score = by_test.setdefault(test, {})
        by_score[name] = mean_with_interval(cell)
    return table
