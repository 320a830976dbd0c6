"""What concept editors do to mini-sd: things drawn as others, and things erased, judged by mini-blip2.

    python scripts/bench/concept_edits.py time uce rece speed
    python scripts/bench/concept_edits.py uce --keep 0 --set pairing=last

Things are chosen by chance among those that the model draws so that the judge names them. Each edit is made alone, and
then all of them at once. Printed is a line of JSON for each method, kind and way:

- efficacy: "a drawing of X" is named as the target, or not as what was erased;
- generality: the same in two other wordings; of what is erased, those where the untouched model is named right;
- specificity: things that no edit and no --keep is about are named as before;
- flat: pictures that are almost of one colour; seconds of an edit, and of all at once.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedit_cli import load_backbone, registry
from mmedit_cli.catalog import bundled
from mmedit_cli.drawing.models.loading import load_stable_diffusion
from mmedit_cli.drawing.models.stable_diffusion import Sampling, StableDiffusion
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.data.emojikb import concepts_in
from mmedit_cli.knowledge.evaluation.metrics import answer_match
from mmedit_cli.storage import temporary_folder
from mmedit_cli.types import ConceptChange, Query

EFFICACY = "a drawing of {}"
GENERALITY = ("a noto drawing of {}", "{} on a yellow background")
QUESTION = "What is this?"
KINDS = ("fact", "erase")
FLAT = 8.0  # standard deviation of the numbers of a picture, of 255
OTHERS = 2  # other things that are drawn for each edit
BATCH = 25

Thing = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A picture to draw, and the thing it should show."""

    column: str
    prompt: str
    name: str


class Painter:
    """Draws prompts with mini-sd and has mini-blip2 say what they show."""

    def __init__(self, model: StableDiffusion, steps: int) -> None:
        self.model = model
        self.sampling = Sampling(steps=steps, batch_size=BATCH)
        self.judge = load_backbone("mini-blip2", device="cpu")
        self.flat = 0
        self.drawn = 0

    def named(self, asked: Sequence[Asked]) -> list[bool]:
        """Return whether each picture is named as it should be."""
        prompts = [one.prompt for one in asked]
        pictures = self.model.generate(prompts, [0] * len(asked), self.sampling)
        self.drawn += len(pictures)
        with temporary_folder() as folder:
            queries = []
            for i, picture in enumerate(pictures):
                self.flat += bool(np.asarray(picture).std() < FLAT)
                file = folder / f"{i}.png"
                picture.save(file)
                queries.append(Query(QUESTION, image=file))
            answers = self.judge.generate(queries, max_new_tokens=12)
        pairs = zip(answers, asked, strict=True)
        return [answer_match(answer, one.name) == 1 for answer, one in pairs]


def things(seed: int) -> list[Thing]:
    """Return the things that mini-sd was taught, in an order of chance."""
    home = registry.emojikb_home()
    listed = json.loads((bundled()["mini-sd"] / "concepts.json").read_text())
    taught = set(listed["taught"])
    found = [thing for thing in concepts_in(home) if thing["id"] in taught]
    found = [thing for thing in found if thing["it"].startswith(("a ", "an "))]
    random.Random(seed).shuffle(found)
    return found


def probes(
    kind: str, source: Thing, target: Thing, others: Sequence[Thing]
) -> list[Asked]:
    """Return what is drawn to judge an edit."""
    wanted = target if kind == "fact" else source
    asked = [Asked("efficacy", EFFICACY.format(source["it"]), wanted["name"])]
    for form in GENERALITY:
        asked.append(Asked("generality", form.format(source["it"]), wanted["name"]))
    for other in others:
        asked.append(Asked("specificity", EFFICACY.format(other["it"]), other["name"]))
    return asked


def shares(
    kind: str, asked: Sequence[Asked], before: Sequence[bool], after: Sequence[bool]
) -> dict[str, Any]:
    """Return the share of each column in percent."""
    counted: dict[str, list[bool]] = {}
    for one, was, now in zip(asked, before, after, strict=True):
        own = one.column != "specificity"
        if (kind == "erase" or not own) and not was:
            continue  # there was nothing to erase, or to keep
        right = not now if kind == "erase" and own else now
        counted.setdefault(one.column, []).append(right)
    return {column: round(100 * sum(of) / len(of), 1) for column, of in counted.items()}


def main() -> None:
    """Print a line for each method, kind and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument(
        "--keep",
        type=int,
        default=20,
        help="things that are kept, none of them drawn here",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of things")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--ways", nargs="+", default=("alone", "at once"))
    args = parser.parse_args()
    model = load_stable_diffusion("mini-sd", device="cpu")
    painter = Painter(model, args.steps)
    candidates = things(args.seed)[: 5 * args.edits + args.keep]
    shown = [
        Asked("", EFFICACY.format(thing["it"]), thing["name"]) for thing in candidates
    ]
    right = painter.named(shown)
    known = [thing for thing, named in zip(candidates, right, strict=True) if named]
    count = args.edits
    sources, targets, rest = known[:count], known[count : 2 * count], known[2 * count :]
    others = rest[: len(rest) // 2][:count]
    keep = tuple(thing["it"] for thing in rest[len(others) :][: args.keep])
    print(
        json.dumps(
            {
                "named": sum(right),
                "of": len(right),
                "others": len(others),
                "kept": len(keep),
            }
        ),
        flush=True,
    )
    for kind in args.kinds:
        measure(painter, args, kind, sources, targets, others, keep)


def measure(
    painter: Painter,
    args: Any,
    kind: str,
    sources: Sequence[Thing],
    targets: Sequence[Thing],
    others: Sequence[Thing],
    keep: tuple[str, ...],
) -> None:
    """Print what each method does to edits of one kind."""
    by_edit = []
    changes = []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        near = [others[(OTHERS * i + k) % len(others)] for k in range(OTHERS)]
        by_edit.append(probes(kind, source, target, near))
        goals = (target["it"],) if kind == "fact" else ()
        changes.append(ConceptChange(source["it"], goals, keep))
    asked = [one for some in by_edit for one in some]
    before = painter.named(asked)
    for method in args.methods:
        cls = registry.concept_editors.get(method)
        file = Path(registry.hparams_file(method))
        hparams = load_hparams(
            file, cls.Hparams, variant="mini-sd", overrides=args.overrides
        )
        for way in args.ways:
            groups = [changes] if way == "at once" else [[change] for change in changes]
            drawn = [asked] if way == "at once" else by_edit
            after = []
            seconds = 0.0
            painter.flat = painter.drawn = 0
            for group, some in zip(groups, drawn, strict=True):
                started = time.perf_counter()
                with cls(painter.model, hparams) as editor:
                    editor.edit(group)
                    seconds += time.perf_counter() - started
                    after += painter.named(some)
            line = {
                "method": method,
                "kind": kind,
                "way": way,
                **shares(kind, asked, before, after),
            }
            line |= {
                "flat": painter.flat,
                "pictures": painter.drawn,
                "seconds": round(seconds / len(groups), 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
