"""UCE: concepts are drawn like others or erased, and named ones kept, by a closed-form change of keys and values."""

from __future__ import annotations

from mmedit_cli.drawing.methods.shared.concept_editor import ConceptHparams, RidgeEditor


class Uce(RidgeEditor):
    """Unified concept editing (Gandikota et al., WACV 2024, arXiv 2308.14761)."""

    name = "uce"
    Hparams = ConceptHparams


CONCEPT_EDITOR = Uce
