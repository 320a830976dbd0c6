"""VLKEB: 3,174 edits of which entity a photo shows, 5,000 to train on, and questions one to four hops away.

`eval` has no portability. `onehop` and `multihop` ask about the edited picture what follows from the edit.
`onehop-edits` makes, after each edit of a picture, a second one of the fact that the hop needs, in text alone; with
`--sequential 2` (or any even number) the hop is asked when both are made (VLKEB, branch edit_onehop). `text` teaches
the text-only facts that the locality of `eval` asks: they suit a language model, and need no pictures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmedit_cli.knowledge.data.shared.published import (
    COMMON,
    TEXT,
    TEXT_KEYS,
    AnnotationFile,
    Fault,
    Json,
    PublishedDataset,
    Template,
    check_texts,
    one_case,
    read_case,
    text_fact,
)
from mmedit_cli.types import EditCase, Query

ONEHOP = AnnotationFile(
    "eval_edit_onehop.json",
    1278,
    "f32256e7c317d5a18c9fe480f3d373050303e93aeaedeef9c9b4afb5c024a670",
)
EVAL = AnnotationFile(
    "eval.json",
    3174,
    "72c47efe00773bb16cd83258aff394a0894b8c29a6b02e6250717a30d1b18f13",
)


def _hops(record: Json) -> list[Json]:
    hops = record.get("port_new")
    if not isinstance(hops, list) or not all(isinstance(hop, dict) for hop in hops):
        raise Fault("port_new: must be a list of objects")
    return hops


def one_hop(record: Json, uid: str, images: Path, template: Template) -> list[EditCase]:
    """The edit of the picture, and the question one hop away."""
    case = read_case(record, uid, images, template)
    image = case.request.image
    queries = []
    for hop in _hops(record):
        texts = check_texts(hop, ("port_q", "port_a"))
        query = template.ask(
            "request",
            texts["port_q"],
            texts["port_a"],
            image,
        )
        queries.append(query)
    if not queries:
        return [case]
    return [replace(case, portability={"1-hop": tuple(queries)})]


def one_hop_edits(
    record: Json, uid: str, images: Path, template: Template
) -> list[EditCase]:
    """The edit of the picture, then the facts that the hop needs: both are edited before it is asked."""
    facts: list[EditCase] = []
    for hop in _hops(record):
        texts = check_texts(hop, ("port_edit_q", "port_edit_a"))
        question = texts["port_edit_q"]
        answer = texts["port_edit_a"]
        request = template.ask("request", question, answer, None)
        fact = EditCase(
            f"{uid}-fact{len(facts)}",
            request,
            type="fact",
        )
        facts.append(fact)
    return [*one_hop(record, uid, images, template), *facts]


def multi_hop(
    record: Json, uid: str, images: Path, template: Template
) -> list[EditCase]:
    """The edit of the picture, and questions by their number of hops; a record without any is a case without them."""
    if "port_new" not in record:
        return one_case(record, uid, images, template)
    case = read_case(record, uid, images, template)
    image = case.request.image
    portability: dict[str, tuple[Query, ...]] = {}
    for hop in _hops(record):
        kind = check_texts(hop, ("port_type",))["port_type"]
        texts = check_texts(hop.get("Q&A"), ("Question", "Answer"))
        question = texts["Question"]
        query = template.ask("request", question, texts["Answer"], image)
        earlier = portability.get(kind, ())
        portability[kind] = (*earlier, query)
    return [replace(case, portability=portability)]


DATASET = PublishedDataset(
    name="vlkeb",
    group="vlkeb",
    sources={
        "train": AnnotationFile(
            "train.json",
            5000,
            "6e40e0e9a28dc3e7523f8d48f032755fe050c5b5728344633f13113dbd6fbc01",
        ),
        "eval": EVAL,
        TEXT: EVAL,
        "onehop": ONEHOP,
        "onehop-edits": ONEHOP,
        "multihop": AnnotationFile("eval_multihop.json"),
    },
    more_keys={
        "onehop": "port_new: [{port_q, port_a}]",
        "onehop-edits": "port_new: [{port_q, port_a, port_edit_q, port_edit_a}]",
        "multihop": "port_new: [{port_type, Q&A: {Question, Answer}}]",
    },
    own_keys={TEXT: TEXT_KEYS},
    readers={
        TEXT: text_fact,
        "onehop": one_hop,
        "onehop-edits": one_hop_edits,
        "multihop": multi_hop,
    },
    templates={
        # LiveEdit (CVPR 2025), evaluation code
        "liveedit": Template("{}", "{}?", "{} The answer is:"),
        **COMMON,  # `verbatim` is how VLKEB itself asks
    },
    folders=("VLKEB",),
    image_folders=("VLKEB_images", "mmkb_images", "images"),
    image_example="m.010bnr/google_13.jpg",
    chained=("onehop-edits",),
)
