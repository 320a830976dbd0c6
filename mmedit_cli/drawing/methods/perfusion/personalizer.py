"""Perfusion: a gated rank-one edit of every key and value projection, with keys locked to the superclass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mmedit_cli.drawing.covariance import Covariance
from mmedit_cli.drawing.methods.base import LearnedConcept, Personalizer, Tick, summary
from mmedit_cli.drawing.methods.perfusion.hparams import PerfusionHparams
from mmedit_cli.drawing.methods.perfusion.rank_one import (
    Gates,
    add_edit,
    dual,
    edit_rows,
    mixing_at_places,
    mixing_in_scope,
)
from mmedit_cli.drawing.methods.shared.photos import (
    MaskOptions,
    Photos,
    masked_loss,
    masks_of,
    open_squares,
)
from mmedit_cli.drawing.methods.shared.variants import (
    Variants,
    on_colours,
    replace_some,
)
from mmedit_cli.drawing.models.prompts import Tokens, Word
from mmedit_cli.drawing.models.stable_diffusion import CurrentPrompts, Projection
from mmedit_cli.errors import MmeditError, ModelError, StateError
from mmedit_cli.patch import Patch
from mmedit_cli.reading import parse_json
from mmedit_cli.types import Concept

_ASYMMETRY = 1e-2  # of two concepts learned with one covariance, saved in float16


@dataclass(eq=False)
class LoadedConcept:
    """A concept in the model: target input i*, its dual C^-1 i* and the superclass encoding s*, each (D,).

    `values` and `keys` are the target outputs of all layers in one vector. Locked keys are None: then each is W s*.
    Where each of n vectors has an edit of its own, inputs, duals and outputs are (n, ...).
    """

    token: str
    target_input: Tensor
    dual: Tensor
    superclass_input: Tensor
    values: Tensor
    keys: Tensor | None
    beta: float
    tau: float

    @property
    def inputs(self) -> Tensor:
        """The target inputs, (n, D) even for one edit."""
        return cast(Tensor, torch.atleast_2d(self.target_input))

    @property
    def duals(self) -> Tensor:
        """Their duals, (n, D) even for one edit."""
        return cast(Tensor, torch.atleast_2d(self.dual))

    @property
    def count(self) -> int:
        """n, the edits of the concept."""
        return len(self.inputs)


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
        if not any(layer.role == "k" for layer in self.layers):
            raise ModelError(
                f"{self.model.name}: has no cross attention, whose keys and values perfusion edits",
                "multi-melo-diffusion and dreambooth-lora learn on it",
            )
        self._slices = _slices(self._layers_of("v")) | _slices(self._layers_of("k"))
        self._patch = Patch(self.model.model)
        self._loaded: list[LoadedConcept] = []
        self._lock = self.hparams.key_lock
        # computed once for the current prompts, by the first layer that needs it:
        self._computed_for: CurrentPrompts | None = None
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
        """Change the gate of a learned concept: a higher `beta` weakens the concept in favour of the prompt."""
        concept = self._find(token)
        if tau is not None and tau <= 0:
            raise StateError(f"{token}: tau must be above 0, not {tau}")
        if beta is not None:
            concept.beta = beta
        if tau is not None:
            concept.tau = tau
        self._clear_cache()

    # -- drawing ------------------------------------------------------------------------------------------------

    def _attach(self, learned: LearnedConcept) -> None:
        concept, vectors = self._unpack(learned)
        for other in self._loaded:
            if not _same_covariance(concept, other):
                raise StateError(
                    f"{learned.token} and {other.token} were learned with different covariances",
                    "learn one of them again with the covariance of the other",
                )
        self.model.words[learned.token] = Word(learned.superclass, vectors)
        self._loaded.append(concept)
        self._hook()

    def _detach(self, token: str) -> None:
        self._loaded.remove(self._find(token))
        del self.model.words[token]
        self._hook()

    def _find(self, token: str) -> LoadedConcept:
        for concept in self._loaded:
            if concept.token == token:
                return concept
        raise StateError(
            f"no concept {token} here",
            f"there are: {', '.join(self.concepts) or 'none'}",
        )

    def _hook(self) -> None:
        """Hook the layers again if there is a concept."""
        self._patch.undo()
        self._clear_cache()
        if not self._loaded:
            return
        if self._lock.startswith("global"):
            for layer in self._layers_of("k"):
                self._patch.hook_input(layer.path, self._encode_superclass)
        for layer in self._edited_layers():
            self._patch.hook_call(layer.path, self._edit(layer))

    def _layers_of(self, role: str) -> list[Projection]:
        return [layer for layer in self.layers if layer.role == role]

    def _edited_layers(self) -> list[Projection]:
        """The layers whose outputs change."""
        return self._layers_of("v") if self._lock == "global" else self.layers

    def _clear_cache(self) -> None:
        self._computed_for = None
        self._mixed = None
        self._plain = None
        self._rows = {}

    def _edit(self, layer: Projection) -> Callable[[Tensor, Tensor], Tensor | None]:
        """Return the hook of one layer."""
        gated_keys = layer.role == "k" and self._lock == "global_gated"

        def edit(inputs: Tensor, output: Tensor) -> Tensor | None:
            current = self._prepare(len(inputs))
            mixed = self._mixed
            if mixed is None:
                return None
            if gated_keys:
                mixed = self._mix(inputs.float(), current)
            if layer.path not in self._rows:
                self._rows[layer.path] = self._layer_rows(layer).to(output.dtype)
            return add_edit(output, mixed.to(output.dtype), self._rows[layer.path])

        return edit

    def _encode_superclass(self, inputs: Tensor) -> Tensor | None:
        """Replace the input of globally locked keys by the encoding of the prompt with the superclass."""
        current = self._prepare(len(inputs))
        if self._mixed is None:
            return None
        if self._plain is None:
            with torch.no_grad():
                encoding = self.model.encode(current.tokens, plain=True)
            self._plain = encoding.hidden.to(inputs.dtype)
        named = self._named(current).any(1)
        return torch.where(
            named[:, None, None],
            self._plain,
            inputs,
        )

    def _prepare(self, rows: int) -> CurrentPrompts:
        """Compute similarities and gates once for the current prompts: all layers share them."""
        current = self.model.rows(rows)
        if current is self._computed_for:
            return current
        if current.encoding is None:
            raise MmeditError(
                "the UNet was called without an encoding",
                "go through StableDiffusion.generate",
            )
        self._computed_for = current
        self._plain = None
        self._mixed = None
        if self._scope(current).any():
            self._mixed = self._mix(current.encoding.hidden.float(), current)
        return current

    def prepare(self) -> None:
        """Compute what the layers share in advance: a checkpointed block would not keep it."""
        current = self.model.current_prompts
        assert current is not None
        self._prepare(len(current.tokens.prompts))
        self._rows = {}
        for layer in self._edited_layers():
            self._rows[layer.path] = self._layer_rows(layer).to(self.model.dtype)

    def _mix(self, hidden: Tensor, current: CurrentPrompts) -> Tensor:
        device = hidden.device
        hp = self.hparams
        loaded = self._loaded
        counts = [concept.count for concept in loaded]
        times = torch.tensor(counts, device=device)
        beta = torch.tensor([c.beta for c in loaded], device=device)
        tau = torch.tensor([c.tau for c in loaded], device=device)
        gates = Gates(
            beta=beta.repeat_interleave(times),
            tau=tau.repeat_interleave(times),
            exact=hp.overlap == "exact",
            normalized=hp.gate == "normalized",
        )
        inputs = torch.cat([c.inputs for c in loaded])
        duals = torch.cat([c.duals for c in loaded])
        if hp.gate_scope == "places":
            standing = self._standing(current).to(device)
            return mixing_at_places(hidden, inputs, duals, gates, standing)
        scope = self._scope(current).repeat_interleave(times, 1)
        return mixing_in_scope(hidden, inputs, duals, gates, scope)

    def _standing(self, current: CurrentPrompts) -> Tensor:
        """Return where the vector of each edit stands in the current prompts: (B, N, n)."""
        columns = []
        for concept in self._loaded:
            places = current.tokens.places[concept.token].long()
            before = places.cumsum(1) - 1
            # a prompt may name a concept more than once
            number = before % concept.count
            one_hot = F.one_hot(number, concept.count)
            columns.append(one_hot * places[..., None])
        return torch.cat(columns, -1)

    def _scope(self, current: CurrentPrompts) -> Tensor:
        """Return which of the current prompts know which concepts: (B, n)."""
        if self.hparams.gate_scope != "paper":
            return self._named(current)
        edited = ~current.tokens.unconditional
        if self.hparams.edit_uncond:
            edited = torch.ones_like(edited)
        by_concept = edited[:, None].expand(-1, len(self._loaded))
        return by_concept.to(self.model.device)

    def _named(self, current: CurrentPrompts) -> Tensor:
        """Return which prompts name which concepts: (B, n)."""
        columns = []
        for concept in self._loaded:
            places = current.tokens.places[concept.token]
            columns.append(places.any(1))
        return torch.stack(columns, 1).to(self.model.device)

    def _layer_rows(self, layer: Projection) -> Tensor:
        """Return [-W i ; o] of a layer for the loaded concepts."""
        weight = self._weight(layer)
        inputs = []
        outputs = []
        for concept in self._loaded:
            inputs.append(concept.inputs)
            learned = concept.values if layer.role == "v" else concept.keys
            if learned is None:
                # key locking: the key of the superclass
                locked = F.linear(concept.superclass_input, weight)
                outputs.append(locked.expand(concept.count, -1))
            else:
                own = learned[..., self._slices[layer.path]]
                outputs.append(torch.atleast_2d(own))
        return edit_rows(
            torch.cat(inputs),
            weight,
            torch.cat(outputs),
        )

    def _weight(self, layer: Projection) -> Tensor:
        weight: Any = self.model.model.get_submodule(layer.path).weight
        return cast(Tensor, weight.float())

    # -- files --------------------------------------------------------------------------------------------------

    def _unpack(
        self, learned: LearnedConcept
    ) -> tuple[LoadedConcept, tuple[Tensor, ...]]:
        """Return the concept and its embeddings (n, width) for each text encoder; raise StateError for a misfit."""
        token = learned.token
        layers = parse_json(
            learned.facts.get("layers", "[]"), "layers", error=StateError
        )
        if layers != self._layout():
            raise StateError(
                f"{token}: learned for other layers than those of {self.model.name}"
            )
        tensors = {}
        for key, tensor in learned.tensors.items():
            tensors[key] = tensor.to(self.model.device, torch.float32)
        self._check_shapes(token, tensors)
        concept = LoadedConcept(
            token,
            target_input=tensors["target_input"],
            dual=tensors["target_dual"],
            superclass_input=tensors["superclass_input"],
            values=tensors["values"],
            keys=tensors.get("keys"),
            beta=self.hparams.beta,
            tau=self.hparams.tau,
        )
        vectors = tensors["embedding"].split(self._embedding_widths(), 1)
        return concept, vectors

    def _check_shapes(self, token: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise StateError if a tensor of a concept is missing or does not fit the model."""
        embedding = tensors.get("embedding", torch.empty(0, 0))
        embedding_width = sum(self._embedding_widths())
        is_matrix = embedding.dim() == 2 and len(embedding) > 0
        if not is_matrix or embedding.shape[1] != embedding_width:
            raise StateError(
                f"{token}: embedding is missing or not of width {embedding_width}"
            )
        width = self.model.width
        total = sum(layer.outputs for layer in self._layers_of("v"))
        # one edit, or one for each vector
        inputs = tensors.get("target_input", torch.empty(0))
        edits = (len(embedding),) if inputs.dim() > 1 else ()
        shapes = {
            "target_input": (*edits, width),
            "target_dual": (*edits, width),
            "superclass_input": (width,),
            "values": (*edits, total),
        }
        if "keys" in tensors:
            shapes["keys"] = (*edits, total)
        for key, shape in shapes.items():
            if key not in tensors or tuple(tensors[key].shape) != shape:
                raise StateError(f"{token}: {key} is missing or not of shape {shape}")

    def _embedding_widths(self) -> list[int]:
        widths = []
        for encoder in self.model.text_encoders:
            widths.append(encoder.get_input_embeddings().embedding_dim)
        return widths

    def _layout(self) -> list[list[Any]]:
        """The edited attention layers and their widths, as a file names them."""
        layout = []
        for layer in self._layers_of("v"):
            attention, _, _ = layer.path.rpartition(".")
            layout.append([attention, layer.outputs])
        return layout

    # -- learning -----------------------------------------------------------------------------------------------

    def _learn(self, concept: Concept, source: Generator, tick: Tick) -> LearnedConcept:
        if self.covariance is None:
            raise StateError(
                "perfusion needs the covariance of the text encodings",
                "see mmedit covariance --help",
            )
        hp, model = self.hparams, self.model
        resolution = hp.side or model.resolution
        squares = open_squares(concept.images, resolution, crop=hp.center_crop)
        masks = masks_of(
            MaskOptions(hp.mask, hp.mask_model, hp.templates, hp.center_crop),
            concept.images,
            squares,
            concept.superclass,
            model.device,
        )
        photos = Photos(model, squares, masks, hp.flip)
        on_colour = []
        if hp.coloured:
            on_colour = on_colours(
                concept.images,
                hp.colours,
                hp.templates[0].format(concept.token),
                resolution,
                crop=hp.center_crop,
            )
        # Global locking only changes how pictures are drawn; training locks keys locally.
        self._lock = "none" if hp.key_lock == "none" else "local"
        try:
            training = PerfusionTraining(self, concept, source, on_colour)
            return training.run(photos, tick)
        finally:
            self._lock = hp.key_lock
            model.words.pop(concept.token, None)
            self._loaded = []
            self._hook()


class PerfusionTraining:
    """The training of one concept: its parameters and running means (sections 4.2 to 4.4 of the paper)."""

    def __init__(
        self,
        editor: Perfusion,
        concept: Concept,
        source: Generator,
        on_colour: Sequence[tuple[Any, str]] = (),
    ) -> None:
        self.editor = editor
        self.concept = concept
        self.source = source
        self.hp = editor.hparams
        self.model = editor.model
        assert editor.covariance is not None
        factor, self.ridge = editor.covariance.factor(self.hp.ridge)
        self.factor = factor.to(self.model.device)
        self.vectors = self._initial_vectors()
        self.model.words[concept.token] = Word(concept.superclass, tuple(self.vectors))
        total = sum(layer.outputs for layer in editor._layers_of("v"))
        edits = (self.hp.vectors,) if self.hp.several_edits else ()
        zeros = torch.zeros(*edits, total, device=self.model.device)
        self.values = nn.Parameter(zeros.clone())
        self.keys: nn.Parameter | None = None
        if self.hp.key_lock == "none":
            self.keys = nn.Parameter(zeros.clone())
        self.prompts = [t.format(concept.token) for t in self.hp.templates]
        self.variants = self._variants(on_colour) if on_colour else None
        # The encoding of the superclass in each template never changes.
        with torch.no_grad():
            tokens = self.model.tokenize(self.prompts)
            plain = self.model.encode(tokens, plain=True)
            self.superclass = self._at_last(plain.hidden, tokens)
        self.input_mean: Tensor | None = None
        self.superclass_mean = self.superclass[0]

    def run(self, photos: Photos, tick: Tick) -> LearnedConcept:
        """Learn from the photos."""
        hp = self.hp
        outputs = [self.values] if self.keys is None else [self.values, self.keys]
        trained = [*self.vectors, *outputs]
        optimizer = torch.optim.AdamW(
            [
                {"params": self.vectors, "lr": hp.learning_rate_embedding},
                {"params": outputs, "lr": hp.learning_rate_values},
            ],
            weight_decay=hp.weight_decay,
        )
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
        hp = self.hp
        count = hp.batch_size
        chosen = torch.randint(
            0,
            len(hp.templates),
            (count,),
            generator=self.source,
        )
        templates = chosen.tolist()
        latents, masks = photos.sample(count, self.source)
        if self.variants is not None:
            replace_some(latents, templates, self.variants, self.source)
        tokens = self.model.tokenize([self.prompts[i] for i in templates])
        encoding = self.model.encode(tokens)
        concept_inputs = self._at_token(encoding.hidden, tokens)
        superclass_inputs = self.superclass[templates]
        self.step(concept_inputs.mean(0), superclass_inputs.mean(0))
        with self.model.running(tokens, encoding):
            self.editor.prepare()
            errors = self.model.errors(
                latents,
                encoding,
                self.source,
            )
            loss = masked_loss(errors, masks, hp.mask_power) / hp.accumulate
            if not loss.isfinite():
                raise MmeditError(
                    f"perfusion: the loss became {loss.item()}",
                    "lower the learning rates",
                )
            torch.autograd.backward(loss)
        value: float = loss.item()
        return value

    def step(self, concept_input: Tensor, superclass_input: Tensor) -> None:
        """Move the running means by the mean encodings (D,) of one batch, then load the concept as it is now.

        Those of the concept are (n, D) where each of its vectors has an edit.
        """
        hp, editor = self.hp, self.editor
        if self.input_mean is None:
            self._start(concept_input, superclass_input)
        else:
            # Section 4.4: exponential moving averages, so that all batches take part in i* and s*.
            self.input_mean = torch.lerp(
                concept_input.detach(), self.input_mean, hp.decay
            )
            self.superclass_mean = torch.lerp(
                superclass_input, self.superclass_mean, hp.decay
            )
        assert self.input_mean is not None
        target_input = self.input_mean
        if hp.straight_through:
            # the value of the mean, with the gradient of this batch's encoding
            target_input = self.input_mean + concept_input - concept_input.detach()
        is_first = not editor._loaded
        loaded = LoadedConcept(
            self.concept.token,
            target_input=target_input,
            dual=dual(self.factor, target_input),
            superclass_input=self.superclass_mean,
            values=self.values,
            keys=self.keys,
            beta=hp.train_beta,
            tau=hp.train_tau,
        )
        editor._loaded = [loaded]
        if is_first:
            editor._hook()
        editor._clear_cache()

    @torch.no_grad()
    def _start(self, concept_input: Tensor, superclass_input: Tensor) -> None:
        """Start the means at the first batch, and the target outputs at those of the superclass."""
        from_concept = self.hp.input_from == "concept"
        start = concept_input if from_concept else superclass_input
        self.input_mean = start.detach().expand_as(concept_input)
        self.superclass_mean = superclass_input
        for layer in self.editor.layers:
            target = self.values if layer.role == "v" else self.keys
            if target is None:
                continue
            weight = self.editor._weight(layer)
            from_superclass = self.hp.outputs_from == "superclass"
            first = superclass_input if from_superclass else concept_input
            target[..., self.editor._slices[layer.path]] = F.linear(first, weight)

    def _at_token(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Return the encodings of the concept in each prompt: (B, n, D) of all vectors with edits, else (B, D)."""
        if not self.hp.several_edits:
            return self._at_last(hidden, tokens)
        places = tokens.places[self.concept.token].to(hidden.device)
        standing = hidden[places]
        encodings = standing.unflatten(0, (len(hidden), -1))
        first = encodings[:, : self.hp.vectors]
        return cast(Tensor, first.float())

    def _at_last(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Return the encodings (B, D) of the last vector of the concept in each prompt."""
        places = tokens.places[self.concept.token].long()
        batch, length = places.shape
        # The largest marked position comes last.
        positions = torch.arange(1, length + 1)
        last = (places * positions).argmax(1)
        rows = torch.arange(batch, device=hidden.device)
        encodings = hidden[rows, last.to(hidden.device)]
        return encodings.float()

    def _variants(self, on_colour: Sequence[tuple[Any, str]]) -> Variants:
        """Return the photos on colours, whose prompts follow the templates among the prompts."""
        images = []
        texts = []
        for image, text in on_colour:
            images.append(image)
            texts.append(text)
        self.prompts += dict.fromkeys(texts)
        return Variants(
            self.hp.coloured,
            Photos(self.model, images, flip=self.hp.flip),
            prompts=[self.prompts.index(text) for text in texts],
        )

    def _initial_vectors(self) -> list[nn.Parameter]:
        """Return the embeddings to learn, (n, width) for each text encoder: at first those of the superclass."""
        vectors = []
        for embedding in self.model.embedding(self.concept.superclass):
            start = embedding.repeat(self.hp.vectors, 1)
            if self.hp.initializer == "random":
                noise = torch.randn(start.shape, generator=self.source)
                start = noise.to(start) * 0.02
            vectors.append(nn.Parameter(start))
        return vectors

    def _learned(self, losses: Sequence[float]) -> LearnedConcept:
        hp, editor = self.hp, self.editor
        covariance = editor.covariance
        assert self.input_mean is not None
        assert covariance is not None
        trained = {
            "values": self.values,
            "target_input": self.input_mean,
            "target_dual": dual(self.factor, self.input_mean),
            "superclass_input": self.superclass_mean,
            "embedding": torch.cat(list(self.vectors), 1),
        }
        if self.keys is not None:
            trained["keys"] = self.keys
        dtype = torch.float16 if hp.file_dtype == "float16" else torch.float32
        tensors = {}
        for key, tensor in trained.items():
            tensors[key] = tensor.detach().cpu().to(dtype)
            if not tensors[key].isfinite().all():
                raise MmeditError(
                    f"perfusion: {key} does not fit into {hp.file_dtype}",
                    "--set file_dtype=float32",
                )
        facts = {
            "layers": json.dumps(editor._layout(), separators=(",", ":")),
            "covariance": covariance.digest,
            "covariance_tokens": covariance.source.get("rule", ""),
            "ridge": f"{self.ridge:g}",
        }
        return LearnedConcept(
            self.concept.token,
            self.concept.superclass,
            tensors,
            facts,
            summary(losses),
        )


def _same_covariance(one: LoadedConcept, other: LoadedConcept) -> bool:
    """Whether two concepts agree on i . C^-1 j = j . C^-1 i, as they do for one symmetric covariance C."""
    forward = one.inputs @ other.duals.T
    backward = one.duals @ other.inputs.T
    difference = forward - backward
    own = (one.inputs * one.duals).sum(-1)
    others = (other.inputs * other.duals).sum(-1)
    product = own[:, None] * others
    size = product.clamp_min(0).sqrt()
    apart = difference.abs() > _ASYMMETRY * size
    return not bool(apart.any())


def _slices(layers: Sequence[Projection]) -> dict[str, slice]:
    """Return where the outputs of each layer stand in one vector of all of them."""
    found = {}
    start = 0
    for layer in layers:
        end = start + layer.outputs
        found[layer.path] = slice(start, end)
        start = end
    return found


PERSONALIZER = Perfusion
