"""mmedit: edit multimodal models and measure honestly what the edit did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmedit_cli.edits.model import EditOptions, begin_edits, open_edits
    from mmedit_cli.types import Concept, EditCase, Query
    from mmedit_cli.workflows.concepts import LearnOptions, learn_concept
    from mmedit_cli.workflows.evaluation import EvalOptions, ModelOptions, evaluate, load_backbone, load_editor

# public name -> where it lives; loaded on first use, so that importing the package costs nothing
_PUBLIC = {
    "Concept": "mmedit_cli.types",
    "LearnOptions": "mmedit_cli.workflows.concepts",
    "learn_concept": "mmedit_cli.workflows.concepts",
    "Query": "mmedit_cli.types",
    "EditCase": "mmedit_cli.types",
    "load_backbone": "mmedit_cli.workflows.evaluation",
    "load_editor": "mmedit_cli.workflows.evaluation",
    "evaluate": "mmedit_cli.workflows.evaluation",
    "EvalOptions": "mmedit_cli.workflows.evaluation",
    "ModelOptions": "mmedit_cli.workflows.evaluation",
    "begin_edits": "mmedit_cli.edits.model",
    "open_edits": "mmedit_cli.edits.model",
    "EditOptions": "mmedit_cli.edits.model",
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
    "open_edits",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
