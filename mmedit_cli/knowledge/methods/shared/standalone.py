"""Edits that run without this package: the file they run on, their tensors, and where they go in the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.methods.base import Editor, Standalone
from mmedit_cli.knowledge.methods.shared.flatten import flatten
from mmedit_cli.knowledge.models.shared.image_token import image_token_id


def standalone(
    editor: Editor,
    entered: str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> Standalone:
    """Return the edits of an editor for the file `runtime.py`, which stands beside the editor's own.

    `entered` is the path of the module on entering which a question is routed.
    """
    backbone = editor.backbone
    if backbone.masks_by_type:
        raise UserError(
            f"{editor.name}: {backbone.name} makes the masks of its layers from types of tokens, which edits with a "
            "runtime of their own do not see",
            "mmedit serve --edits answers with them; edits of ft and m-ore are exported as plain weights",
        )
    places = {
        "stack": backbone.anchors.stack,
        "entered": entered,
        "image_token_id": image_token_id(backbone),
        "auto_class": backbone.auto_class,
    }
    ids = torch.tensor(editor.ids)
    file = Path(inspect.getfile(type(editor)))
    source = flatten(file.with_name("runtime.py"))
    return Standalone(source, {**tensors, "ids": ids}, {**settings, **places})
