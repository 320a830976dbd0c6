"""mmedit: edit multimodal models and measure honestly what the edit did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from mmedit_cli.drawing.workflow.concepts import LearnOptions, learn_concept
    from mmedit_cli.knowledge.ledger.edited_model import (
        EditOptions,
        begin_edits,
        open_edits,
    )
    from mmedit_cli.knowledge.loading import ModelOptions, load_backbone, load_editor
    from mmedit_cli.knowledge.workflow.evaluation import EvalOptions, evaluate
    from mmedit_cli.reports.frames import load_runs
    from mmedit_cli.types import Concept, EditCase, Query

# public name -> where it lives; loaded on first use, so that importing the package costs nothing
_PUBLIC = {
    "Concept": "mmedit_cli.types",
    "LearnOptions": "mmedit_cli.drawing.workflow.concepts",
    "learn_concept": "mmedit_cli.drawing.workflow.concepts",
    "Query": "mmedit_cli.types",
    "EditCase": "mmedit_cli.types",
    "load_backbone": "mmedit_cli.knowledge.loading",
    "load_editor": "mmedit_cli.knowledge.loading",
    "evaluate": "mmedit_cli.knowledge.workflow.evaluation",
    "EvalOptions": "mmedit_cli.knowledge.workflow.evaluation",
    "ModelOptions": "mmedit_cli.knowledge.loading",
    "begin_edits": "mmedit_cli.knowledge.ledger.edited_model",
    "open_edits": "mmedit_cli.knowledge.ledger.edited_model",
    "EditOptions": "mmedit_cli.knowledge.ledger.edited_model",
    "load_runs": "mmedit_cli.reports.frames",
}
__all__ = [
    "Concept",
    "EditCase",
    "EditOptions",
    "EvalOptions",
    "LearnOptions",
    "ModelOptions",
    "Query",
    "__version__",
    "begin_edits",
    "evaluate",
    "learn_concept",
    "load_backbone",
    "load_editor",
    "load_runs",
    "open_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
