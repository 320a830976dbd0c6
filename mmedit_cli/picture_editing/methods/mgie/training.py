"""Training MGIE: the language model learns to spell instructions out, the denoiser to follow its visual tokens."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.errors import DataError, MmeditError
from mmedit_cli.knowledge.evaluation.protocol import PREPARING
from mmedit_cli.knowledge.training_loop import (
    LOG_EVERY,
    SAVE_SECONDS,
    Conditions,
    below,
    rate_at,
)
from mmedit_cli.picture_editing.data.base import EditPair
from mmedit_cli.picture_editing.methods.mgie.alignment import TextEncodings
from mmedit_cli.picture_editing.methods.mgie.editor import Mgie
from mmedit_cli.picture_editing.methods.mgie.guide import IGNORE
from mmedit_cli.picture_editing.methods.mgie.modules import N_TOKENS
from mmedit_cli.picture_editing.methods.mgie.parts import make_trainable, restore
from mmedit_cli.picture_editing.methods.shared.latent import encode_pictures, to_pixels
from mmedit_cli.picture_editing.methods.shared.loading import content_of
from mmedit_cli.records import Run

# Pairs whose instruction contains one of these are not mirrored.
_LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_EMA_WARMUP = 10  # the running mean follows quickly at first (as in InstructPix2Pix)


@dataclass(frozen=True)
class TrainingSample:
    """A pair as it is shown once: square pictures of one size, texts, and random numbers.

    `u` decides the condition dropout, `t` the time step (0..1). `noise` (4, h, w) is added to the latents, `spread`
    (4, h, w) samples the VAE's distribution of the target.
    """

    source: Image.Image
    target: Image.Image
    instruction: str
    expressive: str
    plain: str
    u: float
    t: float
    noise: Tensor
    spread: Tensor


class MgieLosses(NamedTuple):
    """Losses of some samples.

    `instruction` is summed over `tokens` tokens; `edit` is that of the denoiser, `align` that of `TextEncodings`.
    """

    instruction: Tensor
    tokens: int
    edit: Tensor
    align: Tensor


def dropped(u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return which samples lose their condition and which their picture, for random numbers u (B,) from 0 .. 1.

    A `share` loses the condition alone, as many both, as many the picture alone (Brooks et al. 2023, section 3.2.1).
    """
    no_condition = u < 2 * share
    no_picture = (u >= share) & (u < 3 * share)
    return no_condition, no_picture


def train_mgie(
    editor: Mgie,
    hparams: Any,
    pairs: Sequence[EditPair],
    held_out: Sequence[EditPair],
    run: Run,
    how: Conditions,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Train from where `run` left it, and write the trained parameters to `editor.safetensors` at the end.

    The order of the pairs and every random choice depend on the seed and the step alone, so an interrupted training
    ends with the same bits. Returns values for the report. Raises DataError for pairs that cannot be used.
    """
    training = MgieTraining(editor, hparams, run, how, seed)
    training.prepare(pairs, held_out)
    how.tick("steps", training.step)
    training.run_steps()
    if how.processes.rank:
        return {}
    log = run.read("log")
    for line in log:
        values = {**line.get("losses", {}), **line.get("held_out", {})}
        for name, value in values.items():
            how.curve(name, value, line["step"])
    trained = training.trained.values()
    return {
        "steps": hparams.training.steps,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "losses": [line for line in log if "losses" in line],
        "curve": [line for line in log if "held_out" in line],
        "cost": {"seconds": training.seconds},
    }


class MgieTraining:
    """The state of one training.

    `looked` is the last step after which the held-out pairs were scored.
    """

    def __init__(
        self, editor: Mgie, hparams: Any, run: Run, how: Conditions, seed: int
    ) -> None:
        from diffusers import DDPMScheduler

        self.editor = editor
        self.hparams = hparams
        self.run = run
        self.how = how
        self.seed = seed
        self.hp = hparams.training
        self.processes = how.processes
        self.guide = editor.guide
        self.trained = make_trainable(
            editor.pipeline,
            hparams,
            seed=seed,
        )
        self.pairs: Sequence[EditPair] = ()
        self.held_out: Sequence[EditPair] = ()
        self.expressive: dict[str, str] = {}
        config = editor.scheduler.config
        self.noise_scheduler: Any = DDPMScheduler.from_config(config)
        self.optimizer = self._optimizer()
        self.mean: dict[str, Tensor] = {}
        if self.hp.ema:
            for name, parameter in self.trained.items():
                if name.startswith("unet."):
                    self.mean[name] = parameter.detach().clone()
        self.texts: TextEncodings | None = None
        if self.hp.align_weight:
            self.texts = TextEncodings(hparams.diffusion, editor.device)
        self.step = 0
        self.looked = 0
        self.seconds = 0.0
        self._sums: dict[str, Tensor] = {}
        self._restore()

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser, with a learning rate of its own for the denoiser."""
        in_unet: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.trained.items():
            group = in_unet if name.startswith("unet.") else others
            group.append(parameter)
        unet_scale = self.hp.unet_learning_rate / self.hp.learning_rate
        return torch.optim.AdamW(
            [
                {"params": others, "scale": 1.0},
                {"params": in_unet, "scale": unet_scale},
            ],
            lr=self.hp.learning_rate,
            weight_decay=self.hp.weight_decay,
        )

    @property
    def frozen_prefix(self) -> bool:
        """Whether nothing is trained that the prompt and the expressive instruction depend on."""
        return self.hparams.train_lm == "none" or self.second_phase

    @property
    def first_phase(self) -> bool:
        """Whether only the language model is trained now (two_phase)."""
        two_phases = self.hparams.train_lm == "two_phase"
        return bool(two_phases and self.step < self.hp.phase * self.hp.steps)

    @property
    def second_phase(self) -> bool:
        """Whether the language model is frozen again (two_phase)."""
        return self.hparams.train_lm == "two_phase" and not self.first_phase

    # -- data ---------------------------------------------------------------------------------------------------

    def prepare(self, pairs: Sequence[EditPair], held_out: Sequence[EditPair]) -> None:
        """Take the pairs; for those without an expressive instruction, ask the untrained model for one, once."""
        if not pairs:
            raise DataError("no pairs to train on")
        self.pairs = pairs
        self.held_out = held_out[: self.hp.validation_pairs]
        every = [*pairs, *self.held_out]
        known = {_key(pair): pair.expressive for pair in every if pair.expressive}
        for line in self.run.read("expressive"):
            known[line["pair"]] = line["expressive"]
        missing = [pair for pair in every if _key(pair) not in known]
        if self.hparams.expressive == "instruction":
            known |= {_key(pair): pair.instruction for pair in missing}
        elif missing and self.step == 0:
            if self.processes.world > 1:
                raise DataError(
                    f"{len(missing)} pairs have no expressive instruction",
                    "run once in one process: it is kept with the run",
                )
            self.how.say(
                f"preparing: the model is asked for {len(missing):,} expressive instructions, which are kept"
            )
            known |= self._ask(missing)
        elif missing:
            raise DataError(
                f"{missing[0].place}: no expressive instruction kept with the run",
                "start anew with --force",
            )
        self.expressive = known

    def _ask(self, pairs: Sequence[EditPair]) -> dict[str, str]:
        """Return the expressive instructions that the model derives, and write them into the run."""
        derived = {}
        for start in range(0, len(pairs), self.hp.micro_batch):
            part = pairs[start : start + self.hp.micro_batch]
            instructions = self.guide.write(
                [self._fitted(pair.source()) for pair in part],
                [pair.instruction for pair in part],
                longest=self.hparams.longest,
                briefly=True,
            )
            lines = []
            for pair, instruction in zip(part, instructions, strict=True):
                key = _key(pair)
                lines.append({"pair": key, "expressive": instruction.text})
                derived[key] = instruction.text
            self.run.append("expressive", lines)
            self.how.tick(PREPARING, len(part))
        return derived

    def _fitted(self, picture: Image.Image) -> Image.Image:
        size = (self.hp.resolution, self.hp.resolution)
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)

    def sample(
        self, pair: EditPair, number: int, *, by_chance: bool = True
    ) -> TrainingSample:
        """Return the `number`-th sample of the training; without chance, nothing is dropped or mirrored."""
        generator = runtime.generator(self.seed * 1_000_003 + number)
        u, flip, t = torch.rand(3, generator=generator).tolist()
        source = self._fitted(pair.source())
        target = source  # not used without an edit loss
        if self.hp.edit_weight:
            target = self._fitted(pair.target())
        mirrored = by_chance and flip < self.hp.flip
        if mirrored and not _LEFT_OR_RIGHT.search(pair.instruction):
            source = ImageOps.mirror(source)
            target = ImageOps.mirror(target)
        size = self.hp.resolution // self.editor.multiple
        shape = (self.editor.vae.config.latent_channels, size, size)
        noise = torch.randn(shape, generator=generator)
        spread = torch.randn(shape, generator=generator)
        return TrainingSample(
            source=source,
            target=target,
            instruction=pair.instruction,
            expressive=self.expressive[_key(pair)],
            plain=pair.plain or pair.instruction,
            u=u if by_chance else 1.0,
            t=t,
            noise=noise,
            spread=spread,
        )

    def _batch(self) -> list[tuple[EditPair, int]]:
        """Return the (pair, number) of a step: every epoch has its own order and contains every pair."""
        size = self.hp.batch_size
        first = self.step * size
        orders: dict[int, list[int]] = {}
        batch = []
        for number in range(first, first + size):
            epoch, place = divmod(number, len(self.pairs))
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            index = orders[epoch][place]
            batch.append((self.pairs[index], number))
        return batch

    def _order(self, epoch: int) -> list[int]:
        generator = runtime.generator(self.seed * 7_368_787 + epoch)
        order: list[int] = torch.randperm(
            len(self.pairs),
            generator=generator,
        ).tolist()
        return order

    # -- losses -------------------------------------------------------------------------------------------------

    def losses(self, samples: Sequence[TrainingSample]) -> MgieLosses:
        """Return the losses of some samples; while only the language model is trained, that of the instruction."""
        bfloat16 = self.editor.vae.dtype == torch.bfloat16
        with torch.autocast(
            self.editor.device.type,
            torch.bfloat16,
            enabled=bfloat16,
        ):
            rows = self.guide.rows(
                self.guide.features([s.source for s in samples]),
                [s.instruction for s in samples],
                [s.expressive for s in samples],
            )
            states = self.guide.states(rows, frozen_prefix=self.frozen_prefix)
            labels = self.guide.labels(rows, visual_only=self.second_phase)
            counted = labels != IGNORE
            logits = self.guide.logits(states.hidden[counted]).float()
            instruction = nn.functional.cross_entropy(
                logits,
                labels[counted],
                reduction="sum",
            )
            edit = instruction.new_zeros(())
            align = edit
            if not self.first_phase:
                condition = self.editor.edit_head(states.visual.float())
                if self.hp.edit_weight:
                    edit = self._edit_loss(samples, condition)
                if self.texts is not None:
                    plain = [s.plain for s in samples]
                    align = self.texts.distance(
                        condition,
                        self.editor.edit_head,
                        plain,
                    )
        return MgieLosses(instruction, int(counted.sum()), edit, align)

    def _edit_loss(
        self, samples: Sequence[TrainingSample], condition: Tensor
    ) -> Tensor:
        """Return the mean squared error of the denoiser's prediction (B, 4, h, w)."""
        editor, scheduler = self.editor, self.noise_scheduler
        device = editor.device
        source, latents = self._encode(samples)
        noise = torch.stack([s.noise for s in samples]).to(device)
        times = self._times(samples)
        # classifier-free guidance needs a model that also knows no condition and no picture
        u = torch.tensor([s.u for s in samples], device=device)
        no_text, no_picture = dropped(u, self.hp.drop)
        null = editor.edit_head.null(len(samples))
        condition = torch.where(no_text[:, None, None], null, condition)
        has_picture = ~no_picture
        source = source * has_picture[:, None, None, None]
        noisy = scheduler.add_noise(latents, noise, times)
        output = editor.unet(
            torch.cat([noisy, source], 1),
            times,
            encoder_hidden_states=condition,
        )
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, times)
        return nn.functional.mse_loss(output.sample.float(), target)

    @torch.no_grad()
    def _encode(self, samples: Sequence[TrainingSample]) -> tuple[Tensor, Tensor]:
        """Return the latents of the sources, not scaled, and those of the targets, each (B, 4, h, w)."""
        vae = self.editor.vae
        source = encode_pictures(vae, [s.source for s in samples])
        pixels = to_pixels([s.target for s in samples])
        encoded = vae.encode(
            pixels.to(vae.device, vae.dtype),
        )
        mean = encoded.latent_dist.mean.float()
        std = encoded.latent_dist.std.float()
        spread = torch.stack([s.spread for s in samples])
        latents = mean + std * spread.to(self.editor.device)
        scaled = latents * vae.config.scaling_factor
        return source.float(), scaled

    def _times(self, samples: Sequence[TrainingSample]) -> Tensor:
        """Return the time step of each sample, (B,)."""
        count = self.noise_scheduler.config.num_train_timesteps
        times = []
        for sample in samples:
            time_step = int(sample.t * count)
            times.append(min(count - 1, time_step))
        return torch.tensor(times, device=self.editor.device)

    def _n_labels(self, pairs: Sequence[EditPair]) -> int:
        """Return how many tokens the instruction loss of some pairs counts, without running anything."""
        vision = self.editor.pipeline.mllm.config.vision_config
        n_image = (vision.image_size // vision.patch_size) ** 2
        total = 0
        for pair in pairs:
            expressive = self.expressive[_key(pair)]
            ids, n_prompt = self.guide.token_ids(
                pair.instruction,
                expressive,
                n_image,
            )
            if not self.second_phase:
                total += len(ids) - n_prompt
            total += N_TOKENS + 1  # the visual tokens and the end
        return total

    # -- steps --------------------------------------------------------------------------------------------------

    def run_steps(self) -> None:
        """Take the remaining steps and write the result; control-C ends the training after the present step."""
        with runtime.Interrupts(self.how.say) as interrupts:
            self._run_steps(interrupts)
        if self.processes.rank == 0:
            self._write_result()

    def _run_steps(self, interrupts: runtime.Interrupts) -> None:
        writes = self.processes.rank == 0
        spent = self.seconds
        started = time.monotonic()
        saved = started
        while self.step < self.hp.steps or self._validation_is_due():
            if self._validation_is_due():
                with interrupts.at_once():  # the step itself is saved already
                    self._validate()
            else:
                self._step()
                self.step += 1
                if writes:
                    self.how.tick("steps", 1)
                    if self._validation_is_due() or self.step % LOG_EVERY == 0:
                        self._log()
            self.seconds = spent + time.monotonic() - started
            validated = self.looked == self.step
            overdue = time.monotonic() - saved >= SAVE_SECONDS
            at_milestone = validated or self._validation_is_due()
            if writes and (at_milestone or overdue or interrupts.came):
                self._save()
                saved = time.monotonic()
            interrupts.stop_if_asked()

    def _validation_is_due(self) -> bool:
        """Whether the held-out pairs must be scored before the next step."""
        if self.processes.rank or self.step <= self.looked:
            return False
        at_end = self.step == self.hp.steps
        at_interval: bool = self.step % self.hp.validate_every == 0
        return at_end or at_interval

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.hp, self.step) * group["scale"]
        self._set_requires_grad()
        batch = self._batch()
        labels = self._n_labels([pair for pair, _ in batch])
        sums = self._backward(batch, labels)
        self._add_gradients()
        if self.hp.clip is not None:
            parameters = self.trained.values()
            with_gradient = [p for p in parameters if p.grad is not None]
            nn.utils.clip_grad_norm_(with_gradient, self.hp.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_mean()
        sums["total"] = self._total(sums)
        sums["steps"] = torch.ones(())
        for name, value in sums.items():
            before = self._sums.get(name, torch.zeros(()))
            self._sums[name] = before + value

    def _set_requires_grad(self) -> None:
        """Freeze the parameters that are not trained in this phase."""
        for name, parameter in self.trained.items():
            frozen = self.first_phase and ".tokens." not in name
            if name.startswith("mllm."):
                frozen = self.frozen_prefix
            parameter.requires_grad_(not frozen)

    def _backward(
        self, batch: Sequence[tuple[EditPair, int]], labels: int
    ) -> dict[str, Tensor]:
        """Add the gradients of this process's share of a batch; return its losses as shares of the whole batch."""
        rank, world = self.processes.rank, self.processes.world
        size = len(batch)
        own = batch[rank * size // world : (rank + 1) * size // world]
        sums = {name: torch.zeros(()) for name in ("instruction", "edit", "align")}
        for start in range(0, len(own), self.hp.micro_batch):
            part = own[start : start + self.hp.micro_batch]
            found = self.losses([self.sample(pair, number) for pair, number in part])
            share = len(part) / size
            losses = {
                "instruction": found.instruction / labels,
                "edit": found.edit * share,
                "align": found.align * share,
            }
            torch.autograd.backward(self._total(losses))
            for name, loss in losses.items():
                sums[name] += loss.detach().cpu()
        return sums

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        edit = self.hp.edit_weight * losses["edit"]
        align = self.hp.align_weight * losses["align"]
        total: Tensor = losses["instruction"] + edit + align
        return total

    def _add_gradients(self) -> None:
        if self.processes.world == 1:
            return
        for parameter in self.trained.values():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad = self.processes.add(parameter.grad)

    @torch.no_grad()
    def _update_mean(self) -> None:
        """Move the running mean of the denoiser."""
        if not self.hp.ema or self.first_phase:
            return
        warmup = (1 + self.step) / (_EMA_WARMUP + self.step)
        decay = min(self.hp.ema, warmup)
        for name, mean in self.mean.items():
            mean.lerp_(self.trained[name], 1 - decay)

    def _log(self) -> None:
        steps = float(self._sums.pop("steps"))
        losses = {}
        for name, value in self._sums.items():
            losses[name] = round(float(value) / steps, 5)
        self._sums = {}
        if not math.isfinite(losses["total"]):
            raise MmeditError(
                f"the loss became {losses['total']} at step {self.step}",
                "lower learning_rate",
            )
        line = {
            "step": self.step,
            "rate": rate_at(self.hp, self.step - 1),
            "losses": losses,
        }
        self.run.append("log", [line])

    @torch.no_grad()
    def _validate(self) -> None:
        """Write the losses on the held-out pairs: the same noise each time, nothing dropped."""
        instruction = 0.0
        tokens = 0
        edit = 0.0
        align = 0.0
        for start in range(0, len(self.held_out), self.hp.micro_batch):
            samples = []
            part = self.held_out[start : start + self.hp.micro_batch]
            for i, pair in enumerate(part, start):
                samples.append(self.sample(pair, -1 - i, by_chance=False))
            losses = self.losses(samples)
            instruction += float(losses.instruction)
            tokens += losses.tokens
            edit += float(losses.edit) * len(part)
            align += float(losses.align) * len(part)
        n = max(1, len(self.held_out))
        means = {
            "instruction": instruction / max(1, tokens),
            "edit": edit / n,
            "align": align / n,
        }
        rounded = {name: round(value, 5) for name, value in means.items()}
        self.run.append("log", [{"step": self.step, "held_out": rounded}])
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        self.how.say(f"step {self.step}/{self.hp.steps}  held out: {text}")
        self.looked = self.step

    # -- files --------------------------------------------------------------------------------------------------

    def _write_result(self) -> None:
        """Write the trained parameters, with the running mean in place of the denoiser if there is one."""
        tensors = {name: value.detach() for name, value in self.trained.items()}
        tensors |= self.mean
        hparams = asdict(self.hparams)
        hparams["diffusion"] = _absolute(self.hparams.diffusion)
        about = {
            "hparams": hparams,
            "model": _absolute(self.editor.model),
            "fingerprint": self.editor.fingerprint,
            "diffusion": content_of(self.hparams.diffusion),
        }
        self.run.save_tensors(
            "editor",
            tensors,
            {"mgie": json.dumps(about)},
        )

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            tensors[f"trained.{name}"] = parameter.detach()
        for name, value in self.mean.items():
            tensors[f"mean.{name}"] = value
        for name, value in self._sums.items():
            tensors[f"sums.{name}"] = value
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = value
        metadata = {
            "step": str(self.step),
            "looked": str(self.looked),
            "seconds": str(self.seconds),
        }
        self.run.save_tensors("last", tensors, metadata)

    def _restore(self) -> None:
        """Continue from the last saved step; later lines of the log are removed."""
        saved = self.run.load_tensors("last")
        if saved is not None:
            self._restore_tensors(*saved)
        if self.processes.rank == 0:
            log = self.run.read("log")
            self.run.rewrite("log", [line for line in log if self._is_past(line)])

    def _restore_tensors(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        restore(self.trained, below(tensors, "trained."), str(self.run.folder))
        device = self.editor.device
        means = below(tensors, "mean.")
        self.mean = {name: value.to(device) for name, value in means.items()}
        self._sums = dict(below(tensors, "sums."))
        of_optimizer = below(tensors, "optimizer.")
        by_index: dict[int, dict[str, Tensor]] = {}
        for name, value in of_optimizer.items():
            index, _, key = name.partition(".")
            of_parameter = by_index.setdefault(int(index), {})
            of_parameter[key] = value
        state = self.optimizer.state_dict()
        state["state"] = by_index
        self.optimizer.load_state_dict(state)
        self.step = int(metadata["step"])
        self.seconds = float(metadata["seconds"])
        # Older files were saved after the validation of their step.
        self.looked = int(metadata.get("looked", metadata["step"]))

    def _is_past(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log was written before the last save."""
        last = self.looked if "held_out" in line else self.step
        return bool(line["step"] <= last)


def _key(pair: EditPair) -> str:
    """Return a name of a pair that is unique among all files."""
    return f"{pair.uid}:{pair.digest}"


def _absolute(name: str) -> str:
    """Return a name by which a model is found from any working directory."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name
