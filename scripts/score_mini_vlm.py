"""Measure what a mini model knows of EmojiKB: greedy free answers, a table, scores.json and a model card.

    python scripts/score_mini_vlm.py runs/mini-blip2/mini-blip2                  # everything
    python scripts/score_mini_vlm.py runs/mini-blip2/mini-blip2 --sample 300     # at most 300 questions a figure

`--errors FILE` writes what the model gets wrong about pictures of the first artists, of which build_emojikb.py makes
corrections.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin starve each other on a busy machine

import torch
from mini_vlm_data import DATA, TYPES, EmojiKB, Holdout, lines, load_emojikb, number

from mmedit_cli import runtime
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.data.emojikb_open import EVALUATION
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.storage import write_atomic
from mmedit_cli.types import Query

TARGETS = {
    "name": 0.90,
    "kind": 0.95,
    "category": 0.95,
    "background": 0.97,
    "country": 0.90,
    "capital": 0.85,
    "text": 0.95,
}
LONGEST_ANSWER = 20  # tokens
FAMILIES = {
    "blip2": "BLIP-2 (vision tower, Q-Former, OPT decoder)",
    "llava": "LLaVA (CLIP tower, Llama decoder)",
}
TRAIN = "python scripts/train_mini_vlm.py scripts"
OPEN_COMMANDS = {  # MODEL is the one that a training in the open world starts from
    "blip2": ("scripts/train_open_world.sh FOLDER",),
    "llava": (
        f"{TRAIN}/mini_llava_open.yaml --out run --stage decoder --start-from MODEL "
        "--tower-from tower/tower.safetensors  # of mini-blip2; then --stage joint",
    ),
}
ARTISTS = ("noto", "twemoji", "fluent", "openmoji")  # of the cases
HELD_OUT_WORDS, UNSEEN_WORDS = "held-out words", "unseen words"


@dataclass(frozen=True)
class Item:
    """One question, the figures it counts for, and what it is about."""

    query: Query
    figures: tuple[str, ...]
    type: str
    picture: str = ""


def items(kb: EmojiKB, folder: Path = DATA) -> Iterator[Item]:
    """Yield every question that is measured; wording and background are chosen by a hash of what is asked."""
    facts: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for fact in kb.facts:
        facts[fact["concept"]][fact["type"]] = fact
    for concept, artist in kb.drawings:
        picture = f"{artist}/{concept}.png"
        colour = list(kb.backgrounds)[number("score", picture) % len(kb.backgrounds)]
        known = {**facts[concept], "background": {"answer": colour}}
        for kind, fact in known.items():
            wordings = kb.templates[kind]["image"]
            prompt = wordings[number("wording", kind, picture) % len(wordings)]
            query = Query(
                prompt, fact["answer"], folder / picture, kb.backgrounds[colour]
            )
            yield Item(
                query,
                tuple(_picture_figures(kb.holdout, kind, concept, artist)),
                kind,
                picture,
            )
    for fact in kb.facts:
        if "it" in fact or "city" in fact:
            seen = kb.holdout.allows(fact["concept"])
            figures = (
                ("text", f"text {fact['type']}")
                if seen
                else ("held-out concept: text",)
            )
            for template in kb.templates[fact["type"]]["text"]:
                yield Item(
                    Query(template.format(**fact), fact["answer"]),
                    figures,
                    fact["type"],
                )


def unseen_items(kb: EmojiKB, folder: Path = DATA) -> Iterator[Item]:
    """Yield questions about the drawings of artists for evaluation, and in the wordings that no training has."""
    artists = json.loads((folder / "artists.json").read_text(encoding="utf-8"))
    unseen = {name for name, about in artists.items() if about["use"] == EVALUATION}
    drawn = {r["id"]: r["artists"] for r in lines(folder / "drawings.jsonl.gz")}
    concepts = []
    for concept in kb.concepts:
        theirs = [name for name in drawn.get(concept["id"], ()) if name in unseen]
        if theirs and kb.holdout.allows(concept["id"]):
            concepts.append({**concept, "artists": theirs})
    for item in items(EmojiKB(**{**vars(kb), "concepts": concepts}), folder):
        if item.picture:
            yield replace(item, figures=(f"unseen artist: {item.type}",))
    one_each = [
        {**c, "artists": [c["artists"][number("words", c["id"]) % len(c["artists"])]]}
        for c in kb.concepts
        if kb.holdout.allows(c["id"])
    ]
    wordings = json.loads((folder / "wordings.json").read_text(encoding="utf-8"))
    for side, figure in (("val", HELD_OUT_WORDS), ("eval", UNSEEN_WORDS)):
        templates = {
            kind: {"image": wordings[kind][side], "text": ()} for kind in TYPES
        }
        asked = {**vars(kb), "concepts": one_each, "templates": templates}
        for item in items(EmojiKB(**asked), folder):
            if item.figures[0] == item.type:
                yield replace(item, figures=(figure, f"{figure}: {item.type}"))


def _picture_figures(
    holdout: Holdout, kind: str, concept: str, artist: str
) -> Iterator[str]:
    if not holdout.allows(concept):
        yield f"held-out concept: {kind}"
    elif not holdout.allows(concept, artist):
        yield f"held-out artist: {kind}"
    else:
        yield kind
        if kind == "name":
            yield f"name by {artist}"


def sampled(
    asked: list[Any],
    most: int | None,
    group: Callable[[Any], str] = lambda item: item.figures[0],
    rank: Callable[[Any], int] = lambda item: number(item.picture, item.query.prompt),
) -> list[Any]:
    """Return at most `most` items of each group (of each first figure), those of the lowest rank (a hash)."""
    if most is None:
        return asked
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in sorted(asked, key=rank):
        groups[group(item)].append(item)
    return [item for group in groups.values() for item in group[:most]]


def answer(
    backbone: VisionLanguageModel, asked: list[Item], batch_size: int
) -> list[str]:
    """Return the model's free answers in order; questions of a like length are asked together."""
    order = sorted(
        range(len(asked)),
        key=lambda i: (asked[i].query.image is None, len(asked[i].query.prompt)),
    )
    answers = [""] * len(asked)
    started = time.monotonic()
    # the image tokens of each picture once; the prefixes are not used here
    with backbone.cached_activations(
        0, [asked[i].query for i in order], group=64, budget=1 << 30
    ):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            queries = [asked[i].query for i in part]
            texts = backbone.generate(queries, max_new_tokens=LONGEST_ANSWER)
            for i, text in zip(part, texts, strict=True):
                answers[i] = text
            if start // batch_size % 20 == 0:
                print(
                    f"{start + len(part)}/{len(order)}  {time.monotonic() - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return answers


def figures(
    asked: list[Item], answers: list[str], targets: Mapping[str, float] = TARGETS
) -> dict[str, dict[str, Any]]:
    """Return, by figure, the share of right answers (`value`), the number of questions (`n`) and the `target`."""
    scores: dict[str, list[float]] = defaultdict(list)
    for item, text in zip(asked, answers, strict=True):
        for figure in item.figures:
            scores[figure].append(answer_match(text, item.query.target))
    first = [*TYPES, "text"]
    names = sorted(
        scores, key=lambda f: (first.index(f) if f in first else len(first), f)
    )
    return {
        f: {
            "value": round(sum(scores[f]) / len(scores[f]), 4),
            "n": len(scores[f]),
            "target": targets.get(f),
        }
        for f in names
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    rows = ["| figure | right | target | questions |", "|---|---:|---:|---:|"]
    for name, figure in found.items():
        target = "" if figure["target"] is None else f"{100 * figure['target']:.0f} %"
        rows.append(
            f"| {name} | {100 * figure['value']:.1f} % | {target} | {figure['n']:,} |"
        )
    return "\n".join(rows)


def all_stages(training: dict[str, Any]) -> dict[str, Any]:
    """Return the stages of training.json in their order, those of the model that was started from before them.

    A stage that was trained anew stands once, as it was trained last.
    """
    now = training["stages"]
    before = training.get("started_from")
    earlier = all_stages(before) if before else {}
    return {k: v for k, v in earlier.items() if k not in now} | now


def stages_table(training: dict[str, Any]) -> str:
    """Return how each stage of training went as a Markdown table, from what training.json says."""
    rows = [
        "| stage | passes | pictures seen | minutes | pictures/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, stage in all_stages(training).items():
        passes, rate = (
            f"{stage['passes']:g} of {stage['of']}",
            stage["pictures"] / max(stage["seconds"], 1),
        )
        rows.append(
            f"| {name} | {passes} | {stage['pictures']:,} | {stage['seconds'] / 60:.0f} | {rate:.0f} |"
        )
    return "\n".join(rows)


def commands(family: str, training: dict[str, Any]) -> tuple[str, ...]:
    """Return how a model is made."""
    if "artists" in training:
        return OPEN_COMMANDS[family]
    origin = training["stages"].get("tower", {}).get("origin", "")
    options = f" --tower-from {origin}-run/tower.safetensors" if origin else ""
    return (f"{TRAIN}/mini_{family}.yaml --out FOLDER{options}",)


def card(
    backbone: VisionLanguageModel,
    folder: Path,
    scores: dict[str, Any],
    holdout: Holdout,
) -> str:
    """Return the text of the model card."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    machine, is_open = training["machine"], "artists" in training
    template = "mini_vlm_open_card.md" if is_open else "mini_vlm_card.md"
    size = sum(
        file.stat().st_size for file in folder.iterdir() if file.name != "README.md"
    )
    sample = scores["sample"]
    return Template(
        Path(__file__).with_name(template).read_text(encoding="utf-8")
    ).substitute(
        name=training["name"],
        family=FAMILIES[backbone.family],
        commands="\n".join(
            f"    {line}" for line in commands(backbone.family, training)
        ),
        n_hands=len(training.get("artists", ARTISTS)),
        parameters=f"{training['parameters'] / 1e6:.2f} million",
        megabytes=f"{size / 1e6:.1f}",
        concepts=f"{training['concepts'] - len(holdout.concepts):,}",
        sampled="" if sample is None else f", with at most {sample} questions a figure",
        figures=table(scores["figures"]),
        stages=stages_table(training),
        machine=f"{machine['platform']}, {machine['device_name']}, {machine['threads']} threads",
        n_concepts=len(holdout.concepts),
        n_artists=len(holdout.artists),
    )


def score(
    model: Path,
    *,
    device: str,
    sample: int | None,
    batch_size: int,
    errors: Path | None,
) -> dict[str, Any]:
    """Measure a model folder, write scores.json and README.md into it, and return the scores."""
    backbone = load_backbone(str(model), device=device)
    holdout = Holdout(
        **json.loads((model / "holdout.json").read_text(encoding="utf-8"))
    )
    training = json.loads((model / "training.json").read_text(encoding="utf-8"))
    whole = load_emojikb(None, 0, 0)
    small = training["concepts"] if training["concepts"] < len(whole.concepts) else None
    further = 0 if "artists" in training else None
    kb = load_emojikb(small, 0, 0, further=further)
    kb = EmojiKB(**{**vars(kb), "holdout": holdout})
    asked = list(items(kb))
    if small is None:
        asked += unseen_items(kb)
    asked = sampled(asked, sample)
    started = time.monotonic()
    answers = answer(backbone, asked, batch_size)
    scores = {
        "model": training["name"],
        "protocol": "greedy free generation, answer_match",
        "sample": sample,
        "figures": figures(asked, answers),
        "seconds": round(time.monotonic() - started, 1),
        "versions": runtime.versions(),
    }
    write_atomic(model / "scores.json", json.dumps(scores, indent=1) + "\n")
    write_atomic(model / "README.md", card(backbone, model, scores, holdout))
    if errors is not None:
        wrong = [
            {"picture": item.picture, "type": item.type, "answer": text}
            for item, text in zip(asked, answers, strict=True)
            if item.picture.partition("/")[0] in ARTISTS
            and not item.figures[0].startswith(HELD_OUT_WORDS)
            and not item.figures[0].startswith(UNSEEN_WORDS)
            and item.type != "background"
            and not answer_match(text, item.query.target)
        ]
        write_atomic(errors, "".join(json.dumps(line) + "\n" for line in wrong))
    return scores


def measure_and_print(
    threads: int | None, measure: Callable[[], Any], show: Callable[[Any], str]
) -> int:
    """Measure with as many threads, print what was found, and return the program's exit code."""
    if threads is not None:
        torch.set_num_threads(threads)
    runtime.quiet_libraries()
    try:
        found = measure()
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(show(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="the model folder, as train_mini_vlm.py writes it"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=None,
        metavar="N",
        help="at most N questions a figure",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--errors",
        type=Path,
        default=None,
        help="write wrong answers there: {picture, type, answer}",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(argv)
    options = {
        name: vars(args)[name] for name in ("device", "sample", "batch_size", "errors")
    }
    return measure_and_print(
        args.threads,
        lambda: score(args.model, **options),
        lambda scores: table(scores["figures"]),
    )


if __name__ == "__main__":
    sys.exit(main())
