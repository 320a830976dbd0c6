"""Perfusion: a gated rank-one edit of every key and value projection, with keys locked to the superclass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mmedit_cli.drawing.covariance import Covariance
from mmedit_cli.drawing.methods.base import Learned, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.perfusion.hparams import PerfusionHparams
from mmedit_cli.drawing.methods.perfusion.rank_one import (
    Gates,
    add_edit,
    dual,
    edit_rows,
    mixing_in_scope,
)
from mmedit_cli.drawing.methods.shared.photos import (
    MaskOptions,
    Photos,
    masked_loss,
    masks_of,
    open_squares,
)
from mmedit_cli.drawing.models.prompts import Word
from mmedit_cli.drawing.models.stable_diffusion import CurrentPrompts, Projection
from mmedit_cli.errors import MmeditError, StateError
from mmedit_cli.patch import Patch
from mmedit_cli.reading import parse_json
from mmedit_cli.types import Concept

_ASYMMETRY = 1e-2  # of two concepts learned with one covariance, saved in float16


@dataclass(eq=False)
class Active:
    """A concept in the model: input i*, dual C^-1 i* and superclass encoding s* (D,), outputs of all layers in a row.

    `keys` are None where they are locked: then each is W s*.
    """

    token: str
    target_input: Tensor
    dual: Tensor
    superclass_input: Tensor
    values: Tensor
    keys: Tensor | None
    beta: float
    tau: float


class Perfusion(Personalizer):
    """Key-locked rank-one editing (Tewel et al. 2023): one word embedding and one value vector a layer are learned.

    All 2 x 16 cross-attention projections of Stable Diffusion 1.5 are edited; a concept is a file of about 33 KB.
    With `gate_scope: tokens` prompts that do not name a concept are drawn as by the base model, bit for bit.
    """

    name = "perfusion"
    Hparams = PerfusionHparams
    routes = True

    def __init__(
        self, *args: Any, covariance: Covariance | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.covariance = covariance
        self.layers = self.model.cross_attention()
        self._slices = _slices([layer for layer in self.layers if layer.role == "v"])
        self._slices |= _slices([layer for layer in self.layers if layer.role == "k"])
        self._patch = Patch(self.model.model)
        self._active: list[Active] = []
        self._lock = self.hparams.key_lock
        self._seen: CurrentPrompts | None = None
        self._mixed: Tensor | None = None
        self._plain: Tensor | None = None
        self._rows: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        """The optimiser's steps."""
        return int(self.hparams.steps)

    def set_gate(
        self, token: str, *, beta: float | None = None, tau: float | None = None
    ) -> None:
        """Change how a learned concept opens: a higher `beta` weakens it in favour of the prompt."""
        active = self._of(token)
        if tau is not None and tau <= 0:
            raise StateError(f"{token}: tau must be above 0, not {tau}")
        active.beta = active.beta if beta is None else beta
        active.tau = active.tau if tau is None else tau
        self._forget()

    # -- drawing ------------------------------------------------------------------------------------------------

    def _attach(self, learned: Learned) -> None:
        active, vectors = self._read(learned)
        for other in self._active:
            pairs = active.target_input @ other.dual, other.target_input @ active.dual
            size = (
                (
                    (active.target_input @ active.dual)
                    * (other.target_input @ other.dual)
                )
                .clamp_min(0)
                .sqrt()
            )
            if (pairs[0] - pairs[1]).abs() > _ASYMMETRY * size:
                raise StateError(
                    f"{learned.token} and {other.token} were learned with different covariances",
                    "learn one of them again with the covariance of the other",
                )
        self.model.words[learned.token] = Word(learned.superclass, vectors)
        self._active.append(active)
        self._hook()

    def _detach(self, token: str) -> None:
        self._active.remove(self._of(token))
        del self.model.words[token]
        self._hook()

    def _of(self, token: str) -> Active:
        for active in self._active:
            if active.token == token:
                return active
        raise StateError(
            f"no concept {token} here",
            f"there are: {', '.join(self.concepts) or 'none'}",
        )

    def _hook(self) -> None:
        """Hook the layers anew, if there is a concept at all."""
        self._patch.undo()
        self._forget()
        if not self._active:
            return
        for layer in self.layers:
            if layer.role == "k" and self._lock.startswith("global"):
                self._patch.hook_input(layer.path, self._superclass)
        for layer in self._edited():
            self._patch.hook_call(layer.path, self._edit(layer))

    def _edited(self) -> list[Projection]:
        """The layers whose outputs change."""
        return [
            layer
            for layer in self.layers
            if layer.role == "v" or self._lock != "global"
        ]

    def _forget(self) -> None:
        self._seen = self._mixed = self._plain = None
        self._rows = {}

    def _edit(self, layer: Projection) -> Any:
        """Return the hook of one layer."""
        gated_keys = layer.role == "k" and self._lock == "global_gated"

        def edit(inputs: Tensor, output: Tensor) -> Tensor | None:
            self._prepare(len(inputs))
            mixed = self._mixed
            if mixed is None:
                return None
            if gated_keys:
                mixed = self._mix(inputs.float(), self._scope())
            if layer.path not in self._rows:
                self._rows[layer.path] = self._layer_rows(layer).to(output.dtype)
            return add_edit(output, mixed.to(output.dtype), self._rows[layer.path])

        return edit

    def _superclass(self, inputs: Tensor) -> Tensor | None:
        """Give the keys of a global lock what the text encoder says of the prompt with the superclass."""
        current = self._prepare(len(inputs))
        if self._mixed is None:
            return None
        if self._plain is None:
            with torch.no_grad():
                self._plain = self.model.encode(current.tokens, plain=True).hidden.to(
                    inputs.dtype
                )
        named = self._named(current).any(1)[:, None, None]
        return torch.where(named, self._plain, inputs)

    def _prepare(self, rows: int) -> CurrentPrompts:
        """Compute similarities and gates once for the current prompts: all layers share them."""
        current = self.model.rows(rows)
        if current is not self._seen:
            if current.encoding is None:
                raise MmeditError(
                    "the UNet was called without an encoding",
                    "go through StableDiffusion.generate",
                )
            self._seen, self._plain = current, None
            scope = self._scope()
            self._mixed = (
                self._mix(current.encoding.hidden.float(), scope)
                if scope.any()
                else None
            )
        return current

    def prepare(self) -> None:
        """Compute all that layers share before the first asks for it: a checkpointed block would not keep it."""
        assert self.model.current_prompts is not None
        self._prepare(len(self.model.current_prompts.tokens.prompts))
        self._rows = {
            layer.path: self._layer_rows(layer).to(self.model.dtype)
            for layer in self._edited()
        }

    def _mix(self, hidden: Tensor, scope: Tensor) -> Tensor:
        inputs, duals = (
            torch.stack([getattr(a, key) for a in self._active])
            for key in ("target_input", "dual")
        )
        gates = torch.tensor(
            [[a.beta, a.tau] for a in self._active], device=hidden.device
        )
        hp = self.hparams
        return mixing_in_scope(
            hidden,
            inputs,
            duals,
            Gates(
                gates[:, 0], gates[:, 1], hp.overlap == "exact", hp.gate == "normalized"
            ),
            scope,
        )

    def _scope(self) -> Tensor:
        """Return which of the current prompts know which concepts: (B, n)."""
        assert self._seen is not None
        if self.hparams.gate_scope == "tokens":
            return self._named(self._seen)
        edited = torch.ones_like(self._seen.tokens.unconditional) if self.hparams.edit_uncond else (
            ~self._seen.tokens.unconditional)  # fmt: skip
        return edited[:, None].expand(-1, len(self._active)).to(self.model.device)

    def _named(self, current: CurrentPrompts) -> Tensor:
        """Return which prompts name which concepts: (B, n)."""
        places = [current.tokens.places[active.token].any(1) for active in self._active]
        return torch.stack(places, 1).to(self.model.device)

    def _layer_rows(self, layer: Projection) -> Tensor:
        weight = self.model.model.get_submodule(layer.path).weight.float()
        outputs = []
        for active in self._active:
            if layer.role == "v":
                outputs.append(active.values[self._slices[layer.path]])
            elif active.keys is None:
                outputs.append(F.linear(active.superclass_input, weight))
            else:
                outputs.append(active.keys[self._slices[layer.path]])
        return edit_rows(
            torch.stack([a.target_input for a in self._active]),
            weight,
            torch.stack(outputs),
        )

    # -- files --------------------------------------------------------------------------------------------------

    def _read(self, learned: Learned) -> tuple[Active, tuple[Tensor, ...]]:
        """Return what a learned concept puts into the model; raise StateError if it does not fit."""
        facts, device, width = learned.facts, self.model.device, self.model.width
        if (
            parse_json(facts.get("layers", "[]"), "layers", error=StateError)
            != self._layout()
        ):
            raise StateError(
                f"{learned.token}: learned for other layers than those of {self.model.name}"
            )
        tensors = {
            key: tensor.to(device, torch.float32)
            for key, tensor in learned.tensors.items()
        }
        total = sum(layer.outputs for layer in self.layers if layer.role == "v")
        one = {
            "target_input": (width,),
            "target_dual": (width,),
            "superclass_input": (width,),
            "values": (total,),
        }
        widths = [
            encoder.get_input_embeddings().embedding_dim
            for encoder in self.model.text_encoders
        ]
        for key, shape in one.items():
            if key not in tensors or tuple(tensors[key].shape) != shape:
                raise StateError(
                    f"{learned.token}: {key} is missing or not of shape {shape}"
                )
        embedding = tensors.get("embedding", torch.empty(0, 0))
        if (
            embedding.dim() != 2
            or embedding.shape[1] != sum(widths)
            or not len(embedding)
        ):
            raise StateError(
                f"{learned.token}: embedding is missing or not of width {sum(widths)}"
            )
        if "keys" in tensors and tuple(tensors["keys"].shape) != (total,):
            raise StateError(f"{learned.token}: keys are not of shape ({total},)")
        active = Active(
            learned.token, tensors["target_input"], tensors["target_dual"], tensors["superclass_input"],
            tensors["values"], tensors.get("keys"), self.hparams.beta, self.hparams.tau,
        )  # fmt: skip
        return active, embedding.split(widths, 1)

    def _layout(self) -> list[list[Any]]:
        """The edited attention layers and their widths, as a file names them."""
        return [
            [layer.path.rpartition(".")[0], layer.outputs]
            for layer in self.layers
            if layer.role == "v"
        ]

    # -- learning -----------------------------------------------------------------------------------------------

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> Learned:
        if self.covariance is None:
            raise StateError(
                "perfusion needs the covariance of the text encodings",
                "see mmedit covariance --help",
            )
        hp, model = self.hparams, self.model
        squares = open_squares(
            concept.images, hp.side or model.resolution, crop=hp.center_crop
        )
        options = MaskOptions(hp.mask, hp.mask_model, hp.templates, hp.center_crop)
        masks = masks_of(
            options, concept.images, squares, concept.superclass, model.device
        )
        photos = Photos(model, squares, masks, hp.flip)
        self._lock = (
            "none" if hp.key_lock == "none" else "local"
        )  # a global lock is a way to draw
        try:
            return _Lesson(self, concept, source).run(photos, tick)
        finally:
            self._lock = hp.key_lock
            model.words.pop(concept.token, None)
            self._active = []
            self._hook()


class _Lesson:
    """The learning of one concept: what is trained, and the running means (sections 4.2 to 4.4 of the paper)."""

    def __init__(self, editor: Perfusion, concept: Concept, source: Generator) -> None:
        self.editor, self.concept, self.source = editor, concept, source
        self.hp, self.model = editor.hparams, editor.model
        assert editor.covariance is not None
        factor, self.ridge = editor.covariance.factor(self.hp.ridge)
        self.factor = factor.to(self.model.device)
        self.vectors = self._first_vectors()
        self.model.words[concept.token] = Word(concept.superclass, tuple(self.vectors))
        total = sum(layer.outputs for layer in editor.layers if layer.role == "v")
        zeros = torch.zeros(total, device=self.model.device)
        self.values = nn.Parameter(zeros.clone())
        self.keys = nn.Parameter(zeros.clone()) if self.hp.key_lock == "none" else None
        self.tokens = [template.format(concept.token) for template in self.hp.templates]
        with (
            torch.no_grad()
        ):  # what the superclass is called in each template never changes
            tokens = self.model.tokenize(self.tokens)
            self.superclass = self._at_token(
                self.model.encode(tokens, plain=True).hidden, tokens
            )
        self.input_mean: Tensor | None = None
        self.superclass_mean = self.superclass[0]

    def run(self, photos: Photos, tick: Tick) -> Learned:
        """Learn from the photos."""
        hp = self.hp
        outputs = [self.values] if self.keys is None else [self.values, self.keys]
        trained = [*self.vectors, *outputs]
        optimizer = torch.optim.AdamW(
            [{"params": self.vectors, "lr": hp.learning_rate_embedding},
             {"params": outputs, "lr": hp.learning_rate_values}], weight_decay=hp.weight_decay,
        )  # fmt: skip
        losses = []
        for _ in range(hp.steps):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(hp.accumulate):
                total += self._accumulate(photos)
            if hp.clip is not None:
                nn.utils.clip_grad_norm_(trained, hp.clip)
            optimizer.step()
            losses.append(total)
            tick(1)
        return self._learned(losses)

    def _accumulate(self, photos: Photos) -> float:
        """Add the gradients of one batch and return its share of the loss."""
        count = self.hp.batch_size
        which = torch.randint(
            0, len(self.tokens), (count,), generator=self.source
        ).tolist()
        latents, masks = photos.sample(count, self.source)
        tokens = self.model.tokenize([self.tokens[i] for i in which])
        encoding = self.model.encode(tokens)
        seen = self._at_token(encoding.hidden, tokens).mean(0)
        self.step(seen, self.superclass[which].mean(0))
        with self.model.running(tokens, encoding):
            self.editor.prepare()
            errors = self.model.errors(latents, encoding, self.source)
            loss = masked_loss(errors, masks, self.hp.mask_power) / self.hp.accumulate
            if not loss.isfinite():
                raise MmeditError(
                    f"perfusion: the loss became {loss.item()}",
                    "lower the learning rates",
                )
            loss.backward()
        return loss.item()

    def step(self, seen: Tensor, superclass: Tensor) -> None:
        """Move the running means by the encodings (D,) of one batch, then put the concept as it is now to use."""
        hp, editor = self.hp, self.editor
        if self.input_mean is None:
            self.superclass_mean = superclass
            self.input_mean = (
                seen if hp.input_from == "concept" else superclass
            ).detach()
            with torch.no_grad():
                for layer in editor.layers:
                    target = self.values if layer.role == "v" else self.keys
                    if target is not None:
                        weight = self.model.model.get_submodule(
                            layer.path
                        ).weight.float()
                        target[editor._slices[layer.path]] = F.linear(
                            superclass, weight
                        )
        else:
            self.input_mean = torch.lerp(seen.detach(), self.input_mean, hp.decay)
            self.superclass_mean = torch.lerp(
                superclass, self.superclass_mean, hp.decay
            )
        target_input = (
            self.input_mean + seen - seen.detach()
            if hp.straight_through
            else self.input_mean
        )
        first, editor._active = not editor._active, [
            Active(self.concept.token, target_input, dual(self.factor, target_input), self.superclass_mean,
                   self.values, self.keys, hp.train_beta, hp.train_tau)
        ]  # fmt: skip
        if first:
            editor._hook()
        editor._forget()

    def _at_token(self, hidden: Tensor, tokens: Any) -> Tensor:
        """Return the encodings (B, D) of the concept in each prompt: of its last vector."""
        place = tokens.places[self.concept.token].long()
        last = (place * torch.arange(1, place.shape[1] + 1)).argmax(1)
        return hidden[
            torch.arange(len(last), device=hidden.device), last.to(hidden.device)
        ].float()

    def _first_vectors(self) -> list[nn.Parameter]:
        """Return the embeddings to learn, (n, width) for each text encoder: at first those of the superclass."""
        found = []
        for vector in self.model.embedding(self.concept.superclass):
            start = vector.repeat(self.hp.vectors, 1)
            if self.hp.initializer == "random":
                start = torch.randn(start.shape, generator=self.source).to(start) * 0.02
            found.append(nn.Parameter(start))
        return found

    def _learned(self, losses: Sequence[float]) -> Learned:
        hp, editor = self.hp, self.editor
        assert self.input_mean is not None
        assert editor.covariance is not None
        tensors = {
            "values": self.values, "target_input": self.input_mean, "target_dual": dual(self.factor, self.input_mean),
            "superclass_input": self.superclass_mean, "embedding": torch.cat(self.vectors, 1),
        } | ({} if self.keys is None else {"keys": self.keys})  # fmt: skip
        number = torch.float16 if hp.file_dtype == "float16" else torch.float32
        tensors = {
            key: tensor.detach().cpu().to(number) for key, tensor in tensors.items()
        }
        if bad := [
            key for key, tensor in tensors.items() if not tensor.isfinite().all()
        ]:
            raise MmeditError(
                f"perfusion: {bad[0]} does not fit into {hp.file_dtype}",
                "--set file_dtype=float32",
            )
        facts = {
            "layers": json.dumps(editor._layout(), separators=(",", ":")),
            "covariance": editor.covariance.digest,
            "covariance_tokens": editor.covariance.source.get("rule", ""),
            "ridge": f"{self.ridge:g}",
        }
        return Learned(
            self.concept.token, self.concept.superclass, tensors, facts, summary(losses)
        )


def _slices(layers: Sequence[Projection]) -> dict[str, slice]:
    ends, found = 0, {}
    for layer in layers:
        found[layer.path] = slice(ends, ends + layer.outputs)
        ends += layer.outputs
    return found


PERSONALIZER = Perfusion
