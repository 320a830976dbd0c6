"""Stable Diffusion 1.x, 2.x and XL through diffusers: prompts with new tokens, losses, seeded pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.drawing.models.canvas import GRID, Canvas, in_windows
from mmedit_cli.drawing.models.prompts import Tokens, Word, tokenize
from mmedit_cli.drawing.models.schedule import check_steps
from mmedit_cli.errors import DataError, MmeditError, ModelError
from mmedit_cli.finite import check_finite
from mmedit_cli.vocabulary import cap_length

Tick = Callable[[int], None]


class Encoding(NamedTuple):
    """What the text encoders say of B prompts: `hidden` (B, N, D) and, for XL, `pooled` (B, P)."""

    hidden: Tensor
    pooled: Tensor | None = None

    def rows(self, which: Sequence[int]) -> Encoding:
        """Return the encodings of some of the prompts."""
        hidden = self.hidden[which]
        if self.pooled is None:
            return Encoding(hidden)
        return Encoding(hidden, self.pooled[which])


@dataclass(frozen=True, eq=False)
class CurrentPrompts:
    """The prompts whose rows are in a forward pass; `encoding` is None while the text encoders run."""

    tokens: Tokens
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Projection:
    """A key (`k`) or value (`v`) projection of a cross attention: D -> `outputs`."""

    path: str
    role: str
    outputs: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: scheduler `steps`, `guidance` scale, `resolution` (height and width in pixels).

    None stands for the model's usual value. `batch_size` pictures are drawn at once; the same seeds in the same
    batches give the same pictures.
    """

    steps: int = 50
    guidance: float | None = None
    resolution: int | None = None
    negative: str = ""
    batch_size: int = 4


class StableDiffusion:
    """A Stable Diffusion pipeline with frozen weights; `model` holds its parts `unet`, `vae` and `text_encoder(_2)`.

    `words` are the new tokens that prompts may contain. `windows`, if set, splits a prompt into the prompts of several
    windows beside each other; the picture is wider then. `current_prompts` are the prompts whose rows are in a forward
    pass; the hooks of a personalizer read it. `guidance` is the usual guidance scale of the model.
    """

    family: ClassVar[str] = "stable-diffusion"
    denoiser: ClassVar[str] = "unet"  # the name of the part that removes noise
    in_windows: ClassVar[bool] = True  # whether a wide picture can be drawn in windows
    # The fingerprints that version 0.1.0 gave to the model and to its text encoders.
    former: str = ""
    former_text: str = ""

    def __init__(
        self, name: str, pipe: Any, fingerprint: str, text_fingerprint: str
    ) -> None:
        self.name = name
        self.pipe = pipe
        self.fingerprint = fingerprint
        self.text_fingerprint = text_fingerprint
        self.is_xl = getattr(pipe, "text_encoder_2", None) is not None
        names = [self.denoiser, "vae"]
        self.tokenizers = []
        for number in ("", "_2", "_3"):
            part = f"text_encoder{number}"
            if getattr(pipe, part, None) is not None:
                names.append(part)
                self.tokenizers.append(getattr(pipe, f"tokenizer{number}"))
        parts = {part: getattr(pipe, part) for part in names}
        self.model = nn.ModuleDict(parts).eval().requires_grad_(False)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            cap_length(tokenizer, encoder)
        self.words: dict[str, Word] = {}
        self.windows: Callable[[str], Sequence[str]] | None = None
        self.current_prompts: CurrentPrompts | None = None
        self.guidance = 7.5
        pipe.set_progress_bar_config(disable=True)

    # -- what it is made of -------------------------------------------------------------------------------------

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, in the order in which their encodings are joined."""
        names = [part for part in self.model if part.startswith("text_encoder")]
        return [self.model[name] for name in names]

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.model[self.denoiser]

    @cached_property
    def noise_scheduler(self) -> Any:
        """What adds noise in training."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return cast(torch.device, self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return cast(torch.dtype, self.unet.dtype)

    @property
    def width(self) -> int:
        """D, the width of a token's encoding."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def max_length(self) -> int:
        """N, the tokens of a prompt with start, end and padding."""
        return int(self.tokenizers[0].model_max_length)

    @property
    def resolution(self) -> int:
        """The native height and width in pixels; raises ModelError if the model's config does not name it."""
        size = self.unet.config.sample_size
        if not isinstance(size, int):
            raise ModelError(
                f"{self.name}: its unet/config.json has no sample_size, so the size of its pictures is not known",
                f"give --size, or write sample_size there: 64 for pictures of {64 * self.scale} pixels",
            )
        return size * self.scale

    @property
    def scale(self) -> int:
        """Pixels along an edge of a latent."""
        return int(self.pipe.vae_scale_factor)

    @property
    def grid(self) -> int:
        """Of how many pixels a picture's height and width are multiples."""
        return math.lcm(GRID, self.scale)

    @property
    def has_pooled(self) -> bool:
        """Whether the pipeline is given a pooled encoding of the prompt."""
        return self.is_xl

    def spellings(self) -> list[tuple[int, int]]:
        """Return (index of a tokenizer, row of an encoding where its tokens begin) for all rows of an encoding."""
        return [(0, 0)]

    def cross_attention(self) -> list[Projection]:
        """Return the key and value projections that read the prompt, found from the structure of the UNet."""
        projections = []
        for name, module in self.unet.named_modules():
            reads_prompt = getattr(module, "is_cross_attention", False)
            if not reads_prompt or not hasattr(module, "to_k"):
                continue
            for role in ("k", "v"):
                weight = getattr(module, f"to_{role}").weight
                path = f"unet.{name}.to_{role}"
                projections.append(Projection(path, role, weight.shape[0]))
        return projections

    def attention(self, roles: Sequence[str], *, text: Sequence[str] = ()) -> list[str]:
        """Return paths of attention projections: `roles` ("q", "v") in the denoiser, `text` in the text encoders."""
        in_unet = tuple(f".to_{role}" for role in roles)
        in_text_encoder = tuple(f".{role}_proj" for role in text)

        paths = []
        for path, _ in self.model.named_modules():
            if path.startswith(f"{self.denoiser}."):
                ends = in_unet
            elif path.startswith("text_encoder"):
                ends = in_text_encoder
            else:
                continue
            if path.endswith(ends):
                paths.append(path)
        return paths

    # -- prompts ------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str], *, unconditional: int = 0) -> Tokens:
        """Return prompts as token ids; the first `unconditional` are rows of classifier-free guidance."""
        return tokenize(
            self.tokenizers, self.words, prompts, unconditional=unconditional
        )

    def encode(self, tokens: Tokens, *, plain: bool = False) -> Encoding:
        """Run the text encoders; gradients reach the vectors of `words`.

        With `plain`, every new token is encoded as its plain word, moved to the positions of `tokens`.
        """
        by_encoder = tokens.plain_ids if plain else tokens.ids
        encodings = []
        pooled = None
        for i, encoder in enumerate(self.text_encoders):
            ids = by_encoder[i].to(self.device)
            with ExitStack() as stack:
                if not plain:
                    stack.enter_context(self._learned_embeddings(encoder, i, tokens))
                stack.enter_context(self.running(tokens))
                out = encoder(ids, output_hidden_states=self.is_xl)
            encodings.append(self._hidden_of(out))
            pooled = getattr(out, "text_embeds", pooled)
        hidden = torch.cat(encodings, -1)
        if plain:
            rows = torch.arange(len(hidden), device=self.device)[:, None]
            hidden = hidden[rows, tokens.aligned.to(self.device)]
        return Encoding(hidden, pooled)

    def encode_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the encodings (B, n, D) of unpadded token ids (B, n), one tensor for each text encoder."""
        encodings = []
        for encoder, its_ids in zip(self.text_encoders, ids, strict=True):
            on_device = its_ids.to(self.device)
            out = encoder(on_device, output_hidden_states=self.is_xl)
            encodings.append(self._hidden_of(out))
        return torch.cat(encodings, -1)

    def _hidden_of(self, output: Any) -> Tensor:
        """Return the hidden states that the UNet reads; SDXL takes those below the last layer."""
        hidden = output.hidden_states[-2] if self.is_xl else output.last_hidden_state
        return cast(Tensor, hidden)

    @contextmanager
    def running(
        self, tokens: Tokens, encoding: Encoding | None = None
    ) -> Iterator[None]:
        """Set `current_prompts` inside the block: the prompts that the rows of a forward pass belong to."""
        before = self.current_prompts
        self.current_prompts = CurrentPrompts(tokens, encoding)
        try:
            yield
        finally:
            self.current_prompts = before

    def rows(self, count: int) -> CurrentPrompts:
        """Return the current prompts for a hook that sees `count` rows; raise MmeditError if they are not those."""
        current = self.current_prompts
        if current is None or len(current.tokens.prompts) != count:
            raise MmeditError(
                f"{self.name} with edits was called with {count} rows that are not known here",
                "go through StableDiffusion.generate, or remove the edits first",
            )
        return current

    @contextmanager
    def _learned_embeddings(
        self, encoder: Any, index: int, tokens: Tokens
    ) -> Iterator[None]:
        """Inside the block, learned vectors replace the embeddings of the new tokens of a text encoder."""
        present = []
        for token, mask in tokens.places.items():
            if mask.any():
                present.append((mask, self.words[token].vectors[index]))
        if not present:
            yield
            return

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            for mask, vectors in present:
                times = int(mask.sum()) // len(vectors)
                repeated = vectors.repeat(times, 1)
                output = output.masked_scatter(
                    mask[..., None].to(output.device),
                    repeated.to(output),
                )
            return output

        embeddings = encoder.get_input_embeddings()
        handle = embeddings.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def embedding(self, text: str) -> tuple[Tensor, ...]:
        """Return the input embedding (width,) of the last token of a text, for each text encoder, in float32."""
        embeddings = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise DataError(
                    f"superclass {text!r}: not a word the model can read",
                    "e.g. --superclass dog",
                )
            matrix = encoder.get_input_embeddings().weight
            embeddings.append(matrix[ids[-1]].detach().float().clone())
        return tuple(embeddings)

    # -- pictures -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation) of the latents (B, C, h, w) of pictures (B, 3, H, W) in -1..1."""
        vae: Any = self.model["vae"]

        def encode() -> Any:
            return vae.encode(pixels.to(self.device, self.dtype)).latent_dist

        distribution = encode()
        what = f"{self.name}: the latents of the pictures"
        check_finite(distribution.mean, what, self.model, encode)
        shift = vae.config.get("shift_factor") or 0.0
        mean = (distribution.mean.float() - shift) * vae.config.scaling_factor
        deviation = distribution.std.float() * vae.config.scaling_factor
        return mean, deviation

    def errors(self, latents: Tensor, encoding: Encoding, source: Generator) -> Tensor:
        """Return the squared errors (B, C, h, w) of the prediction for noisy latents, at random time steps.

        Call it, and the backward pass too, inside `running`: gradient checkpointing runs blocks again on the way back.
        """
        scheduler = self.noise_scheduler
        noise = torch.randn(latents.shape, generator=source).to(latents)
        times = torch.randint(
            0,
            scheduler.config.num_train_timesteps,
            latents.shape[:1],
            generator=source,
        ).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, times)
        target = noise
        if scheduler.config.prediction_type != "epsilon":
            target = scheduler.get_velocity(latents, noise, times)
        conditions = self._xl_conditions(encoding, latents)

        def predict() -> Tensor:
            output = self.unet(
                noisy.to(self.dtype),
                times,
                encoder_hidden_states=encoding.hidden,
                added_cond_kwargs=conditions,
            )
            return cast(Tensor, output.sample)

        predicted = predict()
        what = f"{self.name}: the predicted noise"
        check_finite(predicted, what, self.model, predict)
        return (predicted.float() - target.float()).square()

    def _xl_conditions(
        self, encoding: Encoding, latents: Tensor
    ) -> dict[str, Tensor | None] | None:
        """Return what SDXL is given besides the prompt: the sizes of the picture; None for other models."""
        if not self.is_xl:
            return None
        height = latents.shape[-2] * self.scale
        width = latents.shape[-1] * self.scale
        # original size, corner of the crop, target size
        sizes = [height, width, 0, 0, height, width]
        ids = torch.tensor(
            [sizes],
            device=self.device,
            dtype=self.dtype,
        )
        return {
            "text_embeds": encoding.pooled,
            "time_ids": ids.repeat(len(latents), 1),
        }

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        tick: Tick | None = None,
    ) -> list[Any]:
        """Return one PIL image for each prompt and its seed; `tick(n)` is called after n pictures made one step.

        Raises DataError for a size the model cannot draw, TooLong for a prompt whose new token would be cut off.
        """
        self.check_sampling(sampling.steps)
        resolution = sampling.resolution or self.resolution
        grid = self.grid
        if resolution % grid or resolution < grid:
            raise DataError(
                f"size {resolution}: not a multiple of {grid} pixels",
                f"e.g. {max(1, resolution // grid) * grid}",
            )
        sampling = replace(sampling, resolution=resolution)
        images: list[Any] = []
        for start in range(0, len(prompts), sampling.batch_size):
            batch = slice(start, start + sampling.batch_size)
            images += self._draw_batch(
                list(prompts[batch]), list(seeds[batch]), sampling, tick
            )
        return images

    def _draw_batch(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        tick: Tick | None,
    ) -> list[Any]:
        """Draw pictures of one window together, then the wide ones by their number of windows."""
        by_prompt = [self.window_prompts(prompt) for prompt in prompts]
        counts = [len(window_prompts) for window_prompts in by_prompt]
        images: list[Any] = [None] * len(prompts)
        if 1 in counts:
            # Wide ones are drawn here too, and thrown away: the other pictures are the same bit for bit
            # only in a batch of the same size.
            images = self._draw(prompts, seeds, sampling, tick)
            tick = None
        for count in sorted(set(counts) - {1}):
            rows = [row for row, windows in enumerate(counts) if windows == count]
            texts = []
            for row in rows:
                texts += by_prompt[row]
            drawn = self._draw(
                texts,
                [seeds[row] for row in rows],
                sampling,
                tick,
                windows=count,
            )
            for row, image in zip(rows, drawn, strict=True):
                images[row] = image
        return images

    def check_sampling(self, steps: int) -> None:
        """Raise DataError unless the scheduler can make so many steps."""
        check_steps(self.pipe.scheduler, steps)

    def _is_guided(self, scale: float) -> bool:
        """Whether each prompt has a row without it, from which guidance leads away."""
        return scale > 1 and self.unet.config.time_cond_proj_dim is None

    def window_prompts(self, prompt: str) -> list[str]:
        """Return the prompt of each window of a picture; mostly there is one window, and it is the prompt itself."""
        return [prompt] if self.windows is None else list(self.windows(prompt))

    def guidance_scale(self, sampling: Sampling) -> float:
        """Return the guidance scale that pictures are drawn with."""
        return self.guidance if sampling.guidance is None else sampling.guidance

    @torch.no_grad()
    def _draw(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        tick: Tick | None,
        windows: int = 1,
    ) -> list[Any]:
        """Return a picture for each seed; each has `windows` prompts, one for each of its windows."""
        scale = self.guidance_scale(sampling)
        guided = self._is_guided(scale)
        unguided_rows = len(prompts) if guided else 0
        negatives = [sampling.negative] * unguided_rows
        tokens = self.tokenize(negatives + prompts, unconditional=unguided_rows)
        encoding = self.encode(tokens)
        if guided and not sampling.negative:
            self._clear_negative(encoding, unguided_rows)
        embeds = self._prompt_embeds(
            encoding,
            len(prompts),
            windows,
            guided,
        )
        resolution = sampling.resolution or self.resolution
        canvas = Canvas.of(windows, resolution, self.scale)

        def draw(check: Callable[[Tensor, str], None]) -> Tensor:
            """Return the pixels, (B, 3, H, W) in 0..1; `check` sees everything that leaves the model."""

            def step_done(
                _pipe: Any, index: int, _time: Any, values: Any
            ) -> dict[str, Any]:
                step = f"step {index + 1} of {sampling.steps}"
                check(values["latents"], f"the latents of {step}")
                if tick is not None:
                    tick(len(seeds))
                return {}

            with ExitStack() as stack:
                stack.enter_context(self.running(tokens, encoding))
                if windows > 1:
                    conditions = partial(self._xl_conditions, encoding)
                    hooks = in_windows(self.unet, canvas, encoding.hidden, conditions)
                    stack.enter_context(hooks)
                pixels = self.pipe(
                    **embeds,
                    height=resolution,
                    width=canvas.width * self.scale,
                    num_inference_steps=sampling.steps,
                    guidance_scale=scale,
                    generator=[runtime.generator(seed) for seed in seeds],
                    callback_on_step_end=step_done,
                    output_type="pt",
                ).images
            check(pixels, "the pictures")
            return cast(Tensor, pixels)

        def again() -> None:
            self.encode(tokens)
            draw(lambda _values, _what: None)

        def check(values: Tensor, what: str) -> None:
            check_finite(
                values,
                f"{self.name}: {what}",
                self.model,
                again,
            )

        check(encoding.hidden, "the encodings of the prompts")
        processor = self.pipe.image_processor
        pixels = processor.pt_to_numpy(draw(check))
        return list(processor.numpy_to_pil(pixels))

    def _clear_negative(self, encoding: Encoding, count: int) -> None:
        """Set the first `count` encodings to zero if SDXL wants that for an empty negative prompt."""
        if self.is_xl and self.pipe.config.force_zeros_for_empty_prompt:
            assert encoding.pooled is not None
            encoding.hidden[:count] = 0
            encoding.pooled[:count] = 0

    def _prompt_embeds(
        self, encoding: Encoding, count: int, windows: int, guided: bool
    ) -> dict[str, Tensor]:
        """Return the embeddings that the pipeline is called with.

        The pipeline sees the first window of each picture; `in_windows` gives all of them to the UNet.
        """
        named = {"prompt_embeds": encoding.hidden}
        if encoding.pooled is not None and self.has_pooled:
            named["pooled_prompt_embeds"] = encoding.pooled
        positive = slice(-count, None, windows)
        negative = slice(None, count, windows)
        embeds = {}
        for name, rows in named.items():
            embeds[name] = rows[positive]
            if guided:
                embeds[f"negative_{name}"] = rows[negative]
        return embeds

    def save_memory(self) -> None:
        """Decode pictures one by one and checkpoint the gradients of the UNet: slower, with less memory.

        Attention is not sliced, because PyTorch's own attention needs no more memory than the slices do.
        """
        vae: Any = self.model["vae"]
        vae.enable_slicing()
        self.unet.enable_gradient_checkpointing()


BACKBONE = StableDiffusion
