"""mmedit: edit multimodal models and measure honestly what the edit did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from mmedit_cli.drawing.workflow.concepts import LearnOptions, learn_concept
    from mmedit_cli.errors import MmeditError, UserError
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.evaluation.protocol import Protocol
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
    "Protocol": "mmedit_cli.knowledge.evaluation.protocol",
    "DataOptions": "mmedit_cli.knowledge.data.base",
    "EvalOptions": "mmedit_cli.knowledge.workflow.evaluation",
    "ModelOptions": "mmedit_cli.knowledge.loading",
    "begin_edits": "mmedit_cli.knowledge.ledger.edited_model",
    "open_edits": "mmedit_cli.knowledge.ledger.edited_model",
    "EditOptions": "mmedit_cli.knowledge.ledger.edited_model",
    "load_runs": "mmedit_cli.reports.frames",
    "MmeditError": "mmedit_cli.errors",
    "UserError": "mmedit_cli.errors",
}
__all__ = [
    "Concept",
    "DataOptions",
    "EditCase",
    "EditOptions",
    "EvalOptions",
    "LearnOptions",
    "MmeditError",
    "ModelOptions",
    "Protocol",
    "Query",
    "UserError",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
