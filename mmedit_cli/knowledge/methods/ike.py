"""IKE: the model is not changed. Examples and the new fact are put in front of every question."""

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

    Every query gets the fact of the edit that is most similar to it, with its answer. So the answer to a request is a
    copy; reports call this form `copied-answer`. The demonstrations most similar to that fact stand in front of it, as
    many as the model can read. They are training facts.
    """

    name = "ike"
    encoder_decoder = True
    Hparams = IkeHparams
    hparams: IkeHparams
    first_layer: ClassVar[None] = None  # the prompt itself changes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encode = sentence_encoder(self.hparams.encoder, self.backbone)
        self._known: list[Demonstration] = []
        self._vectors: Tensor | None = None
        if self.hparams.demonstrations:
            path = Path(self.hparams.facts)
            if not path.exists():
                path = share_dir("data") / path
            self._known = read_demonstrations(path)
        if self._known:
            facts = [demo.fact for demo in self._known]
            self._vectors = self._encode(facts)
        self._facts: list[Query] = []
        # of each fact, the most similar last
        self._demos: list[list[Demonstration]] = []
        self._of_facts: list[Tensor] = []

    # -- editing ------------------------------------------------------------------------------------------------

    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        for request in requests:
            if request.image is not None:
                check_picture(request.image)
            self.backbone.encode(request)
        self._add(requests)
        count = len(requests)
        added = self._demos[-count:]
        counts = [len(demos) for demos in added]
        return {"form": "copied-answer", "demonstrations": counts}

    def _add(self, requests: Sequence[Query]) -> None:
        texts = [_fact(request) for request in requests]
        vectors = self._encode(texts)
        for request, vector in zip(requests, vectors, strict=True):
            self._demos.append(self._nearest(request, vector))
        self._facts += requests
        self._of_facts += list(vectors)
        self.backbone.rewrite = self._with_context

    def _nearest(self, request: Query, vector: Tensor) -> list[Demonstration]:
        """Return the demonstrations most similar to a fact, the most similar last; none states the fact itself.

        Raises DataError if the request itself is among the facts: then they are not training facts.
        """
        if self._vectors is None:
            return []
        similarity = self._vectors @ vector
        order = similarity.argsort(descending=True, stable=True)
        stated = _normal(_fact(request))
        chosen: list[Demonstration] = []
        for i in order.tolist():
            demo = self._known[i]
            if _normal(demo.fact) == stated:
                if _same_image(demo, request):
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
        """Return the query with its context in front: as many of the nearest demonstrations as fit, and the fact."""
        asked = self._encode([query.prompt])[0]
        scores = [float(vector @ asked) for vector in self._of_facts]
        best = max(
            range(len(scores)),
            key=lambda i: (scores[i], i),  # of equals the newest
        )
        fact = _fact(self._facts[best])
        own = f"New Fact: {fact}\nPrompt: {query.prompt}"
        room = self.backbone.max_length - _ROOM
        room -= self._image_tokens(query)
        room -= self._tokens(f"{own} {query.target}")
        context = own
        for demo in reversed(self._demos[best]):
            room -= self._tokens(str(demo))
            if room < 0:
                break
            context = f"{demo}{context}"
        return replace(query, prompt=context)

    def _tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.backbone.tokenizer(text).input_ids)

    def _image_tokens(self, query: Query) -> int:
        """Return the number of tokens of the picture of a query."""
        if query.image is None:
            return 0
        picture = Picture(query.image, query.background)
        return self.backbone.n_image_tokens(picture)

    # -- taking back, saving ------------------------------------------------------------------------------------

    def _keep(self, positions: Sequence[int]) -> bool:
        requests = [self._facts[i] for i in positions]
        self._reset()
        self._add(requests)
        return True

    def _reset(self) -> None:
        self._facts = []
        self._demos = []
        self._of_facts = []
        self.backbone.rewrite = None

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        if requests:
            self._add(requests)


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Return a demonstration for each case of a file; in turn it copies the fact, rewords it, or asks something else.

    Only the texts of the cases are used. Raises DataError with the line that is not a case.
    """
    found: list[Demonstration] = []
    problems: list[str] = []
    for number, (place, case) in enumerate(read_records(path, problems), 1):
        try:
            request = case["request"]
            image = None
            if request.get("image"):
                image = (path.parent / request["image"]).resolve()
            rewordings = case.get("generality", {}).get("text", ())
            others = case.get("locality", {}).get("text", ())
            examples = [request, *rewordings[:1], *others[:1]]
            example = examples[number % len(examples)]
            shown = f"{example['prompt']} {example['target']}"
            prompt = str(request["prompt"])
            target = str(request["target"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place}: no case ({error})", "docs/data.md says what a case is"
            ) from error
        found.append(
            Demonstration(
                f"{prompt} {target}",
                shown,
                prompt,
                target,
                image,
            )
        )
    if problems:
        raise DataError(problems, "facts names a cases.jsonl of training facts")
    distinct = {(demo.fact, demo.example): demo for demo in found}
    return list(distinct.values())


def _same_image(demo: Demonstration, request: Query) -> bool:
    if demo.image is None or request.image is None:
        return False
    return demo.image == request.image.resolve()


def _fact(request: Query) -> str:
    return f"{request.prompt} {request.target}"


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


EDITOR = Ike
