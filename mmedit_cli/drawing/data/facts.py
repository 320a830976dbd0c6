"""Sets of facts: what a text is to be drawn as, and the prompts that show whether it is, and what else changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from mmedit_cli.types import ConceptChange

NAMING = "What is this?"  # asked of a vision-language model about a drawn picture
BACKGROUND_QUESTION = "What colour is the background?"
EFFICACY, GENERALITY, SPECIFICITY = "efficacy", "generality", "specificity"
SUBJECT = "subject"  # what is to stay of the edited thing itself
# as they are printed
COLUMNS = (EFFICACY, GENERALITY, SPECIFICITY, SUBJECT)


@dataclass(frozen=True)
class DrawnProbe:
    """A prompt to draw after an edit, and how its picture is judged.

    A model that answers is asked `question`: right if the answer begins with `answer`, or, if that is to be `gone`, if
    it does not. `instead` is the answer before the edit, for a margin. The probe says something of the edit alone if
    the untouched model's picture of `needs` is answered with `answer`; empty: of the prompt itself.

    A model that compares pictures with texts is given `texts`: the one that should fit better, and the other.
    """

    column: str
    prompt: str
    question: str = ""
    answer: str = ""
    gone: bool = False
    instead: str = ""
    needs: str = ""
    texts: tuple[str, str] | None = None

    @property
    def needed(self) -> str:
        """The prompt whose picture by the untouched model must be answered right."""
        return self.needs or self.prompt


@dataclass(frozen=True)
class DrawnFact:
    """An edit of what is drawn, of some kind, with its probes; `name` is unique in its set."""

    name: str
    kind: str
    change: ConceptChange
    probes: tuple[DrawnProbe, ...]


@dataclass(frozen=True)
class FactSet:
    """Facts that are edited each alone, and all of a kind at once.

    `guidance` is the scale of classifier-free guidance that the set is drawn with; None is the model's own. `emoji`:
    the pictures are those that mini-blip2 knows.
    """

    name: str
    facts: tuple[DrawnFact, ...]
    guidance: float | None = None
    emoji: bool = False
    kinds: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(fact.kind for fact in self.facts)
        object.__setattr__(self, "kinds", tuple(kinds))

    @property
    def asks(self) -> bool:
        """Whether every probe has a question for a model that answers."""
        return all(probe.question for probe in self.probes())

    @property
    def compares(self) -> bool:
        """Whether every probe has texts for a model that compares pictures with texts."""
        return all(probe.texts for probe in self.probes())

    def probes(self) -> list[DrawnProbe]:
        """Return the probes of all facts."""
        return [probe for fact in self.facts for probe in fact.probes]

    def first(self, limit: int | None) -> FactSet:
        """Return the set with the first facts alone, None for all of them."""
        return replace(self, facts=self.facts[:limit])

    def fingerprint(self) -> str:
        """Return a digest of all texts."""
        described = [asdict(fact) for fact in self.facts]
        text = json.dumps(described, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode())
        return digest.hexdigest()[:16]


def in_turn(by_kind: Sequence[Sequence[DrawnFact]]) -> tuple[DrawnFact, ...]:
    """Return the facts of several kinds in turn, so that the first n of them are of all kinds."""
    longest = max(map(len, by_kind), default=0)
    found: list[DrawnFact] = []
    for i in range(longest):
        found += [facts[i] for facts in by_kind if i < len(facts)]
    return tuple(found)
