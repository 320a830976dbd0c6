"""Edited models that leave: a folder that loads without this package, checked against the model it was made from."""

from __future__ import annotations

import importlib.util
import inspect
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import __version__
from mmedit_cli.catalog import find_model
from mmedit_cli.errors import MmeditError, RunError, UserError
from mmedit_cli.knowledge.ledger.edited_model import LedgerModel, described, open_edits
from mmedit_cli.knowledge.ledger.ledger import LedgerEdit
from mmedit_cli.knowledge.loading import ModelOptions
from mmedit_cli.output import Output, counted
from mmedit_cli.storage import staged_folder, write_atomic
from mmedit_cli.types import Query

if TYPE_CHECKING:
    from torch import Tensor

    from mmedit_cli.knowledge.methods.base import Standalone
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

RUNTIME = "modeling_edits.py"
# the kinds of export
PLAIN = "plain weights"
ADAPTERS = "peft adapters"
STANDALONE = "base model and edits"
_CHECKED = 16  # edits whose questions are asked again after reload
_CONTINUED = 8  # tokens that two of them are answered with
_TOLERANCE = {"float32": 1e-4}  # of logits; other formats round more
_COMPANIONS = ("processor_config.json", "chat_template.json", "chat_template.jinja")
_LISTED = 200  # edits that a model card lists


def export(
    folder: Path,
    to: Path,
    options: ModelOptions,
    out: Output,
    *,
    adapters: bool = False,
) -> dict[str, Any]:
    """Write the edited model of a ledger to a new folder and return its facts; nothing is left if it fails.

    `adapters`: PEFT adapters, also where the method offers more. Raises UserError if the folder is not new or the
    method cannot be exported, MmeditError if the reloaded model answers otherwise than the edited one.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: not empty", "name a new folder with --to")
    with open_edits(folder, model=options, out=out) as edited:
        if not edited.ledger.active:
            raise UserError(
                f"{folder}: no active edits, so there is nothing to export",
                "mmedit edits redo",
            )
        with _whole_or_not(to), staged_folder(to) as fresh:
            report = _write(edited, fresh, out, adapters)
            write_atomic(fresh / "README.md", card(edited, report["kind"], to.name))
            facts = [described(edit) for edit in edited.ledger.active]
            write_atomic(
                fresh / "edits.json", json.dumps(facts, indent=1, ensure_ascii=False)
            )
    return {**report, "folder": str(to), "edits": len(facts)}


@contextmanager
def _whole_or_not(to: Path) -> Iterator[None]:
    """Turn what safetensors raises on a full disk into a RunError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise RunError(f"{to}: cannot write: {error}", "is the disk full?") from error


def _write(
    edited: LedgerModel, folder: Path, out: Output, adapters: bool
) -> dict[str, Any]:
    """Write the export and load it again; return its kind, and how far its logits are from the edited model's."""
    backbone = edited.backbone
    editor = edited.editor
    dtype = str(backbone.dtype).removeprefix("torch.")
    if editor.plain and not adapters:
        out.note("writing plain weights")
        backbone.model.save_pretrained(folder)
        save_processors(edited, folder)
        reloaded = _load_plain(backbone, folder, dtype)
        checked = check(edited, _through_backbone(backbone, reloaded))
        return {"kind": PLAIN, **checked}
    alone = None if adapters else editor.standalone()
    if alone is not None:
        out.note("writing the base model and the edits beside it")
        with edited.paused():
            backbone.model.save_pretrained(folder / "base")
        # code of a model that transformers does not know is looked for beside the config
        for code in (folder / "base").glob("*.py"):
            code.rename(folder / code.name)
        save_processors(edited, folder)
        _write_standalone(alone, backbone.auto_class, f"mmedit-{editor.name}", folder)
        model = _load_standalone(folder, dtype).to(backbone.device)
        checked = check(edited, _as_a_user_does(backbone, model))
        checked |= _check_generation(edited, model)
        return {"kind": STANDALONE, **checked}
    written = editor.save_adapters(folder)
    if not written and adapters:
        raise UserError(
            f"{editor.name} has no adapters: its edits are not LoRA blocks",
            "leave --adapters out",
        )
    if not written:
        raise UserError(
            f"{editor.name} cannot be exported: its edits are neither plain weights nor LoRA blocks, and it has no "
            "runtime of its own",
            f"mmedit ask --edits {edited.ledger.folder} uses them; so does mmedit_cli.open_edits",
        )
    out.note(f"wrote {len(written)} PEFT adapters")
    return {
        "kind": ADAPTERS,
        "adapters": [path.name for path in written],
        **_check_adapters(edited, written, dtype),
    }


def _check_adapters(
    edited: LedgerModel, written: Mapping[Path, Sequence[Query]], dtype: str
) -> dict[str, Any]:
    """Put the newest adapters on the base model, one at a time, and ask each what it was made for."""
    from peft import PeftModel

    folder = next(iter(written)).parent / "base"
    with edited.paused():
        edited.backbone.model.save_pretrained(folder)
    plain = _load_plain(edited.backbone, folder, dtype)
    shutil.rmtree(folder)
    model = None
    checks = []
    for path, requests in list(written.items())[-_CHECKED:]:
        if model is None:
            model = PeftModel.from_pretrained(
                plain,
                str(path),
                adapter_name=path.name,
            )
        else:
            model.load_adapter(str(path), adapter_name=path.name)
            model.set_adapter(path.name)
        asked = _through_backbone(edited.backbone, model.get_base_model())
        checks.append(check(edited, asked, requests[-_CHECKED:]))
    return {
        "checked": sum(done["checked"] for done in checks),
        "largest_difference": max(done["largest_difference"] for done in checks),
    }


def save_processors(edited: LedgerModel, folder: Path) -> None:
    """Write tokenizer and image processor, with the files that make `AutoProcessor` find them."""
    backbone = edited.backbone
    backbone.tokenizer.save_pretrained(folder)
    if backbone.sees:
        backbone.image_processor.save_pretrained(folder)
    known = edited.ledger.config["model"]
    source = find_model(known["source"], revision=known["revision"]).folder
    if source is None:
        return
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_standalone(
    alone: Standalone, auto_class: str, model_type: str, folder: Path
) -> None:
    from safetensors.torch import save

    tensors = {}
    for name, tensor in alone.tensors.items():
        tensors[name] = tensor.detach().cpu().contiguous()
    settings = {"settings": json.dumps(alone.settings)}
    write_atomic(folder / "edits.safetensors", save(tensors, settings))
    write_atomic(folder / RUNTIME, alone.source)
    stem = Path(RUNTIME).stem
    config = {
        "model_type": model_type,
        "architectures": ["EditedModel"],
        "auto_map": {
            "AutoConfig": f"{stem}.EditedConfig",
            auto_class: f"{stem}.EditedModel",
        },
    }
    write_atomic(folder / "config.json", json.dumps(config, indent=2))


def _load_plain(backbone: VisionLanguageModel, folder: Path, dtype: str) -> Any:
    import transformers

    auto = getattr(transformers, backbone.auto_class)
    return auto.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    ).eval()


def _load_standalone(folder: Path, dtype: str) -> Any:
    """Load the export with the file in it, as a user does."""
    spec = importlib.util.spec_from_file_location(
        f"mmedit_export_{secrets.token_hex(4)}", folder / RUNTIME
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module.EditedModel.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    ).eval()


def check(
    edited: LedgerModel,
    ask: Callable[[Query], Tensor],
    queries: Sequence[Query] | None = None,
) -> dict[str, Any]:
    """Compare the logits (V,) behind some questions; raise MmeditError if those of the export are not the same.

    By default they are those of the newest edits, and one that no edit is about.
    """
    import torch

    backbone = edited.backbone
    if queries is None:
        asked = [edit.request for edit in edited.ledger.active[-_CHECKED:]]
        queries = [*asked, replace(asked[-1], prompt="What colour is the background?")]
    largest = 0.0
    same = True
    with torch.no_grad():
        for query in queries:
            expected = _last_logits(backbone, query)
            found = ask(query)
            largest = max(largest, float((found - expected).abs().max()))
            same = same and int(found.argmax()) == int(expected.argmax())
    limit = _TOLERANCE.get(str(backbone.dtype).removeprefix("torch."), 0.25)
    if largest > limit or not same:
        raise MmeditError(
            f"the reloaded model is not the edited one: its logits are up to {largest:.3g} away",
            "please report it; the ledger is as it was",
        )
    return {"checked": len(queries), "largest_difference": largest}


def _last_logits(backbone: VisionLanguageModel, query: Query) -> Tensor:
    return backbone.logits(backbone.batch([query], with_answer=False))[0, -1].float()


def _through_backbone(
    backbone: VisionLanguageModel, model: Any
) -> Callable[[Query], Tensor]:
    """Return a function that asks a model of the same family through a backbone of its own."""
    other = type(backbone)(
        backbone.name,
        model.to(backbone.device),
        backbone.tokenizer,
        backbone.image_processor,
        backbone.fingerprint,
    )
    return lambda query: _last_logits(other, query)


def _as_a_user_does(
    backbone: VisionLanguageModel, model: Any
) -> Callable[[Query], Tensor]:
    """Return a function that asks an export with a runtime of its own as any transformers model."""

    def ask(query: Query) -> Tensor:
        reader = _reader(model, [query])
        logits: Tensor = reader(**inputs(backbone, [query])).logits
        return logits[0, -1].float()

    return ask


def _reader(model: Any, queries: Sequence[Query]) -> Any:
    """Return the module that takes questions: BLIP-2 wants a picture, without one its language model is asked."""
    parameters = inspect.signature(type(model).forward).parameters
    pixel_values = parameters.get("pixel_values")
    needs_picture = pixel_values and pixel_values.default is inspect.Parameter.empty
    if needs_picture and not any(query.image for query in queries):
        return model.language_model
    return model


def _check_generation(edited: LedgerModel, model: Any) -> dict[str, Any]:
    """Have an export continue an edit's question and another in one batch, with its cache and without.

    Raises MmeditError if the two differ, or if a question is not routed in company as it is alone; other formats than
    float32 round too much to tell.
    """
    if str(edited.backbone.dtype) != "torch.float32":
        return {}
    requests = [edit.request for edit in edited.ledger.active]
    newest = requests[-1]
    for request in reversed(requests):
        if request.image is not None:
            newest = request
            break
    other = replace(newest, prompt="What colour is the background?")
    fired = []
    texts = []
    for asked, use_cache in (
        ([newest], True),
        ([other], True),
        ([newest, other], True),
        ([newest, other], False),
    ):
        given = inputs(edited.backbone, asked)
        tokens = _reader(model, asked).generate(
            **given,
            max_new_tokens=_CONTINUED,
            do_sample=False,
            use_cache=use_cache,
        )
        length = given["input_ids"].shape[1]
        texts.append(edited.backbone.tokenizer.batch_decode(tokens[:, length:]))
        fired.append([set(weights) for weights in model.edits.weights])
    one, another, together, without_cache = fired
    routed_as_alone = one + another == together == without_cache
    if not routed_as_alone or texts[2] != texts[3]:
        raise MmeditError(
            "the reloaded model does not continue a batch as it should",
            "please report it; the ledger is as it was",
        )
    return {"continued": 2}


def inputs(
    backbone: VisionLanguageModel, queries: Sequence[Query]
) -> dict[str, Tensor]:
    """Return questions as the arguments of a plain transformers model, padded on the left."""
    from mmedit_cli.pictures import Picture, load_picture

    batch = backbone.batch(queries, with_answer=False, left_pad=True)
    found = {
        "input_ids": backbone.own_ids(batch),
        "attention_mask": batch.attention_mask,
        **backbone.token_types(batch),
    }
    pictures = []
    for query in queries:
        if query.image is not None:
            pictures.append(load_picture(Picture(query.image, query.background)))
    if pictures:
        found |= backbone.pixels(pictures)
    return found


# -- the model card, and the hub --------------------------------------------------------------------------------


def card(edited: LedgerModel, kind: str, name: str) -> str:
    """Return the README of an export: how it loads, what it was made from, and the edits."""
    from huggingface_hub import ModelCard, ModelCardData

    backbone = edited.backbone
    known = edited.ledger.config["model"]
    ledger = edited.ledger
    hub = known["source"].count("/") == 1 and not Path(known["source"]).exists()
    data = ModelCardData(
        library_name="peft" if kind == ADAPTERS else "transformers",
        tags=["mmedit", "knowledge-editing", ledger.config["editor"]],
        base_model=known["source"] if hub else None,
        pipeline_tag="image-text-to-text" if backbone.sees else "text-generation",
    )
    own_code = not type(backbone.model).__module__.startswith("transformers.")
    text = [
        f"# {name}",
        "",
        f"`{known['name']}` (fingerprint {known['fingerprint']}) with {counted(len(ledger.active), 'edit')} made by "
        f"`{ledger.config['editor']}` of mmedit {__version__}.",
        "",
        *_loading(kind, backbone, own_code=own_code),
        "",
        "## Edits",
        "",
        *_table(ledger.active),
        "",
        "The edits change what this model says about the questions above and about what it takes for the same; the "
        "licence of the base model holds.",
        "",
    ]
    head = f"---\n{data.to_yaml()}\n---\n\n"
    return str(ModelCard(head + "\n".join(text)))


def _table(edits: Sequence[LedgerEdit]) -> Iterator[str]:
    """Yield the lines of a table of edits."""
    yield "| edit | question | picture | answer before | answer taught |"
    yield "|---:|---|---|---|---|"
    for edit in edits[:_LISTED]:
        request = edit.request
        texts = (request.prompt, edit.picture, edit.before, request.target)
        cells = " | ".join(map(_cell, texts))
        yield f"| {edit.id} | {cells} |"
    more = len(edits) - _LISTED
    if more > 0:
        yield f"\nand {more:,} more in `edits.json`"


def _loading(
    kind: str, backbone: VisionLanguageModel, *, own_code: bool
) -> Iterator[str]:
    if kind == ADAPTERS:
        yield "PEFT adapters; `PeftModel.from_pretrained(base_model, FOLDER)` puts one on the base model."
        return
    remote = ", trust_remote_code=True" if kind == STANDALONE or own_code else ""
    if kind == STANDALONE:
        yield (
            f"The base model in `base/`, the edits in `edits.safetensors`, and `{RUNTIME}`, which chooses the edits "
            "for each question. It needs transformers and nothing else; `generate` and its cache work as usual. "
            "Engines that do not run the model's own Python code do not see the edits."
        )
    else:
        yield "Plain weights: the edits are in them."
    auto = backbone.auto_class
    reader = "AutoProcessor" if backbone.sees else "AutoTokenizer"
    yield from (
        "",
        "```python",
        f"from transformers import {auto}, {reader}",
        "",
    )
    yield f'model = {auto}.from_pretrained("FOLDER"{remote})'
    named = reader.removeprefix("Auto").lower()
    yield f'{named} = {reader}.from_pretrained("FOLDER"{remote})'
    yield "```"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
