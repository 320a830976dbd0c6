"""Adapters of others become concepts of a folder: a LoRA as a block, a textual inversion as a word with vectors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli import registry
from mmedit_cli.drawing.workflow.concepts import ConceptFolder, found_anywhere
from mmedit_cli.errors import UserError
from mmedit_cli.output import Output
from mmedit_cli.runtime import LoadOptions
from mmedit_cli.types import Concept


@dataclass(frozen=True)
class AdoptOptions(LoadOptions):
    """What to take over into which folder, and how it is named in prompts.

    `lora` is FILE[:WEIGHT], `embedding` a file; one of them at least. `superclass` is the plain word for the thing.
    """

    editor: str
    model: str
    token: str
    superclass: str
    folder: Path
    lora: str | None = None
    embedding: Path | None = None
    hparams: Path | None = None
    overrides: tuple[str, ...] = ()
    force: bool = False


def adopt_concept(options: AdoptOptions, out: Output | None = None) -> dict[str, Any]:
    """Put an adapter of others into a folder of concepts and return its entry.

    Raises UserError for a method that takes none, DataError for a file that cannot be read or does not fit, StateError
    if the folder holds concepts of another method or model.
    """
    from mmedit_cli.catalog import find_model, loading
    from mmedit_cli.drawing.models.foreign_embeddings import read_embedding
    from mmedit_cli.drawing.models.foreign_lora import (
        lora_file,
        read_factors,
        split_weight,
    )
    from mmedit_cli.drawing.models.loading import check_draws, load_stable_diffusion
    from mmedit_cli.drawing.models.prompts import check_token
    from mmedit_cli.shapes import hparams_for

    out = out or Output()
    cls = registry.personalizers.get(options.editor)
    if not hasattr(cls, "adopt"):
        raise UserError(
            f"{cls.name} takes no adapters of others",
            "mmedit edit multi-melo-diffusion does; mmedit generate --lora draws with one at once",
        )
    check_token(options.token)
    path, weight = Path(), 1.0
    if options.lora is not None:
        path, weight = split_weight(options.lora)
        lora_file(path)
    ref = find_model(options.model, revision=options.revision)
    check_draws(ref)
    folder = ConceptFolder(options.folder)
    folder.check_takes(cls.name, ref, options.token, force=options.force)
    hparams, _ = hparams_for(
        options.editor,
        cls.Hparams,
        ref,
        options.hparams,
        overrides=options.overrides,
    )
    out.note(loading(ref.name))
    model = load_stable_diffusion(ref, device=options.device, dtype=options.dtype)
    personalizer = cls(model, hparams)
    factors = {}
    if options.lora is not None:
        for place, (down, up) in read_factors(path, model).items():
            factors[place] = (down, weight * up)
    vectors: tuple[Any, ...] = ()
    if options.embedding is not None:
        _, word = read_embedding(options.embedding, options.token, model)
        vectors = word.vectors
    started = time.perf_counter()
    with folder.writing():
        folder.check_takes(cls.name, ref, options.token, force=options.force)
        for entry in folder.entries:
            if entry["token"] != options.token:
                personalizer.identifiers.add(entry.get("identifier", entry["token"]))
        personalizer.adopt(options.token, options.superclass, factors, vectors)
        seconds = time.perf_counter() - started
        made_of = [options.lora, options.embedding and str(options.embedding)]
        return folder.put(
            personalizer,
            Concept(options.token, options.superclass, ()),
            found_anywhere(options.model),
            {
                "adopted": [text for text in made_of if text],
                "seconds": round(seconds, 3),
            },
        )
