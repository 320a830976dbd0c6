"""A model with the edits of a ledger on it: open, ask, edit, undo, redo, verify."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmedit_cli import registry, runtime
from mmedit_cli.catalog import ModelRef, find_model
from mmedit_cli.errors import DataError, ModelError, StateError, UserError
from mmedit_cli.hparams import load_hparams, to_dict
from mmedit_cli.identity import is_former, same_model
from mmedit_cli.knowledge.ledger.ledger import Ledger, LedgerEdit
from mmedit_cli.knowledge.loading import (
    ModelOptions,
    check_sight,
    depth_of,
    give_networks,
    load_model,
    networks_of,
    resolve_editor,
    variant_for,
)
from mmedit_cli.knowledge.trained_networks import networks_line
from mmedit_cli.output import Output, counted
from mmedit_cli.records import Run
from mmedit_cli.shapes import told
from mmedit_cli.storage import sha256_of
from mmedit_cli.types import Query

if TYPE_CHECKING:
    from mmedit_cli.knowledge.methods.base import Editor
    from mmedit_cli.knowledge.models.base import VisionLanguageModel

T = TypeVar("T")
_BATCH = 32  # questions of one forward pass


@dataclass(frozen=True)
class EditOptions:
    """The settings of a new ledger; for a ledger that is there already, the options given must agree with its own.

    Without a name of the model it is the ledger's, or the default one for a new ledger; so is the seed, or 0.
    """

    editor: str
    model: ModelOptions = field(default_factory=ModelOptions)
    hparams: Path | None = None
    overrides: Sequence[str] = ()
    checkpoint: Path | str | None = None
    seed: int | None = None
    records: Path = Path("records")


class LedgerModel(AbstractContextManager["LedgerModel"]):
    """A model with the active edits of a ledger on it; leaving takes them off the model and keeps them in the ledger.

    What `edit`, `undo` and `redo` change is in the ledger when they return. `seconds` were spent on making edits and
    keeping them.
    """

    def __init__(
        self, ledger: Ledger, backbone: VisionLanguageModel, editor: Editor
    ) -> None:
        self.ledger = ledger
        self.backbone = backbone
        self.editor = editor
        self.seconds = 0.0

    def __repr__(self) -> str:
        active = counted(len(self.ledger.active), "active edit")
        return f"<LedgerModel {self.ledger.folder}: {active}, {self.editor!r}>"

    def generate(
        self, queries: Sequence[Query], *, max_new_tokens: int = 32
    ) -> list[str]:
        """Return the greedy answers of the edited model, at most `max_new_tokens` long, or as long as targets need."""
        from mmedit_cli.knowledge.evaluation.answers import tokens_for

        texts: list[str] = []
        for at in range(0, len(queries), _BATCH):
            part = queries[at : at + _BATCH]
            texts += self.backbone.generate(
                part, max_new_tokens=tokens_for(self.backbone, part, max_new_tokens)
            )
        return texts

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]] | None:
        """Return for each query the weights of the edits that take part in its answer; None if the method has none."""
        # an editor may encode the target, but never reads it
        asked = [replace(query, target=query.target or "?") for query in queries]
        return self.editor.explain(asked)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model is the base model, bit for bit."""
        tensors, metadata = self.editor.state()
        self.editor.undo()
        try:
            yield
        finally:
            self.editor.load_state(tensors, metadata)

    def edit(
        self,
        requests: Sequence[Query],
        *,
        batch: int | None = None,
        tick: Callable[[str, int], None] | None = None,
    ) -> list[int]:
        """Make edits and append them to the ledger, `batch` in one operation; return their ids.

        The default is one by one, or 32 at a time where edits are independent of each other. Raises DataError for
        requests that cannot be used before any is made.
        """
        self.check(requests)
        kept = [self.ledger.keep_picture(request) for request in requests]
        names = [
            "" if request.image is None else request.image.name for request in requests
        ]
        size = batch or (_BATCH if self.editor.independent else 1)
        ids: list[int] = []
        for at in range(0, len(kept), size):
            part = slice(at, at + size)
            # only now, so that a batch that is repeated after a kill is the same
            before = self.generate(kept[part])
            start = time.perf_counter()
            made = self.editor.edit(kept[part])
            first_row = 0
            if self.ledger.rows:
                first_row = len(self.editor.requests) - len(made.ids)
            tensors = self.editor.tensors(first_row)
            try:
                ids += self.ledger.add(
                    kept[part],
                    tensors,
                    before=before,
                    names=names[part],
                )
            except BaseException:
                self.editor.undo(made.ids)
                raise
            self.seconds += time.perf_counter() - start
            if tick is not None:
                tick("edits", len(made.ids))
        return ids

    def undo(self, ids: Sequence[int]) -> None:
        """Take edits back; raise StateError for one that is not active."""
        self.editor.undo(ids)
        self._mark("undo", ids)

    def redo(self, ids: Sequence[int]) -> None:
        """Make edits that were undone again, in their old places; all that followed them are as they would be then."""
        from mmedit_cli.knowledge.methods.base import Operation

        if self.ledger.rows:
            self._mark("redo", ids)
            _put_on(self.editor, self.ledger)
        else:
            operations = self.ledger.operations(also=ids)
            self.editor.replay([Operation(*pair) for pair in operations])
            self._mark("redo", ids)

    def verify(
        self, tick: Callable[[str, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Ask every active edit again; return for each its answer, whether it holds, and what took its place.

        An edit that a later one with the same picture and question replaced is not asked to hold.
        """
        from mmedit_cli.knowledge.evaluation.metrics import answer_match

        newest = {question(edit.request): edit.id for edit in self.ledger.active}
        found = []
        for at in range(0, len(self.ledger.active), _BATCH):
            part = self.ledger.active[at : at + _BATCH]
            answers = self.generate([edit.request for edit in part])
            for edit, answer in zip(part, answers, strict=True):
                by = newest[question(edit.request)]
                line = described(edit)
                line["answer"] = answer
                line["replaced_by"] = None if by == edit.id else by
                line["holds"] = answer_match(answer, edit.request.target) == 1
                found.append(line)
            if tick is not None:
                tick("edits", len(part))
        return found

    def close(self) -> None:
        """Take the edits off the model and let go of the ledger."""
        self.editor.undo()
        self.ledger.close()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self.editor.undo()
        finally:
            self.ledger.__exit__(error, *_)

    def _mark(self, do: str, ids: Sequence[int]) -> None:
        self.ledger.mark(
            do,
            ids,
            None if self.ledger.rows else self.editor.tensors(),
        )

    def check(self, requests: Sequence[Query]) -> None:
        """Raise DataError for requests that cannot be used, naming each problem (at most 20)."""
        from mmedit_cli.knowledge.evaluation.answers import check_sayable

        check_pictures(requests)
        _check_all(requests, self.backbone.encode)
        _check_all(requests, partial(check_sayable, self.backbone))


def check_pictures(requests: Sequence[Query]) -> None:
    """Raise DataError naming each picture that is missing or none (at most 20)."""
    from mmedit_cli.pictures import check_picture

    pictures = [request.image for request in requests if request.image is not None]
    _check_all(pictures, check_picture)


def _check_all(things: Sequence[T], check: Callable[[T], object]) -> None:
    """Run a check on each thing; raise one DataError with all problems, at most 20."""
    problems: list[str] = []
    hint = ""
    for thing in things:
        try:
            check(thing)
        except DataError as error:
            problems += error.problems
            hint = hint or error.hint
    if problems:
        raise DataError(problems[:20], hint)


# -- opening ----------------------------------------------------------------------------------------------------


def open_edits(
    folder: Path | str,
    *,
    model: ModelOptions | None = None,
    writing: bool = False,
    bare: bool = False,
    out: Output | None = None,
    backbone: VisionLanguageModel | None = None,
) -> LedgerModel:
    """Return the model of a ledger with its active edits on it (`bare`: with none), for `with`.

    `model` says where the model lies now, and the device; `backbone` is that model, where it is loaded already. Raises
    UserError if there is no ledger, StateError for another model or a damaged ledger, RunError if `writing` while
    another process writes.
    """
    ledger = Ledger.open(
        Path(folder),
        writing=writing,
        tensors=not bare,
    )
    return _opened(
        ledger,
        model or ModelOptions(),
        bare,
        out or Output(quiet=True),
        backbone,
    )


def _opened(
    ledger: Ledger,
    options: ModelOptions,
    bare: bool,
    out: Output,
    backbone: VisionLanguageModel | None = None,
) -> LedgerModel:
    """Return the model of an open ledger, which is closed if that fails."""
    try:
        ref = _model_of(ledger, options)
        if is_former(ledger.config["model"]["fingerprint"], ref.former):
            out.note(
                f"{ledger.folder}: begun with mmedit 0.1.0, whose fingerprint of a model reads samples of its weights"
            )
        dtype = _dtype_of(ledger, options)
        if backbone is None:
            backbone = load_model(replace(options, dtype=dtype), ref, out)
        elif _format_of(backbone) != dtype:
            raise StateError(
                f"{ledger.folder}: made in {dtype}, and the model is in {_format_of(backbone)}",
                f"load the model with --dtype {dtype}",
            )
        editor = _editor_of(ledger, backbone)
        if not bare:
            _put_on(editor, ledger)
    except BaseException:
        ledger.close()
        raise
    return LedgerModel(ledger, backbone, editor)


def begin_edits(
    folder: Path | str,
    options: EditOptions,
    out: Output | None = None,
    backbone: VisionLanguageModel | None = None,
) -> LedgerModel:
    """Return the model of a ledger, open for writing: of the one in the folder if it agrees, else of a new one.

    `backbone` is the model of the options, where it is loaded already.
    Raises StateError if the ledger there is of another model, editor or setting, and UserError as `load_editor` does.
    """
    folder = Path(folder)
    out = out or Output(quiet=True)
    # refuses a folder of something else before anything is made in it
    Ledger.exists(folder)
    # before the state is read: two commands may begin the same ledger
    run = Run.lock(folder)
    try:
        if not Ledger.exists(folder):
            return _begun(folder, options, run, out, backbone)
        _check_agreement(folder, options)
        ledger = Ledger.open(folder, writing=True, run=run)
        return _opened(ledger, options.model, False, out, backbone)
    except BaseException:
        if (folder / "run.yaml").exists():
            run.close()
        else:
            run.discard()
        raise


def _begun(
    folder: Path,
    options: EditOptions,
    run: Run,
    out: Output,
    backbone: VisionLanguageModel | None = None,
) -> LedgerModel:
    """Return a model with a new ledger in a folder whose lock is held."""
    ref = find_model(options.model.named, revision=options.model.revision)
    check_sight(options.editor, ref)
    found = networks_of(
        options.editor,
        ref.name,
        options.records,
        options.checkpoint,
    )
    networks = None if found is None else found.path
    variant = variant_for(options.editor, ref, options.hparams)
    cls, hparams = resolve_editor(
        options.editor,
        variant,
        options.hparams,
        options.overrides,
        networks,
        depth=depth_of(ref),
    )
    out.note(told(options.editor, variant))
    if backbone is None:
        backbone = load_model(options.model, ref, out)
    editor: Editor = cls(backbone, hparams, seed=options.seed or 0)
    if found is not None:
        out.note(networks_line(found.facts()))
        give_networks(editor, found.path)
    _, state = editor.state()
    config = {
        "editor": editor.name,
        "hparams": to_dict(editor.hparams),
        "variant": variant,
        "model": {
            **ref.described(),
            "source": _source(options.model.named),
            "revision": options.model.revision,
        },
        "dtype": _format_of(backbone),
        "seed": editor.seed,
        "rows": editor.independent,
        "checkpoint": None if networks is None else sha256_of(networks),
        "networks": None if found is None else found.facts(),
        "state": {
            key: value
            for key, value in state.items()
            if key not in ("operations", "next_id")
        },
    }
    environment = {
        **runtime.environment(backbone.device),
        "versions": runtime.versions(),
    }
    ledger = Ledger.create(folder, config, environment, networks, run)
    return LedgerModel(ledger, backbone, editor)


def _put_on(editor: Editor, ledger: Ledger) -> None:
    """Make the editor's edits those of the ledger."""
    operations = []
    for ids, queries in ledger.operations():
        requests = [
            {**vars(query), "image": query.image and str(query.image)}
            for query in queries
        ]
        operations.append({"ids": list(ids), "requests": requests, "info": {}})
    metadata = {
        **ledger.config["state"],
        "operations": json.dumps(operations),
        "next_id": str(ledger.next_id),
    }
    tensors = ledger.tensors()
    if ledger.rows and not tensors:  # an editor wants its tensors, if with no rows
        tensors = editor.state()[0]
    editor.load_state(tensors, metadata)


def _model_of(ledger: Ledger, options: ModelOptions) -> ModelRef:
    known = ledger.config["model"]
    try:
        ref = find_model(
            options.model or known["source"],
            revision=options.revision or known["revision"],
        )
    except ModelError as error:
        if options.model:
            raise
        raise ModelError(
            error.problems, f"--model says where {known['name']} is now"
        ) from error
    _check_model(ledger.folder, known, ref)
    return ref


def _check_model(folder: Path, known: dict[str, Any], ref: ModelRef) -> None:
    if not same_model(known["fingerprint"], ref.fingerprint, ref.former):
        raise StateError(
            f"{folder}: edits of {known['name']} ({known['fingerprint']}), and {ref.name} is another model "
            f"({ref.fingerprint})",
            "edits belong to the weights they were made on; --model says where those are",
        )


def _format_of(backbone: VisionLanguageModel) -> str:
    return str(backbone.dtype).removeprefix("torch.")


def _dtype_of(ledger: Ledger, options: ModelOptions) -> str:
    known = str(ledger.config["dtype"])
    if options.dtype not in ("auto", known):
        raise UserError(
            f"--dtype {options.dtype}: the edits in {ledger.folder} were made in {known}",
            "leave it out",
        )
    return known


def _editor_of(ledger: Ledger, backbone: VisionLanguageModel) -> Editor:
    config = ledger.config
    name = config["editor"]
    cls = registry.editors.get(name)
    hparams = load_hparams(
        registry.hparams_file(name),
        cls.Hparams,
        stored=config["hparams"],
        stored_in=f"{ledger.folder / 'run.yaml'}: hparams",
    )
    editor: Editor = cls(backbone, hparams, seed=config["seed"])
    networks = ledger.networks
    if networks is not None:
        if not networks.is_file() or sha256_of(networks) != config["checkpoint"]:
            raise StateError(
                f"{networks}: not the networks the edits were made with",
                "put them back",
            )
        give_networks(editor, networks)
    return editor


def _check_agreement(folder: Path, options: EditOptions) -> None:
    """Raise StateError if something was asked for that the ledger in the folder is not."""
    other = "name another folder with --into, or leave the option out"
    with Ledger.open(folder) as ledger:
        config = ledger.config
    if registry.editors.get(options.editor).name != config["editor"]:
        raise StateError(
            f"{folder}: holds edits of {config['editor']}, not of {options.editor}",
            other,
        )
    if options.model.model:
        _check_model(
            folder,
            config["model"],
            find_model(options.model.model, revision=options.model.revision),
        )
    if options.seed not in (None, config["seed"]):
        raise StateError(
            f"--seed {options.seed}: {folder} was begun with {config['seed']}", other
        )
    found = None
    if options.checkpoint is not None:
        found = networks_of(
            config["editor"],
            config["model"]["name"],
            options.records,
            options.checkpoint,
        )
    if found is not None and sha256_of(found.path) != config["checkpoint"]:
        raise StateError(
            f"--checkpoint {options.checkpoint}: {folder} was begun with other networks",
            other,
        )
    if options.hparams is None and not options.overrides:
        return
    # version 0.1.0 went by the name of the model
    variant = config.get("variant", config["model"]["name"])
    _, asked = resolve_editor(
        options.editor,
        variant,
        options.hparams,
        options.overrides,
        ledger.networks,
        depth=depth_of(_model_of(ledger, options.model)),
    )
    wanted = to_dict(asked)
    differ = [
        key
        for key, value in wanted.items()
        if key != "training" and value != config["hparams"].get(key)
    ]
    if differ:
        raise StateError(
            f"{folder}: was begun with other hyper-parameters ({', '.join(differ)})",
            other,
        )


def _source(model: str) -> str:
    """Return how the model is found again from elsewhere: a folder by its whole path."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def question(query: Query) -> tuple[Any, ...]:
    """Return what two requests share if the later one takes the place of the earlier."""
    return query.prompt, query.image, query.background, query.chat


def described(edit: LedgerEdit) -> dict[str, Any]:
    """Return an edit as plain values."""
    query = edit.request
    return {
        "id": edit.id,
        "prompt": query.prompt,
        "picture": edit.picture,
        "target": query.target,
        "before": edit.before,
        "active": edit.active,
        "time": edit.time,
        "image": None if query.image is None else query.image.name,
        "background": query.background,
    }


def head(ledger: Ledger) -> dict[str, Any]:
    """Return what a ledger holds, as plain values."""
    config = ledger.config
    return {
        "ledger": str(ledger.folder),
        "editor": config["editor"],
        "model": config["model"]["name"],
        "dtype": config["dtype"],
        "edits": len(ledger.edits),
        "active": len(ledger.active),
    }
