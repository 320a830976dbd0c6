"""The open world of EmojiKB: its cases asked about other artists' drawings, in other words, on changed pictures.

On the eval side these are artists and words that nobody trained on. The `needs` of these columns are the same
questions with the true answers: so the report tells apart what the editor and what the untouched model does not
understand. The training sides have the artists and words that training may see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.shared.audit import Finding
from mmedit_cli.picture_changes import (
    CHANGES,
    GROUNDS,
    MIRRORED,
    VERSION,
    changed,
    choose,
    seed_of,
)
from mmedit_cli.pictures import Picture, picture_digest, png
from mmedit_cli.reading import PACKED, read_json_lines, read_json_object
from mmedit_cli.registry import cache_dir, share_dir
from mmedit_cli.storage import sha256_of, write_atomic
from mmedit_cli.types import EditCase, Query

EVALUATION, TRAINING = "evaluation", "training"  # what `artists.json` says of an artist
UNSEEN_ARTIST, UNSEEN_WORDS = "unseen artist", "unseen words"
CHANGED_PICTURE = "changed picture"
FURTHER_ARTIST, FURTHER_WORDS = "further artist", "further words"
TRAIN, VAL, EVAL = "train", "val", "eval"  # sides
_WORDINGS_EACH = 6  # of a case for training, of which a step draws one
_BACKGROUND = "background"  # the type that asks what lies behind the drawing
_MIRRORING_CHANGES = {"flags", "symbols"}  # categories
_FRAMES = "frames"  # of `wordings.json`: what is said around a question
_FAMILIAR = 10  # the first wordings for evaluation; the others share no word with those of training

# Words that say nothing about what is asked: articles, pronouns, question words, forms of to be, do, have and of the
# modal verbs, prepositions, conjunctions, small adverbs. Whatever is not here is a content word.
_FUNCTION_WORDS = """
a an the this that these those it its it's is are was were be been am do does did doing has have had having
can could would will might may should shall must i me my we us our you your he his she her they them their one
ones what which who whose whom where when how why what's of in on at to by with from for as into under about
than or and but not no if so such any else please there here now only just other another all more most very
also too up out
"""
FUNCTION_WORDS = frozenset(re.findall(r"[a-z']+", _FUNCTION_WORDS))

Json = dict[str, Any]


@dataclass(frozen=True)
class OpenWorld:
    """What a side of the data may use besides its cases, and the truth about each concept."""

    folder: Path
    side: str
    concepts: Mapping[str, Json]
    colours: Mapping[str, str]  # name by #rrggbb
    artists: Mapping[str, tuple[str, ...]]  # by concept
    wordings: Mapping[str, tuple[str, ...]]  # by type

    @classmethod
    def read(cls, folder: Path, side: str = EVAL) -> OpenWorld:
        """Read the files of EmojiKB; raise DataError if one is not there or is malformed."""
        uses = artist_uses(folder)
        use = EVALUATION if side == EVAL else TRAINING
        concepts = {r.text("id"): r.values for r in _lines(folder, "concepts")}
        drawn = {
            record.text("id"): tuple(
                artist for artist in record.array("artists", str) if uses[artist] == use
            )
            for record in _lines(folder, "drawings")
        }
        backgrounds = read_json_object(folder / "backgrounds.json").values
        colours = {colour: name for name, colour in backgrounds.items()}
        wordings = {
            kind: tuple(sides[side]) for kind, sides in _types(all_wordings(folder))
        }
        return cls(folder, side, concepts, colours, drawn, wordings)

    def opened(self, case: EditCase) -> EditCase:
        """Return a case with the columns of the open world."""
        columns = self._unseen(case) if self.side == EVAL else self._further(case)
        filled = {name: queries for name, queries in columns.items() if queries}
        needs = {}
        if self.side == EVAL:
            truth = self._truth(case)
            for name, (query,) in filled.items():
                needs[name] = (replace(query, target=truth),)
        return replace(
            case,
            generality={**case.generality, **filled},
            needs={**case.needs, **needs},
        )

    def _unseen(self, case: EditCase) -> dict[str, tuple[Query, ...]]:
        """Return the columns of evaluation: one question each."""
        concept = self._concept(case)["id"]
        artists = self.artists.get(concept, ())
        drawn: tuple[Query, ...] = ()
        if artists:
            artist = choose(artists, UNSEEN_ARTIST, case.uid)
            drawn = (self._drawn_by(case, artist),)
        prompt = choose(self.wordings[case.type], UNSEEN_WORDS, case.uid)
        worded = replace(case.request, prompt=prompt)
        return {
            UNSEEN_ARTIST: drawn,
            UNSEEN_WORDS: (worded,),
            CHANGED_PICTURE: (self._changed(case),),
        }

    def _further(self, case: EditCase) -> dict[str, tuple[Query, ...]]:
        """Return the columns of training: every artist that the case does not have, some of the words."""
        concept = self._concept(case)["id"]
        artists = self.artists.get(concept, ())
        drawn = [self._drawn_by(case, artist) for artist in artists]
        wordings = self.wordings[case.type]
        first = seed_of(FURTHER_WORDS, case.uid) % len(wordings)
        turned = wordings[first:] + wordings[:first]
        prompts = turned[:_WORDINGS_EACH]
        worded = [replace(case.request, prompt=prompt) for prompt in prompts]
        return {
            FURTHER_ARTIST: tuple(drawn),
            FURTHER_WORDS: tuple(worded),
            CHANGED_PICTURE: (self._changed(case),),
        }

    def _concept(self, case: EditCase) -> Json:
        assert case.request.image is not None
        return self.concepts[case.request.image.stem]

    def _truth(self, case: EditCase) -> str:
        if case.type == _BACKGROUND:
            return self.colours[case.request.background]
        return str(self._concept(case)[case.type])

    def _drawn_by(self, case: EditCase, artist: str) -> Query:
        """Return the question about the thing as another artist draws it."""
        # on a background of the other artists' drawings: these never are the answer of another edit
        others = case.generality.get("image", (case.request,))
        grounds = tuple(query.background for query in others)
        ground = choose(grounds, "ground", case.uid)
        image = self.folder / artist / f"{self._concept(case)['id']}.png"
        return replace(case.request, image=image, background=ground)

    def _changed(self, case: EditCase) -> Query:
        """Return the question about the request's picture after one change, made as a file where it is missing."""
        image = case.request.image
        assert image is not None, case.uid
        change = choose(self._changes(case), CHANGED_PICTURE, case.uid)
        picture = Picture(image, case.request.background)
        digest = picture_digest(image)
        key = (VERSION, digest, picture.background, change, case.uid)
        folder = cache_dir() / "emojikb-changed"
        path = folder / f"{image.stem}-{seed_of(*key):016x}.png"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            seed = seed_of(CHANGED_PICTURE, case.uid)
            done = changed(picture, change, seed)
            write_atomic(path, png(done))
        return replace(case.request, image=path, background="#ffffff")

    def _changes(self, case: EditCase) -> tuple[str, ...]:
        """Return the changes that leave the answer as it is."""
        kept = set(CHANGES)
        if case.type == _BACKGROUND:
            kept -= set(GROUNDS)
        if self._concept(case)["category"] in _MIRRORING_CHANGES:
            kept -= set(MIRRORED)
        return tuple(change for change in CHANGES if change in kept)


def artist_uses(folder: Path) -> dict[str, str]:
    """Return what each artist's drawings may be used for: `training` or `evaluation`."""
    records = read_json_object(folder / "artists.json")
    return {name: records.record(name).text("use") for name in records.values}


def all_wordings(folder: Path) -> Json:
    """Return the further wordings by type and side, and the frames around questions."""
    return read_json_object(folder / "wordings.json").values


def content_words(text: str) -> set[str]:
    """Return the words of a text that say what is asked, in lower case and without a possessive."""
    plain = text.lower().replace("’", "'")
    words = set(re.findall(r"[a-z']+", plain))
    telling = words - FUNCTION_WORDS
    stems = {word.removesuffix("'s") for word in telling}
    return stems - FUNCTION_WORDS


def findings(folder: Path) -> Iterator[Finding]:
    """Say what training and evaluation of the open world share: nothing, or each artist, wording and picture."""
    uses = artist_uses(folder)
    unseen = sorted(name for name, use in uses.items() if use == EVALUATION)
    shown = ", ".join(f"{name} {len(_pictures(folder, name)):,}" for name in unseen)
    faults = [*_shown_in_cases(folder, unseen), *_equal_pictures(folder, uses)]
    yield "artists for evaluation", None, shown
    yield "their pictures in training", not faults, "; ".join(faults) or "none"
    wordings = all_wordings(folder)
    trained = list(_trained_wordings(folder, wordings))
    faults = list(_shared_wordings(wordings, trained))
    count = sum(len(sides["eval"]) for _, sides in _types(wordings))
    yield "wordings for evaluation", None, f"{count:,}"
    yield "these in training", not faults, "; ".join(faults) or "none"
    faults = list(_wordings_in_new_words(wordings, trained))
    told = f"{_FAMILIAR} of each type share no content word with training"
    yield "in words that are new", not faults, "; ".join(faults) or told
    for side in (TRAIN, VAL):
        yield _added(folder, side, unseen, wordings)
    for name, record in _trained_models():
        faults = [artist for artist in record.get("artists", ()) if artist in unseen]
        asked = [
            text for texts in record.get("wordings", {}).values() for text in texts
        ]
        faults += list(_shared_wordings(wordings, asked))
        told = (
            "the artists and wordings for training"
            if "artists" in record
            else "the artists of the cases and their four wordings"
        )
        yield f"{name} was trained on", not faults, "; ".join(faults) or told


def _added(folder: Path, side: str, unseen: Sequence[str], wordings: Json) -> Finding:
    """Say which artists and how many wordings a side for training has besides its cases."""
    world = OpenWorld.read(folder, side)
    drawn: set[str] = set()
    for names in world.artists.values():
        drawn.update(names)
    asked: list[str] = []
    for texts in world.wordings.values():
        asked += texts
    faults = sorted(drawn & set(unseen))
    faults += _shared_wordings(wordings, asked)
    artists = ", ".join(sorted(drawn))
    told = f"{artists}; {len(asked):,} wordings"
    return f"open-{side} adds", not faults, "; ".join(faults) or told


def _types(wordings: Json) -> list[tuple[str, Json]]:
    return [(kind, sides) for kind, sides in wordings.items() if kind != _FRAMES]


def _pictures(folder: Path, artist: str) -> list[Path]:
    return sorted((folder / artist).glob("*.png"))


def _shown_in_cases(folder: Path, unseen: Iterable[str]) -> Iterator[str]:
    """Name the case files that show a picture of an artist for evaluation."""
    names = set(unseen)
    for path in sorted(folder.glob(f"*.jsonl{PACKED}")):
        shown: set[str] = set()
        for record in read_json_lines(path):
            shown.update(_IMAGE.findall(str(record.values)))
        for artist in sorted(shown & names):
            yield f"{path.name} shows {artist}"


_IMAGE = re.compile(r"'image': '([^/']+)/")


def _equal_pictures(folder: Path, uses: Mapping[str, str]) -> Iterator[str]:
    """Name the pictures for evaluation that an artist for training has too, byte for byte."""
    trained = {
        sha256_of(path): path
        for artist, use in uses.items()
        if use == TRAINING
        for path in _pictures(folder, artist)
    }
    for artist, use in uses.items():
        for path in _pictures(folder, artist) if use == EVALUATION else ():
            same = trained.get(sha256_of(path))
            if same is not None:
                theirs, ours = (p.relative_to(folder).as_posix() for p in (same, path))
                yield f"{ours} is {theirs}"


def _trained_wordings(folder: Path, wordings: Json) -> Iterator[str]:
    """Yield every wording that training or the choice of a checkpoint may use: templates, wordings, frames."""
    for forms in read_json_object(folder / "templates.json").values.values():
        for texts in forms.values():
            yield from (re.sub(r"\{\w+\}", " ", text) for text in texts)
    for sides in wordings.values():
        for side in ("train", "val"):
            yield from (text.replace("{}", " ") for text in sides.get(side, ()))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _shared_wordings(wordings: Json, trained: Iterable[str]) -> Iterator[str]:
    """Name the wordings for evaluation that training has too, marks and capitals aside."""
    known = {_plain(text) for text in trained}
    for kind, sides in _types(wordings):
        for text in sides["eval"]:
            if _plain(text) in known:
                yield f"{kind}: {text!r}"


def _wordings_in_new_words(wordings: Json, trained: Iterable[str]) -> Iterator[str]:
    """Name the wordings that should be in new words and share a content word with one of training."""
    known: set[str] = set()
    for text in trained:
        known |= content_words(text)
    for kind, sides in _types(wordings):
        for text in sides["eval"][_FAMILIAR:]:
            shared = sorted(content_words(text) & known)
            if shared:
                yield f"{kind}: {text!r} has {', '.join(shared)}"


def _trained_models() -> Iterator[tuple[str, Json]]:
    """Yield the models that come along, with what they say about their training."""
    for path in sorted((share_dir("data") / "models").glob("*/training.json")):
        yield path.parent.name, read_json_object(path).values


def records_file(folder: Path, name: str) -> Path:
    """Return a file of records of EmojiKB; raise DataError if it is not there."""
    path = folder / f"{name}.jsonl{PACKED}"
    if not path.is_file():
        raise DataError(
            f"{path}: not there", "the data come along with mmedit: install it again"
        )
    return path


def _lines(folder: Path, name: str) -> Iterator[Any]:
    return read_json_lines(records_file(folder, name))
