"""zsRE: questions about relations of things, with a rewording each (Levy et al. 2017; as released with MEND, 2022).

`eval` and `train` teach the alternative answer, as MEND and EasyEdit do; records without one are left out. `true`
teaches the true answer, as MEMIT does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmedit_cli.knowledge.data.shared.published import (
    COMMON,
    AnnotationFile,
    Fault,
    Json,
    PublishedDataset,
    Template,
    check_texts,
)
from mmedit_cli.types import EditCase

_EVAL = AnnotationFile("zsre_mend_eval.json")
_KEYS = "src, rephrase, loc, loc_ans"


def read_fact(
    record: Json, uid: str, images: Path, template: Template, *, true: bool
) -> list[EditCase]:
    """The fact, its rewording, and a question of Natural Questions that it must not touch."""
    texts = check_texts(record, ("src", "rephrase", "loc", "loc_ans"))
    if true:
        answers = record.get("answers")
        first = answers[0] if isinstance(answers, list) and answers else None
        target = check_texts({"answers": first}, ("answers",))["answers"]
    else:
        alternative = record.get("alt")
        if not isinstance(alternative, str):
            raise Fault("alt: must be a text")
        if not alternative.strip():
            return []
        target = alternative
    reworded = template.ask("request", texts["rephrase"], target, None)
    other = template.ask("text", texts["loc"], texts["loc_ans"], None)
    case = EditCase(
        uid,
        request=template.ask("request", texts["src"], target, None),
        generality={"text": (reworded,)},
        locality={"text": (other,)},
    )
    return [case]


_alternative = partial(read_fact, true=False)

DATASET = PublishedDataset(
    name="zsre",
    sources={
        "train": AnnotationFile("zsre_mend_train.json"),
        "eval": _EVAL,
        "true": _EVAL,
    },
    templates=COMMON,  # `plain` drops `nq question:` and adds a question mark
    folders=("zsre",),
    readers={
        "train": _alternative,
        "eval": _alternative,
        "true": partial(read_fact, true=True),
    },
    own_keys={
        "train": f"{_KEYS}, alt",
        "eval": f"{_KEYS}, alt",
        "true": f"{_KEYS}, answers: [...]",
    },
)
