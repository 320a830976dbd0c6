"""Things that are given where a model is needed: adapters, ledgers, exports, files. Each gets an error with a hint."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from mmedit_cli.errors import ModelError, near_miss
from mmedit_cli.model_folder import config_file, read_object
from mmedit_cli.reading import read_tensor_header
from mmedit_cli.records import CONCEPT_INDEX

_ADAPTER = "adapter_config.json"  # of peft
_LORA = ("lora_", ".lora.", ".lora_A.", ".lora_B.")  # in the names of a LoRA's tensors
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_EXPORT = "mmedit-"  # the beginning of the model_type of an export with edits
_MERGE = (
    "mmedit generate --lora {path} draws with it; or merge it with diffusers: "
    "pipe.load_lora_weights({path!r}); pipe.fuse_lora(); pipe.unload_lora_weights(); "
    "pipe.save_pretrained('MERGED'); then --model MERGED"
)


def check_is_model(path: Path) -> None:
    """Raise ModelError for a path that is known to be something else than a model folder."""
    if path.is_file():
        _refuse_file(path)
    if (path / _ADAPTER).is_file():
        _refuse_peft(path)
    config = config_file(path)
    if config is None:
        _check_bare_folder(path)
        return
    kind = read_object(config).get("model_type")
    if isinstance(kind, str) and kind.startswith(_EXPORT):
        raise ModelError(
            f"{path}: an export of mmedit with its edits ({kind}), not a plain model",
            f"`mmedit ask --edits LEDGER` asks with the edits; --model {path / 'base'} is the model without them",
        )


def check_folder_is_meant(
    name: str, known: Collection[str], own: Path | None = None
) -> None:
    """Raise ModelError for a known name that is a model folder here too: either could be meant.

    `own` is the folder behind the known name, if it has one.
    """
    here = Path(name)
    if name not in known or not here.is_dir() or config_file(here) is None:
        return
    if own is None or own.resolve() != here.resolve():
        raise ModelError(
            f"--model {name}: the name of a model that is known, and of a folder here",
            f"--model ./{name} is the folder; elsewhere {name} is the known model",
        )


def check_not_a_path(name: str) -> None:
    """Raise ModelError for a name that looks like `owner/name` but lies in a folder that is here."""
    parent = Path(name).parent
    if "/" not in name or not parent.is_dir():
        return
    beside = sorted(path.name for path in parent.iterdir() if path.is_dir())
    there = f"{parent} has no folders"
    if beside:
        there = f"{parent} has: {', '.join(beside[:10])}"
    hint = f"{there}; if it is a model of the hub, `mmedit download {name}` first, or start from another folder"
    raise ModelError(
        f"--model {name}: no such folder{near_miss(Path(name).name, beside)}", hint
    )


def _refuse_file(path: Path) -> NoReturn:
    if path.suffix == ".safetensors":
        _refuse_lora(path, path)
        raise ModelError(
            f"{path}: a single file, where the folder of a model is needed",
            f"a checkpoint of Stable Diffusion becomes one: mmedit convert checkpoint {path} FOLDER",
        )
    raise ModelError(
        f"{path}: a file, where the folder of a model is needed",
        "give a folder with a config.json",
    )


def _refuse_peft(path: Path) -> NoReturn:
    base = read_object(path / _ADAPTER).get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else "its base model"
    raise ModelError(
        f"{path}: a PEFT adapter on {base}, not a model",
        f"merge it: PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({base!r}), {str(path)!r})"
        ".merge_and_unload().save_pretrained('MERGED'), copy the base's tokenizer and processor files there, then "
        "--model MERGED",
    )


def _check_bare_folder(path: Path) -> None:
    """Raise ModelError for a folder without a config that is known to be something else than a model."""
    if (path / "run.yaml").is_file() and (path / "edits.jsonl").is_file():
        raise ModelError(
            f"{path}: a ledger of edits, not a model", f"mmedit ask --edits {path}"
        )
    index = path / CONCEPT_INDEX
    if index.is_file() and "concepts" in read_object(index):
        raise ModelError(
            f"{path}: a folder of concepts, not a model",
            f"mmedit generate --edits {path}",
        )
    adapters = sorted(path.glob(f"*/{_ADAPTER}"))
    if adapters:
        problem = f"{path}: {len(adapters)} PEFT adapters, not a model"
        raise ModelError(
            problem,
            "PeftModel.from_pretrained(base_model, FOLDER) puts one of them on its base model",
        )
    for file in sorted(path.glob("*.safetensors")):
        _refuse_lora(path, file)


def _refuse_lora(path: Path, file: Path) -> None:
    """Raise ModelError if a file of tensors holds a LoRA."""
    tensors, _ = read_tensor_header(file, error=ModelError)
    names = list(tensors.values)
    if names and all(_is_of_lora(name) for name in names):
        maker = "diffusers"
        if any(name.startswith(_KOHYA) for name in names):
            maker = "kohya"
        problem = f"{path}: a LoRA adapter in the format of {maker}, not a model"
        raise ModelError(problem, _MERGE.format(path=str(path)))


def _is_of_lora(name: str) -> bool:
    return name.endswith(".alpha") or any(part in name for part in _LORA)
