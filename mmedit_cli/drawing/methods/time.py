"""TIME: a prompt is drawn like another, by a closed-form change of keys and values, all tokens aligned."""

from __future__ import annotations

from dataclasses import dataclass

from mmedit_cli.drawing.methods.shared.concept_editor import ConceptHparams, RidgeEditor
from mmedit_cli.drawing.methods.shared.token_pairs import Pairing


@dataclass(frozen=True)
class TimeHparams(ConceptHparams):
    """See hparams/time.yaml for what each value means and where it comes from."""

    lam: float = 0.1
    pairing: Pairing = "aligned"
    templates: tuple[str, ...] = (
        "{}",
        "A photo of {}",
        "An image of {}",
        "A picture of {}",
    )


class Time(RidgeEditor):
    """Text-to-image model editing (Orgad, Kawar and Belinkov, ICCV 2023, arXiv 2303.08084)."""

    name = "time"
    Hparams = TimeHparams


CONCEPT_EDITOR = Time
