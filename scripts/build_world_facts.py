"""Make data/real/world.jsonl and world-tuning.jsonl: facts about countries that an untouched model answers right.

    mmedit download smollm2-135m
    python scripts/build_world_facts.py

Facts are those of EmojiKB about countries. Countries that `facts.jsonl` or `tuning.jsonl` speak of are left out. The
countries, in the order of a digest of their codes, give facts to `world.jsonl` until it has enough; the others are for
choosing hyper-parameters. So are those that editors protect by themselves (`methods/shared/side_effects.py`).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedit_cli import Query, load_backbone
from mmedit_cli.knowledge.evaluation.ability import Probe, measure_ability
from mmedit_cli.knowledge.methods.shared.side_effects import unrelated_questions
from mmedit_cli.registry import share_dir
from mmedit_cli.storage import write_atomic

WORDINGS = {
    "capital": "The capital city of {it} is",
    "continent": "{it} lies on the continent of",
    "country": "The city of {city} is the capital of",
    "currency": "The official currency of {it} is the",
    "language": "The main language of {it} is",
}
DATA = share_dir("data")
ENOUGH = 200
MOST_UNRELATED = 2000  # that an editor of hparams/ asks for


def candidates(known: str) -> Iterator[tuple[str, Query]]:
    """Yield (country, question) for every fact about a country that the text `known` does not speak of."""
    facts = country_facts()
    names = {f["concept"]: f["answer"] for f in facts if f["type"] == "country"}
    for fact in facts:
        country = fact["concept"]
        if names.get(country, "") not in known:
            yield country, Query(worded(fact), fact["answer"])


def protected_countries() -> set[str]:
    """Return the countries that the unrelated questions of editors speak of."""
    questions = unrelated_questions(MOST_UNRELATED)
    said = "\n".join(f"{query.prompt} {query.target}" for query in questions)
    return {f["concept"] for f in country_facts() if f["it"] in said}


def country_facts() -> list[dict[str, Any]]:
    """Return the facts of EmojiKB that a wording is for; `it` is a country in a sentence, or its capital."""
    with gzip.open(DATA / "emojikb" / "facts.jsonl.gz", "rt", encoding="utf-8") as file:
        facts = [json.loads(line) for line in file]
    found = []
    for fact in facts:
        it = fact.get("it", fact.get("city"))
        if fact["type"] in WORDINGS and it:
            found.append({**fact, "it": it})
    return found


def worded(fact: dict[str, Any]) -> str:
    """Return the question of a fact, with a capital letter in front."""
    wording = WORDINGS[fact["type"]]
    text = wording.format(it=fact.get("it"), city=fact.get("city"))
    return text[:1].upper() + text[1:]


def order(country: str) -> str:
    """Return what countries are sorted by."""
    return hashlib.sha256(country.encode()).hexdigest()


def write(path: Path, facts: list[Query]) -> None:
    """Write facts as cases without probes."""
    lines = []
    for number, fact in enumerate(facts, 1):
        request = {"prompt": fact.prompt, "target": fact.target}
        case = {"id": f"{path.stem}-{number}", "request": request}
        lines.append(json.dumps(case, ensure_ascii=False))
    write_atomic(path, "\n".join(lines) + "\n")


def main() -> None:
    """Ask the model and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--to", type=Path, default=DATA / "real")
    options = parser.parse_args()
    texts = [DATA / "real" / name for name in ("facts.jsonl", "tuning.jsonl")]
    protected = protected_countries()
    known = "".join(path.read_text(encoding="utf-8") for path in texts)
    asked = sorted(candidates(known), key=lambda pair: order(pair[0]))
    model = load_backbone(options.model, device="cpu", dtype="float32")
    queries = tuple(query for _, query in asked)
    right = measure_ability(model, Probe("", queries)).right
    kept = [pair for pair, is_right in zip(asked, right, strict=True) if is_right]
    free = [pair for pair in kept if pair[0] not in protected]
    evaluates = free[:ENOUGH]
    countries = {country for country, _ in evaluates}
    tunes = [pair for pair in kept if pair[0] not in countries]
    counts = f"{len(evaluates)} to evaluate, {len(tunes)} to tune"
    print(f"{len(kept)} of {len(queries)} answered right: {counts}")
    write(options.to / "world.jsonl", [query for _, query in evaluates])
    write(options.to / "world-tuning.jsonl", [query for _, query in tunes])


if __name__ == "__main__":
    main()
