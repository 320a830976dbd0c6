"""The base class of concept editors: closed forms that change what a text-to-image model draws for a text."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmedit_cli.drawing.methods.shared.closed_form import (
    Rows,
    changed,
    kept,
    ridge_change,
)
from mmedit_cli.drawing.methods.shared.token_pairs import (
    PAIRINGS,
    Pairing,
    Spelled,
    same_article,
)
from mmedit_cli.drawing.models.stable_diffusion import StableDiffusion
from mmedit_cli.errors import DataError, MmeditError, StateError
from mmedit_cli.patch import Patch
from mmedit_cli.reading import parse_json_object
from mmedit_cli.storage import read_tensors, write_tensors
from mmedit_cli.types import ConceptChange

FORMAT = "1"  # of the files of edits; another is refused


@dataclass(frozen=True)
class ConceptHparams:
    """What the closed forms have in common; see hparams/uce.yaml for what each value means."""

    lam: float = 0.5
    edit_scale: float = 1.0
    keep_scale: float = 1.0
    roles: tuple[Literal["k", "v"], ...] = ("k", "v")
    pairing: Pairing = "last"
    templates: tuple[str, ...] = ("{}",)
    anchor: str = ""
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lam <= 0:
            raise ValueError(f"lam must be above 0, not {self.lam}")
        if self.edit_scale <= 0 or self.keep_scale < 0:
            raise ValueError("edit_scale must be above 0, and keep_scale not below it")
        if not self.roles:
            raise ValueError("roles must name k, or v, or both")
        without = [text for text in self.templates if "{}" not in text]
        if without or not self.templates:
            raise ValueError("templates must have {} where the text stands")


@dataclass(frozen=True, eq=False)
class ConceptEdit:
    """An edit that was made: what its rows are, whatever other edits there are.

    `inputs` and `goals` (n, D) are paired encodings in float32; their sums are all that a closed form reads.
    `kept` are the encodings (t, D) of each text whose keys and values are to stay.
    """

    change: ConceptChange
    inputs: Tensor
    goals: Tensor
    kept: Mapping[str, Tensor]


class ConceptEditor(AbstractContextManager["ConceptEditor"], ABC):
    """Edits what a model draws for texts, by a change of the keys and values that all cross attentions read.

    The weights are always computed from those of the base model and from all edits that are present: so undo of any
    edit gives the bits of a model that never had it, the order of edits means nothing, and without edits the model is
    the base model. Of several edits of one text the last one counts.
    """

    name: ClassVar[str]
    Hparams: ClassVar[type]

    def __init__(self, model: StableDiffusion, hparams: Any) -> None:
        self.model = model
        self.hparams = hparams
        self.edits: dict[int, ConceptEdit] = {}
        self.undone: set[int] = set()
        self._patch = Patch(model.model)
        self._encoded: dict[str, list[tuple[Spelled, Tensor]]] = {}

    @abstractmethod
    def _solve(
        self, weights: Mapping[str, Tensor], edits: Rows, stays: Rows
    ) -> Mapping[str, Tensor]:
        """Return the edited weights (O, D) in float64 by path, given the rows of all edits and of what stays."""

    # -- the verbs ----------------------------------------------------------------------------------------------

    def edit(self, changes: Sequence[ConceptChange]) -> list[int]:
        """Make edits and return their ids; after an error the model and the earlier edits are as they were."""
        made = [self.make(change) for change in changes]
        first = max(self.edits, default=0) + 1
        new = dict(enumerate(made, first))
        before = self.edits
        self.edits = {**before, **new}
        try:
            self.apply()
        except BaseException:
            self.edits = before
            self.apply()
            raise
        return list(new)

    def undo(self, ids: Iterable[int]) -> None:
        """Take edits back; raise StateError for one that is not there or is undone already."""
        self._mark(ids, undone=True)

    def redo(self, ids: Iterable[int]) -> None:
        """Bring back edits that were undone; raise StateError for others."""
        self._mark(ids, undone=False)

    def close(self) -> None:
        """Take all edits out of the model and forget them."""
        self._patch.undo()
        self.edits = {}
        self.undone = set()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mark(self, ids: Iterable[int], *, undone: bool) -> None:
        wanted = set(ids)
        for i in wanted:
            if i not in self.edits or (i in self.undone) == undone:
                word = "active" if undone else "undone"
                raise StateError(
                    f"{i}: no {word} edit", f"there are: {list(self.edits)}"
                )
        self.undone = self.undone | wanted if undone else self.undone - wanted
        self.apply()

    # -- making an edit -----------------------------------------------------------------------------------------

    def make(self, change: ConceptChange) -> ConceptEdit:
        """Return an edit, and leave the model as it is; raise DataError for texts that cannot be used."""
        if not change.source.strip():
            raise DataError("an empty text: nothing to change", 'e.g. "a rose"')
        inputs = []
        goals = []
        for template in self.hparams.templates:
            source_rows, goal_rows = self._paired(template, change)
            inputs.append(source_rows)
            goals.append(goal_rows)
        texts = dict.fromkeys((*change.keep, *self.hparams.keep))
        return ConceptEdit(
            change,
            torch.cat(inputs),
            torch.cat(goals),
            {text: self._stays(text) for text in texts},
        )

    def _paired(self, template: str, change: ConceptChange) -> tuple[Tensor, Tensor]:
        """Return the encodings (n, D) of the source's tokens, and those they are to act as: the mean over targets."""
        sources = self._encode(template.replace("{}", change.source))
        pair = PAIRINGS[self.hparams.pairing]
        inputs = torch.empty(0)
        goals = []
        for text in change.targets or (self.hparams.anchor,):
            # an empty target stands alone: "a photo of " is no empty prompt
            wording = template.replace("{}", text) if text else ""
            of_sources = []
            of_targets = []
            for one, other in zip(sources, self._encode(wording), strict=True):
                source, states = one
                target, target_states = other
                positions = pair(source, target)
                of_sources.append(states[[i for i, _ in positions]])
                of_targets.append(target_states[[j for _, j in positions]])
            inputs = torch.cat(of_sources)
            goals.append(torch.cat(of_targets))
        return inputs, torch.stack(goals).mean(0)

    def _stays(self, text: str) -> Tensor:
        """Return the encodings (t, D) of a text that is to stay as it is."""
        rows = []
        for template in self.hparams.templates:
            for spelled, states in self._encode(template.replace("{}", text)):
                positions = PAIRINGS[self.hparams.pairing](spelled, spelled)
                rows.append(states[[i for i, _ in positions]])
        return torch.cat(rows)

    def _encode(self, text: str) -> list[tuple[Spelled, Tensor]]:
        """Do `_spell_and_encode`, once for each text."""
        known = self._encoded.get(text)
        if known is None:
            known = self._spell_and_encode(text)
            self._encoded[text] = known
        return known

    @torch.no_grad()
    def _spell_and_encode(self, text: str) -> list[tuple[Spelled, Tensor]]:
        """Return a text as ids, and the encodings (N, D) of its tokens in float32, by each tokenizer that has some.

        Each text is encoded alone. Raises DataError for a text that is cut off.
        """
        tokens = self.model.tokenize([text])
        states = self.model.encode(tokens).hidden[0].float().cpu()
        found = []
        for index, start in self.model.spellings():
            tokenizer = self.model.tokenizers[index]
            whole = tokenizer(text)["input_ids"]
            ids = tokens.ids[index][0].tolist()
            if len(whole) > len(ids):
                raise DataError(
                    f"{text!r}: longer than the {len(ids)} tokens the model reads",
                    "shorten the prompt",
                )
            plain = same_article(ids, _only(tokenizer, "a"), _only(tokenizer, "an"))
            rows = states[start : start + len(ids)]
            found.append((Spelled(text, plain, len(whole)), rows))
        return found

    # -- the model ----------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Give the model the weights of the base model with just the active edits."""
        self._patch.undo()
        present = self.present()
        if not present:
            return
        weights = {}
        for projection in self.model.cross_attention():
            if projection.role in self.hparams.roles:
                path = f"{projection.path}.weight"
                weights[path] = self.model.model.get_parameter(path).detach().cpu()
        edits = Rows(
            torch.cat([edit.inputs for edit in present]),
            torch.cat([edit.goals for edit in present]),
            self.hparams.edit_scale,
        )
        solved = self._solve(
            weights, edits, kept(self._kept(present), self.hparams.keep_scale)
        )
        for path, weight in solved.items():
            if not weight.isfinite().all():
                self._patch.undo()
                raise MmeditError(
                    f"{path}: the edits give weights that are not finite",
                    "a larger --set lam=... changes less",
                )
            self._patch.set_(path, weight.to(self.model.dtype))

    def present(self) -> list[ConceptEdit]:
        """Return the edits that count, in an order that depends on their texts alone."""
        of_text = {}
        for i, edit in self.edits.items():
            if i not in self.undone:
                of_text[edit.change.source] = edit
        return sorted(of_text.values(), key=lambda edit: _key(edit.change))

    def _kept(self, present: Sequence[ConceptEdit]) -> Tensor:
        """Return the encodings (m, D) of what stays, each text once, without texts that an edit is about."""
        of_text: dict[str, Tensor] = {}
        for edit in present:
            of_text.update(edit.kept)
        free = []
        for text in sorted(of_text):
            if not any(names(text, edit.change.source) for edit in present):
                free.append(of_text[text])
        return torch.cat(free) if free else torch.zeros(0, self.model.width)

    def changed_weights(self) -> dict[str, Tensor]:
        """Return the weights that differ from those of the base model, by path."""
        return self._patch.changed()

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, edit: ConceptEdit, path: Path) -> None:
        """Write an edit to a safetensors file, atomically."""
        change = edit.change
        texts = {
            "source": change.source,
            "targets": change.targets,
            "keep": change.keep,
            "kept": list(edit.kept),
        }
        tensors = {"inputs": edit.inputs, "goals": edit.goals}
        for i, rows in enumerate(edit.kept.values()):
            tensors[f"kept.{i}"] = rows
        facts = {"format": FORMAT, "method": self.name, "texts": json.dumps(texts)}
        write_tensors(path, tensors, facts)

    def read(self, path: Path) -> ConceptEdit:
        """Return the edit of a file; raise StateError if it is none of this method and model."""
        tensors, facts = read_tensors(path)
        if (facts.get("format"), facts.get("method")) != (FORMAT, self.name):
            raise StateError(f"{path}: not an edit of {self.name}")
        texts = parse_json_object(
            facts.get("texts", ""), f"{path}: texts", error=StateError
        )
        stays = texts.array("kept", str)
        try:
            kept_rows = [tensors[f"kept.{i}"] for i in range(len(stays))]
            inputs, goals = tensors["inputs"], tensors["goals"]
        except KeyError as error:
            raise StateError(f"{path}: no tensor {error}") from error
        if inputs.shape != goals.shape:
            raise StateError(f"{path}: inputs and goals differ in their number")
        for rows in (inputs, goals, *kept_rows):
            if rows.dim() != 2 or rows.shape[1] != self.model.width:
                raise StateError(f"{path}: does not fit {self.model.name}")
            if not rows.isfinite().all():
                raise StateError(f"{path}: has numbers that are not finite")
        change = ConceptChange(
            texts.text("source"),
            tuple(texts.array("targets", str)),
            tuple(texts.array("keep", str)),
        )
        return ConceptEdit(
            change, inputs, goals, dict(zip(stays, kept_rows, strict=True))
        )


class RidgeEditor(ConceptEditor):
    """A concept editor whose solution is the ridge regression itself."""

    def _solve(
        self, weights: Mapping[str, Tensor], edits: Rows, stays: Rows
    ) -> Mapping[str, Tensor]:
        change = ridge_change([edits, stays], self.hparams.lam)
        return {path: changed(weight, change) for path, weight in weights.items()}


def names(text: str, source: str) -> bool:
    """Tell whether a text has the words of another in it."""
    words = re.escape(source.strip())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def _key(change: ConceptChange) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return change.source, change.targets, change.keep


def _only(tokenizer: Any, word: str) -> int | None:
    """Return the id of a word that is one token, None for others."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None
