"""Does what is installed work together? Packages are imported and tried out in small, not only listed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import runtime

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.shared.audit import Finding

_MODULES = {"pillow": "PIL"}  # where the module is not called like the package
_DISTRIBUTION = "mmedit-cli"
_REVISION = "0" * 40


def check() -> Iterator[Finding]:
    """Yield (what, whether it is well, what was found) of packages, their versions, and what they do together."""
    sound = True
    for package in (*runtime.PACKAGES, "huggingface_hub"):
        finding = _imported(package)
        sound = sound and finding[1] is not False
        yield finding
    yield "torchvision", *_torchvision()
    yield from _misfits()
    if not sound:  # what follows would fail for the same reason
        return
    facts = runtime.environment(runtime.resolve_device("auto"))
    yield (
        "device",
        True,
        f"{facts['device']} ({facts['device_name']}), {facts['threads']} threads",
    )
    runtime.quiet_libraries()
    yield _tried("a LoRA", ("peft", "transformers", "torch"), _lora)
    yield _tried("a pipeline", ("diffusers", "transformers", "torch"), _pipeline)
    yield _tried("a hub file", ("huggingface_hub", "safetensors"), _hub_file)
    yield _adapters_of_transformers()


def _imported(package: str) -> Finding:
    try:
        importlib.import_module(_MODULES.get(package, package))
        return package, True, importlib.metadata.version(package)
    except Exception as error:  # a broken binary raises whatever it likes
        return package, False, f"cannot be imported: {_first_line(error)}"


def _torchvision() -> tuple[bool, str]:
    """torchvision is not needed; one that does not match torch makes every image processor fail."""
    if importlib.util.find_spec("torchvision") is None:
        return True, "not installed, not needed"
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a broken binary raises whatever it likes
        return False, f"installed but broken ({error}): pip uninstall torchvision"
    return True, importlib.metadata.version("torchvision")


def _misfits() -> Iterator[Finding]:
    """Yield each pair of versions that do not fit, as the packages themselves and this one say."""
    from packaging.requirements import Requirement

    found = False
    for package in (_DISTRIBUTION, *runtime.PACKAGES, "huggingface_hub"):
        version, requires = _distribution(package)
        for requirement in map(Requirement, requires):
            if requirement.marker is not None and not requirement.marker.evaluate(
                {"extra": ""}
            ):
                continue
            other, _ = _distribution(requirement.name)
            if not requirement.specifier.contains(other or "0", prereleases=True):
                found = True
                has = (
                    f"{requirement.name} {other} is installed"
                    if other
                    else f"{requirement.name} is not installed"
                )
                yield (
                    "versions",
                    False,
                    f"{package} {version} asks for {requirement}, but {has}",
                )
    if not found:
        yield "versions", True, "what each package asks of the others is installed"


def _distribution(package: str) -> tuple[str, list[str]]:
    """Return (version, requirements) of an installed package; an empty version where it is not installed."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return "", []
    return distribution.version, distribution.requires or []


def _tried(name: str, packages: tuple[str, ...], attempt: Callable[[], str]) -> Finding:
    """Return how an attempt went; where it fails, the versions that do not work together are named."""
    try:
        return name, True, attempt()
    except (
        Exception
    ) as error:  # whatever a library raises, the finding is that it does not work
        versions = ", ".join(
            f"{package} {_distribution(package)[0]}" for package in packages
        )
        return name, False, f"{versions} do not work together: {_first_line(error)}"


def _tiny() -> Any:
    from mmedit_cli.drawing.models.tiny import build

    return build("tiny-sd")


def _lora() -> str:
    """Put a LoRA on a text encoder of transformers, train one step, and take it off again."""
    import torch

    from mmedit_cli.adapters import LoraLayers
    from mmedit_cli.patch import Patch, trainable

    encoder = _tiny().text_encoder.eval().requires_grad_(False)
    ids = torch.arange(4)[None]
    paths = [path for path, _ in encoder.named_modules() if path.endswith("q_proj")]
    before = encoder(ids).last_hidden_state
    with Patch(encoder) as patch:
        layers = LoraLayers(patch, dict.fromkeys(paths, 2), dict.fromkeys(paths, 2.0))
        with trainable(layers.parameters()):
            optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
            encoder(ids).last_hidden_state.square().mean().backward()
            optimizer.step()
        moved = not torch.equal(encoder(ids).last_hidden_state, before)
    if not moved:
        raise RuntimeError("a step of training changed nothing")
    if not torch.equal(encoder(ids).last_hidden_state, before):
        raise RuntimeError("the model is not as before without it")
    return f"trained one step on {len(paths)} layers and removed"


def _pipeline() -> str:
    """Draw one tiny picture."""
    pipe = _tiny()
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a dog", num_inference_steps=1, output_type="pil").images[0]
    return f"drew a picture of {picture.width} x {picture.height}"


def _hub_file() -> str:
    """Read a file of tensors through a hub cache in a folder of its own: no network."""
    import torch
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as cache:
        home = Path(cache) / "models--mmedit--doctor"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(_REVISION)
        (home / "snapshots" / _REVISION).mkdir(parents=True)
        save_file(
            {"a": torch.ones(2)}, home / "snapshots" / _REVISION / "a.safetensors"
        )
        path = hf_hub_download(
            "mmedit/doctor", "a.safetensors", cache_dir=cache, local_files_only=True
        )
        if not load_file(path)["a"].equal(torch.ones(2)):
            raise RuntimeError("what was read is not what was written")
    return "written and read again"


def _adapters_of_transformers() -> Finding:
    """Look whether transformers accepts the installed peft: mmedit does not need it to, but diffusers does."""
    from peft import LoraConfig

    name = "other programs"
    try:
        _tiny().text_encoder.add_adapter(LoraConfig(r=1, target_modules=["q_proj"]))
    except Exception as error:  # whatever it raises, it does not accept it
        pair = " and ".join(
            f"{package} {_distribution(package)[0]}"
            for package in ("transformers", "peft")
        )
        what = (
            "load_lora_weights of diffusers needs another pair, mmedit itself does not"
        )
        return name, None, f"{pair} do not fit: {_first_line(error)}; {what}"
    return name, True, "can load an exported LoRA with these versions too"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
