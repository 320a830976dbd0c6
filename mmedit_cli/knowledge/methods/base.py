"""What every editor can do: edit, undo, save and load; and what it promises about the model."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from mmedit_cli.eight_bits import from_eight_bits
from mmedit_cli.errors import StateError
from mmedit_cli.hparams import to_dict
from mmedit_cli.identity import same_model
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.layers import at_depth
from mmedit_cli.output import counted
from mmedit_cli.reading import Record, parse_json, parse_json_object
from mmedit_cli.runtime import generator
from mmedit_cli.storage import sha256_of
from mmedit_cli.types import EditCase, Query

FORMAT = 1  # of saved states; a newer one is refused
TEXT_ONLY_HINT = "multi-melo and unike hold facts without a picture: name one of them, with a ledger of its own"


@dataclass(frozen=True)
class Operation:
    """One call of `edit`: its requests, an id for each, and what the editor reports about it (steps, loss)."""

    ids: tuple[int, ...]
    requests: tuple[Query, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


def check_shapes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], held: str
) -> None:
    """Raise StateError, naming what the state should hold, unless its tensors are those wanted, by name and shape."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise StateError(f"the state does not hold {held}")


@dataclass(frozen=True)
class Standalone:
    """Edits that run on a plain transformers model: the source of one Python file, tensors, and plain settings."""

    source: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


class EditHandle(AbstractContextManager["EditHandle"]):
    """What `edit` returns: the ids of the new edits. Used as a context manager, it undoes them at the end."""

    def __init__(self, editor: Editor, operation: Operation) -> None:
        self.editor = editor
        self.ids = operation.ids
        self.info = operation.info

    def __repr__(self) -> str:
        ids = ", ".join(map(str, self.ids))
        return f"<edits {ids} of {self.editor!r}>"

    def __exit__(self, *_: object) -> None:
        self.editor.undo(self.ids)


class Editor(ABC):
    """Changes the answers of one backbone; edits add up until they are undone.

    `first_layer` is the decoder layer below which no edit ever changes anything, so that everything below it may be
    cached. It is None if the image features or the prompt change. `hparams` is an instance of the class's own
    `Hparams`.

    `independent`: an edit depends on its own request alone, and each of the `tensors` has one row an edit.
    `plain`: the edited model is the same model with other weights; nothing is hooked or added.
    `needs_image`: facts without a picture cannot be taught.
    `encoder_decoder`: it works on models where an encoder reads the question and a decoder writes the answer, too.
    """

    hparams: Any

    name: ClassVar[str]
    Hparams: ClassVar[type]
    trains: ClassVar[bool] = False
    batch_edits: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False
    encoder_decoder: ClassVar[bool] = False

    def __init__(
        self, backbone: VisionLanguageModel, hparams: Any, *, seed: int = 0
    ) -> None:
        self.backbone = backbone
        self.hparams = at_depth(hparams, backbone.n_layers)
        self.seed = seed
        self.operations: list[Operation] = []
        self._next_id = 1

    def __repr__(self) -> str:
        return f"<{self.name} on {self.backbone.name}: {counted(len(self.requests), 'edit')}>"

    # -- what a method has to say -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def first_layer(self) -> int | None:
        """The decoder layer below which nothing ever changes; None if what enters the language model changes."""

    @abstractmethod
    def _apply(self, requests: Sequence[Query], source: Generator) -> dict[str, Any]:
        """Make the edits on top of the present ones; return numbers about how it went."""

    @abstractmethod
    def _reset(self) -> None:
        """Take every edit back: afterwards the model is the base model, bit for bit."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Return the edits as tensors."""

    @abstractmethod
    def _load_tensors(
        self, tensors: Mapping[str, Tensor], requests: Sequence[Query]
    ) -> None:
        """Make the edits of these requests from what `_tensors` returned; raise StateError if it does not fit.

        There are no edits when it is called.
        """

    def _keep(self, positions: Sequence[int]) -> bool:
        """Keep the edits at these positions of `requests`, one at least, drop the others, and return True.

        The default returns False; the remaining edits are then made again.
        """
        return False

    def affects(self, queries: Sequence[Query]) -> list[bool]:
        """Return for each query whether the present edits may change anything about its answer.

        The default is True for every query once there is an edit. Methods that route override it.
        """
        return [bool(self.operations)] * len(queries)

    def routes(self, queries: Sequence[Query]) -> list[int | None] | None:
        """Return for each query the id of the edit that answers it, or None if the base model does.

        The default returns None instead of a list. Methods that send a query to one edit override it.
        """
        return None

    def explain(self, queries: Sequence[Query]) -> list[dict[int, float]] | None:
        """Return for each query the weights of the edits that take part in its answer, by id, the largest first.

        By default the edit that `routes` names has the whole weight; without routes the result is None.
        """
        routes = self.routes(queries)
        if routes is None:
            return None
        return [{} if edit is None else {edit: 1.0} for edit in routes]

    def save_adapters(self, folder: Path) -> dict[Path, tuple[Query, ...]]:
        """Write the edits as PEFT adapters into new folders inside `folder`.

        Returns each folder with the requests that its adapter answers as the edited model does. The default writes
        nothing. Methods whose edits are LoRA blocks override it.
        """
        return {}

    def standalone(self) -> Standalone | None:
        """Return the edits as something that runs without this package; None if the method cannot.

        Raises UserError if it cannot with these hyper-parameters.
        """
        return None

    # -- the verbs ----------------------------------------------------------------------------------------------

    def edit(self, requests: Sequence[Query]) -> EditHandle:
        """Teach the requests, all in one operation; without requests nothing changes.

        If it fails, the earlier edits stay as they were. Raises DataError for a request the method cannot use.
        """
        ids = tuple(range(self._next_id, self._next_id + len(requests)))
        if not requests:
            return EditHandle(self, Operation((), ()))
        try:
            info = self._apply(requests, self._source(ids[0]))
        except BaseException:
            present = range(len(self.requests))
            if not present or not self._keep(present):
                self._replay(self.operations)
            raise
        operation = Operation(ids, tuple(requests), info)
        self.operations.append(operation)
        self._next_id += len(requests)
        return EditHandle(self, operation)

    def undo(self, ids: Sequence[int] | None = None) -> None:
        """Take back the edits with these ids, or all; the model is then as if they had never been made.

        Raises StateError for an id that is not there. Methods that cannot remove one edit alone make the remaining
        ones again, in order and with the same randomness.
        """
        known = self.ids
        gone = set(known if ids is None else ids)
        missing = gone - set(known)
        if missing:
            raise StateError(
                f"no edit {min(missing)} to undo", f"there are {len(known)} edits"
            )
        rest: list[Operation] = []
        for operation in self.operations:
            remaining = _without(operation, gone)
            if remaining.ids:
                rest.append(remaining)
        positions = [position for position, i in enumerate(known) if i not in gone]
        if rest and self._keep(positions):
            self.operations = rest
        else:
            self._replay(rest)

    def replay(self, operations: Sequence[Operation]) -> None:
        """Take everything back and make these edits, in order and with the randomness that belongs to their ids."""
        self._replay(operations)
        for operation in operations:
            after = max(operation.ids) + 1
            self._next_id = max(self._next_id, after)

    @property
    def ids(self) -> list[int]:
        """The ids of all present edits, in order."""
        return [i for operation in self.operations for i in operation.ids]

    @property
    def requests(self) -> list[Query]:
        """The requests of all present edits, in order."""
        every: list[Query] = []
        for operation in self.operations:
            every += operation.requests
        return every

    def _replay(self, operations: Sequence[Operation]) -> None:
        self._reset()
        self.operations = []
        for operation in operations:
            ids = operation.ids
            requests = operation.requests
            info = self._apply(requests, self._source(ids[0]))
            self.operations.append(Operation(ids, requests, info))

    def _source(self, first_id: int) -> Generator:
        return generator(self.seed * 1_000_003 + first_id)

    # -- saving -------------------------------------------------------------------------------------------------

    def tensors(self, start: int = 0) -> dict[str, Tensor]:
        """Return the edits as tensors; of an `independent` editor, the rows of the edits from position `start` on."""
        tensors = self._tensors()
        if not self.independent:
            return tensors
        return {name: tensor[start:] for name, tensor in tensors.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return (tensors, metadata) from which `load_state` makes the same edited model on the same base model."""
        operations = [
            {
                "ids": operation.ids,
                "requests": [_to_json(query) for query in operation.requests],
                "info": dict(operation.info),
            }
            for operation in self.operations
        ]
        metadata = {
            **self._identity(),
            "next_id": str(self._next_id),
            "operations": json.dumps(operations),
        }
        return self._tensors(), metadata

    def load_state(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Replace the present edits by saved ones; raise StateError if they belong to another model or editor."""
        if int(metadata.get("format", 0)) > FORMAT:
            raise StateError(
                f"the state has format {metadata['format']}, newer than {FORMAT}",
                "upgrade mmedit",
            )
        for key, value in self._identity().items():
            if not self._agrees(key, metadata.get(key), value):
                raise StateError(
                    f"the state was made with {key} {metadata.get(key)}, this editor has {value}"
                )
        values: dict[str, Any] = {}
        for key in ("operations", "next_id"):
            text = metadata.get(key, "null")
            place = f"the state: {key}"
            values[key] = parse_json(
                text,
                place,
                halves=True,
                error=StateError,
            )
        about = Record(
            values,
            "the state",
            error=StateError,
        )
        operations = [_operation(record) for record in about.records("operations")]
        requests: list[Query] = []
        for operation in operations:
            requests += operation.requests
        self._replay([])
        self._load_tensors(tensors, requests)
        self.operations = operations
        self._next_id = about.integer("next_id", low=0)

    def save(self, path: Path) -> None:
        """Write the state to one safetensors file."""
        from mmedit_cli.storage import write_tensors

        write_tensors(path, *self.state())

    def load(self, path: Path) -> None:
        """Read a state written by `save`; raise StateError if the file or its content does not fit."""
        self.load_state(*read_state(path))

    def _agrees(self, key: str, known: str | None, value: str) -> bool:
        """Whether a value in a file is ours; a file may name the model by its former fingerprint.

        A hyper-parameter that is null may be missing: there was none when the file was written.
        """
        if key in ("hparams", "networks") and known is not None:
            return _given(known) == _given(value)
        former = self.backbone.former if key == "model" else ""
        return same_model(known, value, former)

    def _identity(self) -> dict[str, str]:
        return {
            "format": str(FORMAT),
            "editor": self.name,
            "model": self.backbone.fingerprint,
            "dtype": str(self.backbone.dtype),
            "hparams": json.dumps(to_dict(self.hparams), sort_keys=True),
            "seed": str(self.seed),
        }


class TrainedEditor(Editor):
    """An editor with networks that are trained once for a model, before the first edit.

    `architecture` names the hyper-parameters that determine the shapes of the networks. `trained` is the digest of the
    checkpoint that the weights come from, or "untrained".
    """

    trains = True
    architecture: ClassVar[tuple[str, ...]]
    networks: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained = "untrained"

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Inside the block `networks` is made, from the seed alone; behind it they are frozen and with the model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield
        self.networks.to(self.backbone.device).eval().requires_grad_(False)

    @property
    def calibrated(self) -> Mapping[str, Sequence[float]]:
        """The hyper-parameters that are chosen on held-out cases after the training, each with the values to try."""
        return {}

    def gather(self, cases: Sequence[EditCase]) -> str:
        """Collect whatever else the networks are trained on from the training cases, once, before the first step.

        Returns a line that says what was found; the default collects nothing.
        """
        return ""

    def finalize(self) -> None:
        """Compute what depends on the networks as they are now; called before they are scored and stored."""

    @abstractmethod
    def losses(
        self,
        cases: Sequence[EditCase],
        source: Generator,
        *,
        others: Sequence[EditCase] = (),
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Tensor]:
        """Return every loss of one training batch by name, `total` among them, with gradients to the networks.

        `others` are further edits that no query of the batch is about. This is process `rank` of `world`: totals and
        gradients of all processes add up to those of the whole batch.
        Raises DataError for a case the method cannot learn from.
        """

    def networks_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return (tensors, metadata) of a checkpoint."""
        networks = self.networks.state_dict()
        tensors = {name: value.detach().clone() for name, value in networks.items()}
        fingerprint = self.backbone.fingerprint
        return tensors, self.networks_metadata(self.hparams, fingerprint)

    @classmethod
    def networks_metadata(cls, hparams: Any, fingerprint: str) -> dict[str, str]:
        """Return what a checkpoint says of networks with these hyper-parameters, for the model of a fingerprint."""
        return {
            **cls._identity_of(hparams, fingerprint),
            "format": str(FORMAT),
            "hparams": json.dumps(_without_training(hparams)),
        }

    def load_networks(self, path: Path) -> None:
        """Read a checkpoint; raise StateError if it is damaged or was made for another model or other networks."""
        tensors, metadata = read_state(path)
        for key, value in self._networks_identity().items():
            if not self._agrees(key, metadata.get(key), value):
                raise StateError(
                    f"{path}: trained for {key} {metadata.get(key)}, this is {value}"
                )
        self._replay([])  # edits belong to the networks that made them
        try:
            self.networks.load_state_dict(from_eight_bits(tensors))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise StateError(f"{path}: does not fit: {reason}") from error
        self.trained = sha256_of(path)

    def _networks_identity(self) -> dict[str, str]:
        return self._identity_of(self.hparams, self.backbone.fingerprint)

    @classmethod
    def _identity_of(cls, hparams: Any, fingerprint: str) -> dict[str, str]:
        shapes = {key: getattr(hparams, key) for key in cls.architecture}
        return {
            "editor": cls.name,
            "model": fingerprint,
            "networks": json.dumps(shapes),
        }

    def _identity(self) -> dict[str, str]:
        hparams = _without_training(self.hparams)
        return {
            **super()._identity(),
            "hparams": json.dumps(hparams, sort_keys=True),
            "checkpoint": self.trained,
        }


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file; raise StateError if it cannot be read."""
    from mmedit_cli.storage import read_tensors

    return read_tensors(path)


def _without(operation: Operation, ids: set[int]) -> Operation:
    """Return an operation without the requests that have these ids."""
    pairs = zip(operation.ids, operation.requests, strict=True)
    kept = [(i, request) for i, request in pairs if i not in ids]
    return Operation(
        ids=tuple(i for i, _ in kept),
        requests=tuple(request for _, request in kept),
        info=operation.info,
    )


def _given(values: str) -> dict[str, Any]:
    """Return the hyper-parameters in a JSON object that are not null."""
    found = parse_json_object(
        values,
        "the state: hyper-parameters",
        error=StateError,
    )
    return {name: value for name, value in found.values.items() if value is not None}


def _without_training(hparams: Any) -> dict[str, Any]:
    """Return hyper-parameters without those that no edit depends on once the networks are trained."""
    values = to_dict(hparams)
    values.pop("training", None)
    return values


def _to_json(query: Query) -> dict[str, Any]:
    return {**vars(query), "image": None if query.image is None else str(query.image)}


def _operation(saved: Record) -> Operation:
    requests = tuple(_from_json(request) for request in saved.records("requests"))
    return Operation(
        tuple(saved.array("ids", int)), requests, dict(saved.mapping("info"))
    )


def _from_json(record: Record) -> Query:
    record.only(*(field.name for field in fields(Query)))
    image = record.path("image") if record.values.get("image") is not None else None
    texts = {
        key: record.text(key) for key in record.values if key not in ("image", "chat")
    }
    return Query(
        image=Path(image) if image else None, chat=record.flag("chat", False), **texts
    )
