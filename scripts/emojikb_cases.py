"""Turn EmojiKB's concepts into cases: who is on which side, what is edited, what is only probed.

The sides (train, val, eval) share no concept. On each side a fifth of the concepts is never edited: near, far and
text-only locality is asked of those alone, so that no probe is spoilt by another edit of the same stream. For the same
reason the relations edited on one concept are chosen so that what a case asks beside its own edit stays true.
All choices are drawn from SHA-256 of what is chosen for, so that nothing depends on order or on a random generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from emojikb_choices import BACKGROUNDS, TEMPLATES

SPLITS = {"train": 0.42, "val": 0.08, "eval": 0.50}
COPIES = {
    "train": 3,
    "val": 2,
    "eval": 1,
}  # requests per edited relation, each on another artist's drawing
PROBED = 0.22  # share of a side's concepts that is probed, never edited
PLANS = {  # what is edited on one concept; share of the concepts
    "thing": {
        ("name", "kind", "category"): 0.35,
        ("name", "kind", "background"): 0.20,
        ("kind", "category", "background"): 0.20,
        (
            "rename",
            "background",
        ): 0.25,  # a name of another kind: its kind can be asked one hop away
    },
    "flag": {
        ("country",): 0.20,
        ("country", "background"): 0.25,
        ("capital", "continent", "currency", "language"): 0.55,
    },
}
FACTS = ("capital", "continent", "currency", "language")
SMALL_WORDS = {
    "a",
    "an",
    "and",
    "in",
    "its",
    "of",
    "on",
    "or",
    "the",
    "with",
    "person",
    "face",
    "hand",
    "sign",
}


def number(*key: object) -> int:
    return int.from_bytes(
        hashlib.sha256("|".join(map(str, key)).encode()).digest()[:8], "big"
    )


def pick(items: Iterable, count: int, *key: object) -> list:
    pool, taken = list(items), []
    for turn in range(min(count, len(pool))):
        taken.append(pool.pop(number(*key, turn) % len(pool)))
    return taken


def deal(items: Sequence[dict], shares: dict, counts: Counter) -> dict[str, object]:
    """Give every item one of `shares`, always the one that lags furthest behind; returns id -> share."""
    dealt = {}
    for item in items:
        total = sum(counts.values()) + 1
        name = max(shares, key=lambda n: (shares[n] * total - counts[n], str(n)))
        counts[name] += 1
        dealt[item["id"]] = name
    return dealt


def group(concept: dict) -> str:
    return f"flag {concept['continent']}" if "country" in concept else concept["kind"]


def assign(concepts: list[dict]) -> None:
    """Add `split` and `role` (edit or probe): even within every kind, and within every continent for flags."""
    groups = defaultdict(list)
    for concept in sorted(concepts, key=lambda c: number("split", c["id"])):
        groups[group(concept)].append(concept)
    for name, members in sorted(groups.items()):
        side = deal(members, SPLITS, Counter())
        for split in SPLITS:
            mine = [c for c in members if side[c["id"]] == split]
            probes = max(round(PROBED * len(mine)), int(len(mine) > 2))
            chosen = {c["id"] for c in pick(mine, probes, "probe", name, split)}
            for concept in mine:
                concept["split"], concept["role"] = (
                    split,
                    "probe" if concept["id"] in chosen else "edit",
                )


def fact(concept: dict, relation: str) -> dict:
    return {"concept": concept["id"], "type": relation, "answer": concept[relation]}


def plural(concept: dict) -> bool:
    """Names that take no article and end in -s are plurals here ("jeans"), but for two people."""
    return (
        concept["it"] == concept["name"]
        and concept["it"].endswith("s")
        and not concept["it"].endswith("Claus")
    )


def facts(concepts: list[dict]) -> list[dict]:
    """What there is to know: one line per concept and relation, with what fills the text-only templates."""
    lines = []
    for concept in concepts:
        lines.append(fact(concept, "name"))
        for relation in ("kind", "category"):
            many = plural(concept)
            lines.append(
                {
                    **fact(concept, relation),
                    "it": concept["it"],
                    "is": "are" if many else "is",
                    "does": "do" if many else "does",
                }
            )
        if "country" in concept:
            lines.append(
                fact(concept, "country")
                | ({"city": concept["capital"]} if concept["capital"] else {})
            )
            lines += [
                {**fact(concept, r), "it": concept["country_it"]}
                for r in FACTS
                if concept[r]
            ]
    return lines


def words(text: str) -> set[str]:
    return set(text.lower().replace("-", " ").replace("'s", "").split()) - SMALL_WORDS


def apart(new: str, old: str) -> bool:
    """No shared word: `rabbit` is no fair counterfactual for `white rabbit`."""
    return not words(new) & words(old)


class Maker:
    """The cases of one side."""

    def __init__(self, concepts: list[dict], split: str) -> None:
        self.split = split
        self.mine = [c for c in concepts if c["split"] == split]
        self.edited = [c for c in self.mine if c["role"] == "edit"]
        self.probes = [c for c in self.mine if c["role"] == "probe"]
        self.category_of = {
            c["kind"]: c["category"] for c in concepts if c["category"] != "flags"
        }
        shuffled = sorted(self.edited, key=lambda c: number("plan", c["id"]))
        self.plan: dict[str, tuple[str, ...]] = {}
        for family, shares in PLANS.items():
            members = [c for c in shuffled if ("country" in c) == (family == "flag")]
            self.plan |= deal(members, shares, Counter())

    # ------------------------------------------------------------------------------------------ queries

    def colour(self, concept: dict, *key: object) -> str:
        """A background; never the one on which this concept's background is edited."""
        taken = self.edited_colour(concept)
        return pick(
            [b for b in BACKGROUNDS if b != taken], 1, "colour", concept["id"], *key
        )[0]

    def edited_colour(self, concept: dict) -> str | None:
        plan = self.plan.get(concept["id"], ())
        return (
            pick(BACKGROUNDS, 1, "edited colour", concept["id"])[0]
            if "background" in plan
            else None
        )

    def query(
        self, prompt: str, target: str, concept: dict, artist: str, colour: str
    ) -> dict:
        return {
            "prompt": prompt,
            "target": target,
            "image": f"{artist}/{concept['id']}.png",
            "background": BACKGROUNDS[colour],
        }

    def truth(self, concept: dict, relation: str, colour: str) -> str | None:
        return colour if relation == "background" else concept.get(relation)

    def ask(
        self, relation: str, concept: dict, artist: str, colour: str, turn: int = 0
    ) -> dict:
        truth = self.truth(concept, relation, colour)
        assert truth, (relation, concept)
        return self.query(
            TEMPLATES[relation]["image"][turn], truth, concept, artist, colour
        )

    # ------------------------------------------------------------------------------------------ counterfactual targets

    def target(
        self, concept: dict, edit: str, colour: str
    ) -> tuple[str, dict | None] | None:
        """The new answer, and the concept it names where there is one. None if there is nothing plausible."""
        key = ("target", self.split, edit, concept["id"])
        if edit == "background":
            return pick([b for b in BACKGROUNDS if b != colour], 1, *key)[0], None
        if edit == "kind":
            kinds = sorted(self.category_of)
            near = [
                k
                for k in kinds
                if self.category_of[k] == concept["category"] and k != concept["kind"]
            ]
            return pick(near or [k for k in kinds if k != concept["kind"]], 1, *key)[
                0
            ], None
        if edit == "category":
            return pick(
                sorted(set(self.category_of.values()) - {concept["category"]}), 1, *key
            )[0], None
        if edit in ("name", "rename", "country"):
            found = self.other_concept(concept, edit, key)
            return (
                (found["country" if edit == "country" else "name"], found)
                if found
                else None
            )
        if not concept[edit]:
            return None
        others = [
            c
            for c in self.mine
            if c.get(edit) and c["continent"] and apart(c[edit], concept[edit])
        ]
        near = [c for c in others if c["continent"] == concept["continent"]]
        pool = near if near and edit != "continent" else others
        values = sorted({c[edit] for c in pool} - {concept["country"]})
        return (pick(values, 1, *key)[0], None) if values else None

    def other_concept(self, concept: dict, edit: str, key: tuple) -> dict | None:
        """A concept of the same side to name instead; where a hop will follow, one whose own facts are not edited."""
        if edit == "country":
            pool = [
                c
                for c in self.mine
                if "country" in c
                and "capital" not in self.plan.get(c["id"], ())
                and apart(c["country"], concept["country"])
            ]
            near = [c for c in pool if c["continent"] == concept["continent"]]
        elif edit == "rename":
            pool = [
                c
                for c in self.mine
                if "country" not in c
                and c["kind"] != concept["kind"]
                and not {"kind", "category"} & set(self.plan.get(c["id"], ()))
                and apart(c["name"], concept["name"])
            ]
            near = [c for c in pool if c["category"] == concept["category"]] or pool
        else:
            pool = [
                c
                for c in self.mine
                if c["category"] == concept["category"]
                and "country" not in c
                and apart(c["name"], concept["name"])
            ]
            near = [c for c in pool if c["kind"] == concept["kind"]]
            near = [
                c for c in near if c["role"] == "edit"
            ] or near  # leave the probes to be asked beside it
        near = [c for c in near if c["id"] != concept["id"]] or [
            c for c in pool if c["id"] != concept["id"]
        ]
        return pick(sorted(near, key=lambda c: c["id"]), 1, *key)[0] if near else None

    # ------------------------------------------------------------------------------------------ locality, portability

    def others(self, concept: dict, relation: str, near: bool, new: str) -> list[dict]:
        """Probe concepts of the same kind (near) or of another category (far) whose true answer is not the new one."""
        flag = "country" in concept
        things = [c for c in self.probes if ("country" in c) == flag]
        if near and flag:
            pools = [
                [c for c in things if c["continent"] == concept["continent"]],
                things,
            ]
        elif near:
            pools = [
                [c for c in things if c[level] == concept[level]]
                for level in ("kind", "category")
            ] + [things]
        elif relation in FACTS or relation == "country":
            pools = [[c for c in things if c["continent"] != concept["continent"]]]
        else:
            pools = [
                [
                    c
                    for c in self.probes
                    if c["category"] != concept["category"] and "country" not in c
                ]
            ]
        fair = (
            [c for c in pool if self.truth(c, relation, "any") not in (None, new)]
            for pool in pools
        )
        return next(filter(None, fair), [])

    def locality(
        self, concept: dict, edit: str, prompt: int, artist: str, colour: str, new: str
    ) -> dict:
        relation = "name" if edit == "rename" else edit
        key = ("locality", self.split, edit, concept["id"], artist)
        ample = self.split == "eval"
        near, far, same = [], [], []
        for turn, other in enumerate(
            pick(
                self.others(concept, relation, True, new),
                2 if ample else 1,
                *key,
                "near",
            )
        ):
            drawn = artist if turn == 0 else self.artist(other, *key, "near", turn)
            behind = (
                colour
                if relation == "background"
                else self.colour(other, *key, "near", turn)
            )
            near.append(self.ask(relation, other, drawn, behind, prompt))
        for turn, other in enumerate(
            pick(
                self.others(concept, relation, False, new),
                2 if ample else 1,
                *key,
                "far",
            )
        ):
            behind = self.colour(other, *key, "far", turn)
            if relation == "background" and (turn == 0 or behind == new):
                behind = colour
            far.append(
                self.ask(
                    relation,
                    other,
                    self.artist(other, *key, "far", turn),
                    behind,
                    prompt,
                )
            )
        plan = self.plan[concept["id"]]
        free = (
            []
            if "rename" in plan
            else [r for r in ("name", "kind", "category") if r not in plan]
        )
        if "country" in concept:
            free = ["country"] if "country" not in plan else ["kind"]
        elif (
            relation == "kind"
            and self.category_of.get(new, concept["category"]) != concept["category"]
        ):
            free = [
                r for r in free if r != "category"
            ]  # the new kind implies another category
        elif relation == "category":
            free = [r for r in free if r != "kind"]
        for other in free[: 1 if relation != "background" else 2]:
            same.append(self.ask(other, concept, artist, colour))
        if relation != "background":
            same.append(self.ask("background", concept, artist, colour))
        elif len(same) < 2:
            behind = pick(
                [b for b in BACKGROUNDS if b not in (colour, new)],
                1,
                *key,
                "other colour",
            )[0]
            same.append(self.ask("background", concept, artist, behind))
        text = self.text_facts(key, 2 if ample else 1, new)
        found = {
            "text": text,
            "near": near,
            "same_image": same if ample else same[:1],
            "far": far,
        }
        return {name: asked for name, asked in found.items() if asked}

    def text_facts(self, key: tuple, count: int, new: str) -> list[dict]:
        """Text-only questions about probe concepts: one about a country, one about a kind or category, by turns."""
        pools: list[list[dict]] = [[], []]
        for concept in self.probes:
            flag = "country" in concept
            pools[0 if flag else 1] += [
                f
                for f in facts([concept])
                if f["answer"] != new
                and ("it" in f or "city" in f)
                and not (flag and f["type"] in ("kind", "category"))
            ]
        start = number(*key, "text") % 2
        chosen = [
            pick(pools[(start + turn) % 2], 1, *key, "text", turn)[0]
            for turn in range(count)
        ]
        queries = []
        for known in chosen:
            template = pick(
                TEMPLATES[known["type"]]["text"], 1, *key, "wording", known["concept"]
            )[0]
            queries.append(
                {"prompt": template.format(**known), "target": known["answer"]}
            )
        return queries

    def portability(
        self, concept: dict, named: dict | None, edit: str, artist: str, colour: str
    ) -> dict:
        """What follows in one hop from calling this picture something else, where the answer really changes."""
        hops = {"rename": ("kind", "category"), "country": FACTS}.get(edit, ())
        if named is None:
            return {}
        queries = [
            self.query(TEMPLATES[r]["image"][0], named[r], concept, artist, colour)
            for r in hops
            if named[r] and named[r] != concept[r]
        ]
        return {"1-hop": queries} if queries else {}

    def needs(self, named: dict, hops: list[dict]) -> dict:
        """The facts those hops need, as questions without a picture: who does not know them cannot take the hop."""
        known = {f["type"]: f for f in facts([named]) if "it" in f or "city" in f}
        relations = [
            r
            for r in known
            if any(q["prompt"] == TEMPLATES[r]["image"][0] for q in hops)
        ]
        asked = [TEMPLATES[r]["text"][0].format(**known[r]) for r in relations]
        queries = [
            {"prompt": q, "target": known[r]["answer"]}
            for q, r in zip(asked, relations, strict=True)
        ]
        return {"1-hop": queries} if len(queries) == len(hops) else {}

    def artist(self, concept: dict, *key: object) -> str:
        return pick(concept["artists"], 1, "artist", concept["id"], *key)[0]

    # ------------------------------------------------------------------------------------------ cases

    def case(
        self,
        concept: dict,
        edit: str,
        artist: str,
        new: str,
        named: dict | None,
        mark: str = "",
    ) -> dict:
        relation = "name" if edit == "rename" else edit
        key = ("case", self.split, edit, concept["id"], artist)
        colour = self.edited_colour(concept) if edit == "background" else None
        colour = colour or self.colour(concept, *key)
        prompts = list(range(len(TEMPLATES[relation]["image"])))
        first = pick(prompts, 1, *key, "wording")[0] if self.split == "train" else 0
        rest = [p for p in prompts if p != first]
        rephrased = rest if self.split == "eval" else pick(rest, 2, *key, "text")
        images = [a for a in concept["artists"] if a != artist]
        if self.split != "eval":
            images = pick(images, 2, *key, "images")

        def say(prompt: int, drawn: str, behind: str) -> dict:
            return self.query(
                TEMPLATES[relation]["image"][prompt], new, concept, drawn, behind
            )

        def behind(turn: object) -> str:
            return (
                colour
                if edit == "background"
                else self.colour(concept, *key, "behind", turn)
            )

        case = {
            "id": f"{mark or self.split}-{relation}-{concept['id']}-{artist}",
            "type": relation,
            "request": say(first, artist, colour),
            "generality": {
                "text": [say(p, artist, colour) for p in rephrased],
                "image": [say(first, drawn, behind(drawn)) for drawn in images],
                "both": [
                    say(pick(rest, 1, *key, "both")[0], images[-1], behind("both"))
                ],
            },
            "locality": self.locality(concept, edit, first, artist, colour, new),
        }
        hops = self.portability(concept, named, edit, artist, colour)
        needs = self.needs(named, hops["1-hop"]) if hops and named else {}
        return (
            case
            | ({"portability": hops} if hops else {})
            | ({"needs": needs} if needs else {})
        )

    def cases(self) -> list[dict]:
        """All cases of this side, in a fixed shuffled order."""
        made = []
        for concept in self.edited:
            for edit in self.plan[concept["id"]]:
                for artist in pick(
                    concept["artists"],
                    COPIES[self.split],
                    "request",
                    edit,
                    concept["id"],
                ):
                    found = self.target(
                        concept, edit, self.edited_colour(concept) or ""
                    )
                    if found:
                        made.append(self.case(concept, edit, artist, *found))
        return sorted(made, key=lambda case: number("order", case["id"]))

    def corrections(self, wrong: list[dict]) -> list[dict]:
        """Cases whose target is the truth, for what a model answers wrong: records of {picture, type, answer}."""
        by_id = {c["id"]: c for c in self.edited}
        made = {}
        for record in wrong:
            artist, _, file = record["picture"].partition("/")
            concept = by_id.get(file.removesuffix(".png"))
            truth = (
                concept
                and record["type"] != "background"
                and concept.get(record["type"])
            )
            if concept and truth and truth.lower() != record["answer"].strip().lower():
                made.setdefault(
                    (concept["id"], record["type"]),
                    self.case(concept, record["type"], artist, truth, None, "correct"),
                )
        return sorted(made.values(), key=lambda case: number("order", case["id"]))
