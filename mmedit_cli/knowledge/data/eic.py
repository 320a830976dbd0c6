"""E-IC: 1,000 edits of how a model describes COCO photos, 2,849 to train on (MMEdit, Cheng et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from mmedit_cli.knowledge.data.base import CHAT
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
    AnnotationFile,
    PublishedDataset,
    Template,
)

DATASET = PublishedDataset(
    name="eic",
    group=GROUP,
    sources={
        "train": AnnotationFile(
            "caption/caption_train_edit.json",
            2849,
            "583e306d72d06ad9106544e74cbeff5cc6105720b0cdfac675754d2f08ea9a20",
        ),
        "eval": AnnotationFile(
            "caption/caption_eval_edit.json",
            1000,
            "7c2215a419b82249c957abd12b850ef3c962d2de0d68f092c073f10bb63c2e83",
        ),
    },
    templates={
        # LiveEdit (CVPR 2025), evaluation code
        "liveedit": Template("{}", "{}?", "{} The answer is:"),
        # EasyEdit, CaptionDataset
        "easyedit": Template("{}", "{}", "Question: {} Short answer:"),
        **COMMON,
        CHAT: replace(COMMON[CHAT], request="Complete this caption of the picture: {}"),
    },
    folders=FOLDERS,
    image_folders=IMAGE_FOLDERS,
    image_mark=IMAGE_MARK,
    image_example=IMAGE_EXAMPLE,
    extras=EXTRAS,
)
