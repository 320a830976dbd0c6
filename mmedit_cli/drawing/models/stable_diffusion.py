"""Stable Diffusion 1.x, 2.x and XL through diffusers: prompts with tokens of one's own, losses, seeded pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

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
        """Return those of some prompts."""
        return Encoding(
            self.hidden[which], None if self.pooled is None else self.pooled[which]
        )


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
    """How pictures are made: `steps` of the model's scheduler, `guidance` scale, `side` in pixels.

    None is what is usual for the model. `batch_size` pictures are made at once; same seeds in the same batches give
    the same pictures.
    """

    steps: int = 50
    guidance: float | None = None
    side: int | None = None
    negative: str = ""
    batch_size: int = 4


class StableDiffusion:
    """A Stable Diffusion pipeline with frozen weights; `model` holds its parts `unet`, `vae` and `text_encoder(_2)`.

    `words` are the tokens of one's own that prompts may name. `windows` may say that the picture of a prompt has
    several windows beside each other, and what each is told; it is wider then. While rows are in a forward pass
    `current_prompts` says what they are; hooks of an editor read it. `guidance` is the scale that is usual for it.
    """

    family: ClassVar[str] = "stable-diffusion"
    former, former_text = (
        "",
        "",
    )  # the fingerprints that version 0.1.0 gave to the model and to its text encoders

    def __init__(
        self, name: str, pipe: Any, fingerprint: str, text_fingerprint: str
    ) -> None:
        from diffusers import DDPMScheduler

        self.name, self.pipe, self.fingerprint, self.text_fingerprint = (
            name,
            pipe,
            fingerprint,
            text_fingerprint,
        )
        self.is_xl = getattr(pipe, "text_encoder_2", None) is not None
        names = ["unet", "vae", "text_encoder"] + ["text_encoder_2"] * self.is_xl
        self.model = (
            nn.ModuleDict({part: getattr(pipe, part) for part in names})
            .eval()
            .requires_grad_(False)
        )
        self.tokenizers = (
            [pipe.tokenizer, pipe.tokenizer_2] if self.is_xl else [pipe.tokenizer]
        )
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            cap_length(tokenizer, encoder)
        self.noise = DDPMScheduler.from_config(pipe.scheduler.config)
        self.words: dict[str, Word] = {}
        self.windows: Callable[[str], Sequence[str]] | None = None
        self.current_prompts: CurrentPrompts | None = None
        self.guidance = 7.5
        pipe.set_progress_bar_config(disable=True)

    # -- what it is made of -------------------------------------------------------------------------------------

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, in the order of their encodings."""
        return [
            self.model[part] for part in self.model if part.startswith("text_encoder")
        ]

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.model["unet"]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.unet.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.unet.dtype  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """D, the width of a token's encoding."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def max_length(self) -> int:
        """N, the tokens of a prompt with start, end and padding."""
        return int(self.tokenizers[0].model_max_length)

    @property
    def side(self) -> int:
        """The native height and width in pixels; raises ModelError where the model does not say it."""
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

    def cross_attention(self) -> list[Projection]:
        """Return the key and value projections that read the prompt, found from the structure of the UNet."""
        found = []
        for name, module in self.unet.named_modules():
            if getattr(module, "is_cross_attention", False) and hasattr(module, "to_k"):
                found += [
                    Projection(
                        f"unet.{name}.to_{role}",
                        role,
                        getattr(module, f"to_{role}").weight.shape[0],
                    )
                    for role in ("k", "v")
                ]
        return found

    def attention(self, roles: Sequence[str], *, text: Sequence[str] = ()) -> list[str]:
        """Return paths of attention projections: `roles` ("q", "v") in the UNet, `text` in the text encoders."""
        unet = tuple(f".to_{role}" for role in roles)
        encoder = tuple(f".{role}_proj" for role in text)
        return [
            path
            for path, _ in self.model.named_modules()
            if (path.startswith("unet.") and path.endswith(unet))
            or (path.startswith("text_encoder") and path.endswith(encoder))
        ]

    # -- prompts ------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str], *, unconditional: int = 0) -> Tokens:
        """Return prompts as token ids; the first `unconditional` are rows of classifier-free guidance."""
        return tokenize(
            self.tokenizers, self.words, prompts, unconditional=unconditional
        )

    def encode(self, tokens: Tokens, *, plain: bool = False) -> Encoding:
        """Run the text encoders; gradients reach the vectors of `words`.

        With `plain`, every token of one's own is encoded as its plain word, and positions are those of `tokens`.
        """
        hidden, pooled = [], None
        for i, encoder in enumerate(self.text_encoders):
            ids = (tokens.plain_ids if plain else tokens.ids)[i].to(self.device)
            with ExitStack() as stack:
                if not plain:
                    stack.enter_context(self._speaking(encoder, i, tokens))
                stack.enter_context(self.running(tokens))
                out = encoder(ids, output_hidden_states=self.is_xl)
            hidden.append(
                out.hidden_states[-2] if self.is_xl else out.last_hidden_state
            )
            pooled = getattr(out, "text_embeds", pooled)
        whole = torch.cat(hidden, -1)
        if plain:
            rows = torch.arange(len(whole), device=self.device)[:, None]
            whole = whole[rows, tokens.aligned.to(self.device)]
        return Encoding(whole, pooled)

    def encode_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the encodings (B, n, D) of unpadded token ids (B, n), one tensor for each text encoder."""
        outs = [
            encoder(some.to(self.device), output_hidden_states=self.is_xl)
            for encoder, some in zip(self.text_encoders, ids, strict=True)
        ]
        return torch.cat(
            [
                out.hidden_states[-2] if self.is_xl else out.last_hidden_state
                for out in outs
            ],
            -1,
        )

    @contextmanager
    def running(
        self, tokens: Tokens, encoding: Encoding | None = None
    ) -> Iterator[None]:
        """Say inside the block which prompts the rows of a forward pass belong to."""
        before, self.current_prompts = (
            self.current_prompts,
            CurrentPrompts(tokens, encoding),
        )
        try:
            yield
        finally:
            self.current_prompts = before

    def rows(self, of: int) -> CurrentPrompts:
        """Return the current prompts, for a hook that sees `of` rows; raise MmeditError if it is something else."""
        if (
            self.current_prompts is None
            or len(self.current_prompts.tokens.prompts) != of
        ):
            raise MmeditError(
                f"{self.name} with edits was called with {of} rows that are not known here",
                "go through StableDiffusion.generate, or remove the edits first",
            )
        return self.current_prompts

    @contextmanager
    def _speaking(self, encoder: Any, index: int, tokens: Tokens) -> Iterator[None]:
        """Let the vectors of tokens of one's own stand in the place of their embeddings inside the block."""
        present = [
            (place, self.words[t].vectors[index])
            for t, place in tokens.places.items()
            if place.any()
        ]
        if not present:
            yield
            return

        def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            for place, vectors in present:
                times = int(place.sum()) // len(vectors)
                here = place[..., None].to(output.device)
                output = output.masked_scatter(
                    here, vectors.repeat(times, 1).to(output)
                )
            return output

        handle = encoder.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def embedding(self, text: str) -> tuple[Tensor, ...]:
        """Return the input embedding (width,) of the last token of a text, for each text encoder, in float32."""
        found = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise DataError(
                    f"superclass {text!r}: not a word the model can read",
                    "e.g. --superclass dog",
                )
            found.append(
                encoder.get_input_embeddings().weight[ids[-1]].detach().float().clone()
            )
        return tuple(found)

    # -- pictures -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation) of the latents (B, C, h, w) of pictures (B, 3, H, W) in -1..1."""
        vae = self.model["vae"]
        spread = vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        check_finite(
            spread.mean,
            f"{self.name}: the latents of the pictures",
            self.model,
            lambda: vae.encode(pixels.to(self.device, self.dtype)),
        )
        return (
            spread.mean.float() * vae.config.scaling_factor,
            spread.std.float() * vae.config.scaling_factor,
        )

    def errors(self, latents: Tensor, encoding: Encoding, source: Generator) -> Tensor:
        """Return the squared errors (B, C, h, w) of what is predicted for noisy latents, at random steps.

        To be called, and followed back, inside `running`: a block that kept nothing is run again on the way back.
        """
        noise = torch.randn(latents.shape, generator=source).to(latents)
        steps = torch.randint(
            0,
            self.noise.config.num_train_timesteps,
            latents.shape[:1],
            generator=source,
        )
        steps = steps.to(latents.device)
        noisy = self.noise.add_noise(latents, noise, steps)
        kind = self.noise.config.prediction_type
        wanted = (
            noise
            if kind == "epsilon"
            else self.noise.get_velocity(latents, noise, steps)
        )
        added = self._xl_conditions(encoding, latents)

        def predict() -> Tensor:
            told = {
                "encoder_hidden_states": encoding.hidden,
                "added_cond_kwargs": added,
            }
            return self.unet(noisy.to(self.dtype), steps, **told).sample  # type: ignore[no-any-return]

        out = predict()
        check_finite(out, f"{self.name}: the predicted noise", self.model, predict)
        return (out.float() - wanted.float()).square()

    def _xl_conditions(
        self, encoding: Encoding, latents: Tensor
    ) -> dict[str, Tensor | None] | None:
        """Return what XL is told besides the prompt: the sizes of the picture; None for the others."""
        if not self.is_xl:
            return None
        height, width = (int(n) * self.scale for n in latents.shape[-2:])
        ids = torch.tensor(
            [[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype
        )
        return {"text_embeds": encoding.pooled, "time_ids": ids.repeat(len(latents), 1)}

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        tick: Tick | None = None,
    ) -> list[Any]:
        """Return one PIL image for each prompt and its seed; `tick(n)` is told of every picture's step that is done.

        Raises DataError for a size the model cannot draw, TooLong for a prompt whose own token would be cut off.
        """
        check_steps(self.pipe.scheduler, sampling.steps)
        side = sampling.side or self.side
        step = math.lcm(GRID, self.scale)
        if side % step or side < step:
            raise DataError(
                f"size {side}: not a multiple of {step} pixels",
                f"e.g. {max(1, side // step) * step}",
            )
        images: list[Any] = []
        for i in range(0, len(prompts), sampling.batch_size):
            some = slice(i, i + sampling.batch_size)
            images += self._batch(
                list(prompts[some]), list(seeds[some]), sampling, side, tick
            )
        return images

    def _batch(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        side: int,
        tick: Tick | None,
    ) -> list[Any]:
        told = [self.told(prompt) for prompt in prompts]
        wide = {i: len(texts) for i, texts in enumerate(told) if len(texts) > 1}
        images: list[Any] = [None] * len(prompts)
        if len(wide) < len(prompts):
            # the wide ones too, and in vain: the others are the same bit for bit only in a batch of the same size
            images, tick = self._generate(prompts, seeds, sampling, side, tick), None
        for count in sorted({*wide.values()}):
            rows = [i for i in wide if wide[i] == count]
            texts = [text for i in rows for text in told[i]]
            drawn = self._generate(
                texts, [seeds[i] for i in rows], sampling, side, tick, windows=count
            )
            for i, image in zip(rows, drawn, strict=True):
                images[i] = image
        return images

    def told(self, prompt: str) -> list[str]:
        """Return what each window of a prompt's picture is told: mostly one, the prompt itself."""
        return [prompt] if self.windows is None else list(self.windows(prompt))

    def scale_of(self, sampling: Sampling) -> float:
        """Return the scale of guidance that pictures are made with."""
        return self.guidance if sampling.guidance is None else sampling.guidance

    @torch.no_grad()
    def _generate(
        self,
        prompts: list[str],
        seeds: list[int],
        sampling: Sampling,
        side: int,
        tick: Tick | None,
        windows: int = 1,
    ) -> list[Any]:
        """Return a picture for each seed, of as many `prompts` as it has windows."""
        count = len(prompts)
        scale = self.scale_of(sampling)
        guided = scale > 1 and self.unet.config.time_cond_proj_dim is None
        tokens = self.tokenize(
            [sampling.negative] * count * guided + prompts, unconditional=count * guided
        )
        encoding = self.encode(tokens)
        if (
            guided
            and self.is_xl
            and not sampling.negative
            and self.pipe.config.force_zeros_for_empty_prompt
        ):
            encoding.hidden[:count], encoding.pooled[:count] = 0, 0  # type: ignore[index]
        # of several windows the pipeline is told what the first is; the UNet sees the others in its place
        parts: dict[str, Any] = {"prompt_embeds": encoding.hidden[-count::windows]}
        if guided:
            parts["negative_prompt_embeds"] = encoding.hidden[:count:windows]
        if self.is_xl:
            parts["pooled_prompt_embeds"] = encoding.pooled[-count::windows]  # type: ignore[index]
            if guided:
                parts["negative_pooled_prompt_embeds"] = encoding.pooled[:count:windows]  # type: ignore[index]
        canvas = Canvas.of(windows, side, self.scale)

        def draw(check: Callable[[Tensor, str], None]) -> Tensor:
            """Return the pixels, (B, 3, H, W) in 0..1; `check` is given all that leaves the model."""

            def step_done(
                _pipe: Any, index: int, _time: Any, values: Any
            ) -> dict[str, Any]:
                check(
                    values["latents"],
                    f"the latents of step {index + 1} of {sampling.steps}",
                )
                if tick is not None:
                    tick(len(seeds))
                return {}

            with ExitStack() as stack:
                stack.enter_context(self.running(tokens, encoding))
                if windows > 1:
                    stack.enter_context(
                        in_windows(
                            self.unet,
                            canvas,
                            encoding.hidden,
                            partial(self._xl_conditions, encoding),
                        )
                    )
                pixels = self.pipe(
                    **parts, height=side, width=canvas.width * self.scale, num_inference_steps=sampling.steps,
                    guidance_scale=scale, generator=[runtime.generator(seed) for seed in seeds],
                    callback_on_step_end=step_done, output_type="pt",
                ).images  # fmt: skip
            check(pixels, "the pictures")
            return pixels  # type: ignore[no-any-return]

        def again() -> None:
            self.encode(tokens)
            draw(lambda _values, _what: None)

        def check(values: Tensor, what: str) -> None:
            check_finite(values, f"{self.name}: {what}", self.model, again)

        check(encoding.hidden, "the encodings of the prompts")
        processor = self.pipe.image_processor
        return list(processor.numpy_to_pil(processor.pt_to_numpy(draw(check))))

    def save_memory(self) -> None:
        """Decode pictures one by one, and keep little of the UNet's blocks while learning: slower, in less memory.

        Attention is not sliced: PyTorch's own needs no more memory than slices do.
        """
        self.model["vae"].enable_slicing()
        self.unet.enable_gradient_checkpointing()


BACKBONE = StableDiffusion
