"""What E-VQA and E-IC have in common: the folders of MMEdit's releases, and the sources of its locality."""

from __future__ import annotations

from mmedit_cli.knowledge.data.shared.published import AnnotationFile

GROUP = "mmedit-data"
FOLDERS = ("easy-edit-mm", "editing-data")
IMAGE_FOLDERS = ("images", "")
IMAGE_MARK = "val2014"
IMAGE_EXAMPLE = "val2014/COCO_val2014_000000451435.jpg"
EXTRAS = (
    AnnotationFile(
        "locality/NQ dataset/validation.json",
        4289,
        "a68aac583b596029b4d6871ba95ce53bafaac226246d28d9a266577a8443c8ff",
        key="questions",
    ),
    AnnotationFile(
        "multimodal_locality/OK-VQA dataset/okvqa_loc.json",
        5046,
        "15decc22eecd316992cca43c9b37a430d61c43635227738b11819af234cd4a1c",
    ),
)
