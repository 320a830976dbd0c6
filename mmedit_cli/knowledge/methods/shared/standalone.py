"""Edits that run without this package: the file they run on, their tensors, and where they go in the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.knowledge.methods.base import Editor, Standalone
from mmedit_cli.knowledge.methods.shared.flatten import flatten


def standalone(
    editor: Editor,
    entered: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> Standalone:
    """Return the edits of an editor for the file `runtime.py`, which stands beside the editor's own.

    `entered` is the path of the module on entering which a question is routed.
    """
    config = editor.backbone.model.config
    known = {
        "stack": editor.backbone.anchors.stack,
        "entered": entered,
        "image_token_id": getattr(config, "image_token_id", None)
        or config.image_token_index,
    }
    ids = torch.tensor([i for operation in editor.operations for i in operation.ids])
    source = flatten(Path(inspect.getfile(type(editor))).with_name("runtime.py"))
    return Standalone(source, {**tensors, "ids": ids}, {**settings, **known})
