"""What memit and alphaedit must know of a model before the first edit, computed beforehand."""

from __future__ import annotations

from typing import Any

from mmedit_cli.catalog import find_model
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.loading import (
    ModelOptions,
    depth_of,
    load_model,
    resolve_editor,
    variant_for,
)
from mmedit_cli.layers import layer_numbers
from mmedit_cli.output import Output


def collect_moments(editor: str, options: ModelOptions, out: Output) -> dict[str, Any]:
    """Compute the second moments that an editor will ask for, unless they are there; return where they are, and facts.

    Raises UserError for an editor that needs none.
    """
    from mmedit_cli.knowledge.covariance import default_path, ffn_moments
    from mmedit_cli.knowledge.methods.shared.key_value_editor import KeyValueHparams
    from mmedit_cli.knowledge.methods.shared.side_effects import unrelated_questions

    ref = find_model(options.model, revision=options.revision)
    variant = variant_for(editor, ref)
    _, hparams = resolve_editor(editor, variant, None, (), depth=depth_of(ref))
    if not isinstance(hparams, KeyValueHparams):
        raise UserError(
            f"--for {editor}: needs no second moments", "memit and alphaedit do"
        )
    backbone = load_model(options, ref, out)
    depth = backbone.n_layers
    numbers = layer_numbers(hparams.layers, depth)
    layers = sorted({number % depth for number in numbers})
    questions = unrelated_questions(hparams.questions, pictures=backbone.sees)
    with out.progress({"questions": len(questions)}) as tick:
        found = ffn_moments(
            backbone,
            questions,
            layers,
            hparams.tokens,
            tick=lambda n: tick("questions", n),
        )
    first = found.matrices[layers[0]]
    return {
        "path": str(default_path(backbone, hparams.tokens)),
        "model": ref.name,
        "layers": layers,
        "width": len(first),
        "questions": len(questions),
        "tokens": found.tokens,
        "rule": hparams.tokens,
    }
