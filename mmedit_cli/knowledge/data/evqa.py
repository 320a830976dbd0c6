"""E-VQA: 2,093 edits of what a model sees in COCO photos, 6,345 to train on (MMEdit, Cheng et al. 2023).

`text` teaches the text-only facts that its locality asks: they suit a language model, and need no pictures.
"""

from __future__ import annotations

from mmedit_cli.knowledge.data.shared.mmedit import (
    EXTRAS,
    FOLDERS,
    GROUP,
    IMAGE_EXAMPLE,
    IMAGE_FOLDERS,
    IMAGE_MARK,
)
from mmedit_cli.knowledge.data.shared.published import (
    COMMON,
    TEXT,
    TEXT_KEYS,
    AnnotationFile,
    PublishedDataset,
    Template,
    text_fact,
)

_CUE = "{} The answer is:"
_SHORT = "Question: {} Short answer:"

EVAL = AnnotationFile(
    "vqa/vqa_eval.json",
    2093,
    "7299743ebe2854b240c6fe6f252fdb0c2ae3993ba2e5b23f07c6fee54ed1bcc0",
)

DATASET = PublishedDataset(
    name="evqa",
    group=GROUP,
    sources={
        "train": AnnotationFile(
            "vqa/vqa_train.json",
            6345,
            "82e242bd7fd3ab855413ba7972665c33bca920ae3b0982b71cae2af1b61700b0",
        ),
        "eval": EVAL,
        TEXT: EVAL,
    },
    readers={TEXT: text_fact},
    own_keys={TEXT: TEXT_KEYS},
    templates={
        # LiveEdit (CVPR 2025), evaluation code
        "liveedit": Template(_CUE, "{}?", _CUE),
        # EasyEdit, VQADataset
        "easyedit": Template(_SHORT, "{}", _SHORT),
        **COMMON,
    },
    folders=FOLDERS,
    image_folders=IMAGE_FOLDERS,
    image_mark=IMAGE_MARK,
    image_example=IMAGE_EXAMPLE,
    extras=EXTRAS,
)
