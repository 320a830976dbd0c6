"""CounterFact: 21,919 counterfactual facts in text, with paraphrases and neighbours (ROME, Meng et al. 2022).

`multi` is the part that MEMIT edits together: 20,877 facts that do not contradict each other (Meng et al. 2023).
"""

from __future__ import annotations

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
from mmedit_cli.types import EditCase, Query

_KEYS = (
    "requested_rewrite: {prompt, subject, target_new: {str}, target_true: {str}}, "
    "paraphrase_prompts: [...], neighborhood_prompts: [...]"
)


def read_fact(
    record: Json, uid: str, images: Path, template: Template
) -> list[EditCase]:
    """The fact; its paraphrases; and its neighbours: other subjects of which the true answer is true."""
    if not isinstance(record, dict):
        raise Fault("must be an object with keys")
    rewrite = record.get("requested_rewrite")
    texts = check_texts(rewrite, ("prompt", "subject"))
    assert isinstance(rewrite, dict)
    new = check_texts(rewrite.get("target_new"), ("str",))["str"]
    true = check_texts(rewrite.get("target_true"), ("str",))["str"]
    if texts["prompt"].count("{}") != 1:
        raise Fault("requested_rewrite: prompt: needs one {} for its subject")
    question = texts["prompt"].replace("{}", texts["subject"])
    paraphrases = _asked(record, "paraphrase_prompts", new, template)
    neighbours = _asked(record, "neighborhood_prompts", true, template)
    case = EditCase(
        uid,
        request=template.ask("request", question, new, None),
        generality={"text": paraphrases} if paraphrases else {},
        locality={"neighbour": neighbours} if neighbours else {},
        type=str(rewrite.get("relation_id", "")),
    )
    return [case]


def _asked(
    record: Json, key: str, target: str, template: Template
) -> tuple[Query, ...]:
    """Return the questions of a list, all with the same answer."""
    texts = record.get(key, [])
    if not isinstance(texts, list):
        raise Fault(f"{key}: must be a list of texts")
    found = []
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise Fault(f"{key}: must be a list of texts that are not empty")
        question = text.rstrip()
        query = template.ask(
            "request",
            question,
            target,
            None,
        )
        found.append(query)
    return tuple(found)


DATASET = PublishedDataset(
    name="counterfact",
    sources={
        "eval": AnnotationFile("counterfact.json"),
        "multi": AnnotationFile("multi_counterfact.json"),
    },
    templates=COMMON,  # `verbatim` is how ROME asks: the beginning of a sentence
    folders=("counterfact",),
    readers={"eval": read_fact, "multi": read_fact},
    own_keys={"eval": _KEYS, "multi": _KEYS},
)
