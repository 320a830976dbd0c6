"""IKE: the model stays as it is; the new fact stands in front of every question, behind examples of its use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Generator, Tensor

from mmedit_cli.errors import DataError
from mmedit_cli.knowledge.data.shared.files import read_records
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.shared.sentences import sentence_encoder
from mmedit_cli.pictures import Picture, check_picture
from mmedit_cli.registry import share_dir
from mmedit_cli.types import Query

_ROOM = 24  # tokens left for the answer and for what the model puts around a prompt


@dataclass(frozen=True)
class IkeHparams:
    """See hparams/ike.yaml for what each value means and where it comes from."""

    demonstrations: int = 16
    facts: str = "emojikb/train.jsonl.gz"
    encoder: str = "backbone"

    def __post_init__(self) -> None:
        if self.demonstrations < 0:
            raise ValueError(
                f"demonstrations must be at least 0, not {self.demonstrations}"
            )


@dataclass(frozen=True)
class Demonstration:
    """A training fact, and how a question is answered with it in front; `image` is the picture of the fact."""

    fact: str
    example: str
    prompt: str
    target: str
    image: Path | None

    def __str__(self) -> str:
        return f"New Fact: {self.fact}\nPrompt: {self.example}\n\n"


class Ike(Editor):
    """IKE (Zheng et al. 2023), as used for vision-language models (Cheng et al. 2023; UniKE, section 4).

    Every query gets the fact of the edit that is most like it, answer included: what comes out for the request is a
    copy, and reports call this form `copied-answer`. In front stand demonstrations most like that fact, of training
    facts only; as many as the model can read.
    """

    name = "ike"
    Hparams = IkeHparams
    first_layer: ClassVar[None] = None  # the prompt itself changes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encode = sentence_encoder(self.hparams.encoder, self.backbone)
        count, path = self.hparams.demonstrations, Path(self.hparams.facts)
        self._known = (
            read_demonstrations(path if path.exists() else share_dir("data") / path)
            if count
            else []
        )
        self._vectors = (
            self._encode([demo.fact for demo in self._known]) if self._known else None
        )
        self._facts: list[Query] = []
        self._demos: list[
            list[Demonstration]
        ] = []  # of each fact, the most like it last
        self._of_facts: list[Tensor] = []

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        for request in requests:
            if request.image is not None:
                check_picture(request.image)
            self.backbone.encode(request)
        self._add(requests)
        return {
            "form": "copied-answer",
            "demonstrations": [len(demos) for demos in self._demos[-len(requests) :]],
        }

    def _add(self, requests: Sequence[Query]) -> None:
        texts = [_fact(request) for request in requests]
        vectors = self._encode(texts)
        for request, vector in zip(requests, vectors, strict=True):
            self._demos.append(self._nearest(request, vector))
        self._facts += requests
        self._of_facts += list(vectors)
        self.backbone.rewrite = self._with_context

    def _nearest(self, request: Query, vector: Tensor) -> list[Demonstration]:
        """Return the demonstrations most like a fact, the most alike last; none states the fact itself.

        Raises DataError if the facts to learn from hold the very request: then they are not training facts.
        """
        if self._vectors is None:
            return []
        order = (self._vectors @ vector).argsort(descending=True, stable=True).tolist()
        stated = _normal(_fact(request))
        chosen: list[Demonstration] = []
        for demo in (self._known[i] for i in order):
            if _normal(demo.fact) == stated:
                if (
                    demo.image is not None
                    and request.image is not None
                    and demo.image == request.image.resolve()
                ):
                    raise DataError(
                        f"{self.hparams.facts} holds the request {stated!r} itself",
                        "name training facts",
                    )
                continue
            chosen.append(demo)
            if len(chosen) == self.hparams.demonstrations:
                break
        return chosen[::-1]

    def _with_context(self, query: Query) -> Query:
        """Return the query with its context in front, with as many demonstrations as fit, the nearest."""
        asked = self._encode([query.prompt])[0]
        scores = [float(vector @ asked) for vector in self._of_facts]
        best = max(
            range(len(scores)), key=lambda i: (scores[i], i)
        )  # of equals the newest
        own = f"New Fact: {_fact(self._facts[best])}\nPrompt: {query.prompt}"
        tokenizer = self.backbone.tokenizer
        image = (
            0
            if query.image is None
            else self.backbone.n_image_tokens(Picture(query.image, query.background))
        )
        room = (
            self.backbone.max_length
            - image
            - _ROOM
            - len(tokenizer(f"{own} {query.target}").input_ids)
        )
        context = own
        for demo in reversed(self._demos[best]):
            room -= len(tokenizer(str(demo)).input_ids)
            if room < 0:
                break
            context = f"{demo}{context}"
        return replace(query, prompt=context)

    # -- taking back, saving ------------------------------------------------------------------------------------

    def _keep(self, positions: Sequence[int]) -> bool:
        requests = [self._facts[i] for i in positions]
        self._reset()
        if requests:
            self._add(requests)
        return True

    def _reset(self) -> None:
        self._facts, self._demos, self._of_facts = [], [], []
        self.backbone.rewrite = None

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if requests:
            self._add(requests)


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Return what the cases of a file show, in turn: copy the fact, use it for a rewording, leave other facts alone.

    Only its texts are used. Raises DataError naming the line that is no case.
    """
    found: list[Demonstration] = []
    problems: list[str] = []
    for number, (place, case) in enumerate(read_records(path, problems), 1):
        try:
            request = case["request"]
            image = (
                (path.parent / request["image"]).resolve()
                if request.get("image")
                else None
            )
            examples = [request, *case.get("generality", {}).get("text", ())[:1]]
            examples += case.get("locality", {}).get("text", ())[:1]
            example = examples[number % len(examples)]
            shown = f"{example['prompt']} {example['target']}"
            prompt, target = str(request["prompt"]), str(request["target"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place}: no case ({error})", "docs/data.md says what a case is"
            ) from error
        found.append(Demonstration(f"{prompt} {target}", shown, prompt, target, image))
    if problems:
        raise DataError(problems, "facts names a cases.jsonl of training facts")
    return list({(demo.fact, demo.example): demo for demo in found}.values())


def _fact(request: Query) -> str:
    return f"{request.prompt} {request.target}"


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


EDITOR = Ike
