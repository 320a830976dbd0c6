"""Questions that no edit is about: what an editor compares with, or keeps as it is, where a method asks for such.

They are our own and ship with the package, so that nothing that judges an edit is ever seen by what makes it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmedit_cli.types import Query

EMPTY_PICTURE = Path(__file__).with_name("empty.png")  # 64 x 64 pixels, all black

_FACTS = (
    ("What is the largest planet of the sun?", "Jupiter"),
    ("How many days are in a week?", "seven"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
    ("Which metal is liquid at room temperature?", "mercury"),
    ("What do bees make?", "honey"),
    ("In which ocean is Hawaii?", "the Pacific"),
    ("What is the boiling point of water in degrees Celsius?", "100"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("What is the opposite of cold?", "hot"),
    ("How many legs has a spider?", "eight"),
    ("Which gas do plants take from the air?", "carbon dioxide"),
    ("What is frozen water called?", "ice"),
    ("On which continent is Egypt?", "Africa"),
    ("What is the currency of Japan?", "the yen"),
    ("Which instrument has 88 keys?", "the piano"),
    ("The first month of the year is", "January"),
    ("A young dog is called", "a puppy"),
    ("The chemical symbol of gold is", "Au"),
    ("The longest river of Africa is", "the Nile"),
    ("The square root of 81 is", "nine"),
    ("Bread is made from", "flour"),
    ("The heart pumps", "blood"),
    ("A triangle has", "three sides"),
    ("The sun rises in", "the east"),
    ("Paper is made from", "wood"),
    ("The tallest animal is", "the giraffe"),
    ("The moon goes around", "the earth"),
    ("Steel is made from", "iron"),
    ("The author of the novel Emma is", "Jane Austen"),
    ("Name the capital of Italy.", "Rome"),
    ("Name a fruit that is yellow.", "a banana"),
)


def unrelated() -> tuple[Query, ...]:
    """Return 32 questions without a picture, each with its usual answer."""
    return tuple(Query(prompt, target) for prompt, target in _FACTS)


def on_empty_picture(query: Query) -> Query:
    """Return the same question about a picture that shows nothing, all black."""
    return replace(query, image=EMPTY_PICTURE)
