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
from mmedit_cli.picture_editing.methods.mgie import Mgie
from mmedit_cli.picture_editing.methods.mgie.alignment import TextEncodings
from mmedit_cli.picture_editing.methods.mgie.guide import IGNORE
from mmedit_cli.picture_editing.methods.mgie.parts import make_trainable, restore
from mmedit_cli.picture_editing.methods.shared.latent import encode_pictures, to_pixels
from mmedit_cli.picture_editing.methods.shared.loading import content_of
from mmedit_cli.records import Run

_SIDES = re.compile(
    r"\b(left|right)\b", re.IGNORECASE
)  # an instruction with one of these is not mirrored
_EMA_WARMUP = 10  # the running mean follows quickly at first (as in InstructPix2Pix)


@dataclass(frozen=True)
class Sample:
    """A pair as it is shown once: pictures of one square size, texts, and what chance decides.

    u: the draw of the condition dropout; t: share of noise, 0..1; noise, spread: of latents, of encoding (4, h, w).
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


class Losses(NamedTuple):
    """Of some samples: of the instruction, summed over `count` tokens; of the denoiser; of `TextEncodings`."""

    said: Tensor
    count: int
    edit: Tensor
    align: Tensor


def dropped(u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return which samples lose their condition and which their picture, for draws u (B,) from 0 .. 1.

    A `share` loses the condition alone, as much both, as much the picture alone (Brooks et al. 2023).
    """
    return u < 2 * share, (u >= share) & (u < 3 * share)


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
    """Train from where `run` left it; what was trained is in `editor.safetensors` at the end, nothing frozen is.

    The order of the pairs and every random choice depend on the seed and the step alone, so a training that was
    interrupted ends with the same bits. Returns what a report tells. Raises DataError for pairs that cannot be used.
    """
    training = _Training(editor, hparams, run, how, seed)
    training.say_expressively(pairs, held_out)
    how.tick("steps", training.step)
    training.go_on()
    if how.processes.rank:
        return {}
    log = run.read("log")
    for line in log:
        for name, value in {
            **line.get("losses", {}),
            **line.get("held_out", {}),
        }.items():
            how.curve(name, value, line["step"])
    return {
        "steps": hparams.training.steps,
        "trained_parameters": sum(p.numel() for p in training.trained.values()),
        "losses": [line for line in log if "losses" in line],
        "curve": [line for line in log if "held_out" in line],
        "cost": {"seconds": training.seconds},
    }


class _Training:
    """The state of one training."""

    def __init__(
        self, editor: Mgie, hparams: Any, run: Run, how: Conditions, seed: int
    ) -> None:
        from diffusers import DDPMScheduler

        self.editor, self.hparams, self.run, self.how, self.seed = (
            editor,
            hparams,
            run,
            how,
            seed,
        )
        self.hp, self.processes, self.guide = (
            hparams.training,
            how.processes,
            editor.guide,
        )
        self.trained = make_trainable(editor.pipeline, hparams, seed=seed)
        self.pairs: Sequence[EditPair] = ()
        self.held_out: Sequence[EditPair] = ()
        self.expressive: dict[str, str] = {}
        self.noising = DDPMScheduler.from_config(editor.scheduler.config)
        groups = [
            {
                "params": [
                    p for n, p in self.trained.items() if n.startswith("unet.") == unet
                ],
                "scale": scale,
            }
            for unet, scale in (
                (False, 1.0),
                (True, self.hp.unet_learning_rate / self.hp.learning_rate),
            )
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.hp.learning_rate, weight_decay=self.hp.weight_decay
        )
        self.mean = {
            n: p.detach().clone()
            for n, p in self.trained.items()
            if n.startswith("unet.") and self.hp.ema
        }
        self.texts = (
            TextEncodings(hparams.diffusion, editor.device)
            if self.hp.align_weight
            else None
        )
        self.step, self.looked, self.seconds, self._sums = 0, 0, 0.0, {}
        self._restore()

    @property
    def frozen_prefix(self) -> bool:
        """Whether nothing is trained that the prompt and the expressive instruction depend on."""
        return self.hparams.train_lm == "none" or (
            self.hparams.train_lm == "two_phase" and not self.first_phase
        )

    @property
    def first_phase(self) -> bool:
        """Whether only the language model is trained now (two_phase)."""
        return (
            self.hparams.train_lm == "two_phase"
            and self.step < self.hp.phase * self.hp.steps
        )

    # -- data ---------------------------------------------------------------------------------------------------

    def say_expressively(
        self, pairs: Sequence[EditPair], held_out: Sequence[EditPair]
    ) -> None:
        """Take the pairs; where they have no expressive instruction, ask the model as it was, once, in few words."""
        if not pairs:
            raise DataError("no pairs to train on")
        self.pairs, self.held_out = pairs, held_out[: self.hp.validation_pairs]
        every = [*pairs, *self.held_out]
        told = {_key(pair): pair.expressive for pair in every if pair.expressive}
        told |= {
            line["pair"]: line["expressive"] for line in self.run.read("expressive")
        }
        left = [pair for pair in every if _key(pair) not in told]
        if self.hparams.expressive == "instruction":
            told |= {_key(pair): pair.instruction for pair in left}
        elif left and self.step == 0:
            if self.processes.world > 1:
                raise DataError(
                    f"{len(left)} pairs have no expressive instruction",
                    "run once in one process: it is kept with the run",
                )
            self.how.say(
                f"preparing: the model is asked for {len(left):,} expressive instructions, which are kept"
            )
            told |= self._ask(left)
        elif left:
            raise DataError(
                f"{left[0].place}: no expressive instruction kept with the run",
                "start anew with --force",
            )
        self.expressive = told

    def _ask(self, left: Sequence[EditPair]) -> dict[str, str]:
        found = {}
        for start in range(0, len(left), self.hp.micro_batch):
            part = left[start : start + self.hp.micro_batch]
            pictures = [self._fitted(pair.source()) for pair in part]
            said = self.guide.write(
                pictures,
                [p.instruction for p in part],
                longest=self.hparams.longest,
                briefly=True,
            )
            lines = [
                {"pair": _key(p), "expressive": w.text}
                for p, w in zip(part, said, strict=True)
            ]
            self.run.append("expressive", lines)
            found |= {line["pair"]: line["expressive"] for line in lines}
            self.how.tick(PREPARING, len(part))
        return found

    def _fitted(self, picture: Image.Image) -> Image.Image:
        side = self.hp.resolution
        return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)

    def sample(self, pair: EditPair, number: int, *, by_chance: bool = True) -> Sample:
        """Return a pair as it is shown the `number`-th time of all; without chance, nothing is dropped or mirrored."""
        generator = runtime.generator(self.seed * 1_000_003 + number)
        u, flip, t = torch.rand(3, generator=generator).tolist()
        source = self._fitted(pair.source())
        target = (
            self._fitted(pair.target()) if self.hp.edit_weight else source
        )  # not looked at
        if by_chance and flip < self.hp.flip and not _SIDES.search(pair.instruction):
            source, target = ImageOps.mirror(source), ImageOps.mirror(target)
        side = self.hp.resolution // self.editor.multiple
        shape = (self.editor.vae.config.latent_channels, side, side)
        noise, spread = (torch.randn(shape, generator=generator) for _ in range(2))
        texts = (
            pair.instruction,
            self.expressive[_key(pair)],
            pair.plain or pair.instruction,
        )
        return Sample(source, target, *texts, u if by_chance else 1.0, t, noise, spread)

    def _batch(self) -> list[tuple[EditPair, int]]:
        """Return the (pair, number) of a step: every epoch in its own order, no pair left out."""
        size, count = self.hp.batch_size, len(self.pairs)
        orders: dict[int, list[int]] = {}
        found = []
        for number in range(self.step * size, (self.step + 1) * size):
            epoch, place = divmod(number, count)
            if epoch not in orders:
                generator = runtime.generator(self.seed * 7_368_787 + epoch)
                orders[epoch] = torch.randperm(count, generator=generator).tolist()
            found.append((self.pairs[orders[epoch][place]], number))
        return found

    # -- losses -------------------------------------------------------------------------------------------------

    def losses(self, samples: Sequence[Sample]) -> Losses:
        """Return the losses of some samples; only that of the instruction while just the language model is trained."""
        bfloat16 = self.editor.vae.dtype == torch.bfloat16
        with torch.autocast(self.editor.device.type, torch.bfloat16, enabled=bfloat16):
            features = self.guide.features([s.source for s in samples])
            rows = self.guide.rows(
                features,
                [s.instruction for s in samples],
                [s.expressive for s in samples],
            )
            states = self.guide.states(rows, frozen_prefix=self.frozen_prefix)
            visual_only = self.hparams.train_lm == "two_phase" and not self.first_phase
            labels = self.guide.labels(rows, visual_only=visual_only)
            counted = labels != IGNORE
            logits = self.guide.logits(states.hidden[counted]).float()
            said = nn.functional.cross_entropy(logits, labels[counted], reduction="sum")
            edit = align = said.new_zeros(())
            if not self.first_phase:
                condition = self.editor.edit_head(states.visual.float())
                edit = (
                    self._edit_loss(samples, condition) if self.hp.edit_weight else edit
                )
                if self.texts is not None:
                    align = self.texts.distance(
                        condition, self.editor.edit_head, [s.plain for s in samples]
                    )
        return Losses(said, int(counted.sum()), edit, align)

    def _edit_loss(self, samples: Sequence[Sample], condition: Tensor) -> Tensor:
        """Return the mean squared error of the denoiser's prediction (B, 4, h, w)."""
        editor, vae, device = self.editor, self.editor.vae, self.editor.device
        with torch.no_grad():
            source = encode_pictures(vae, [s.source for s in samples]).float()
            pixels = to_pixels([s.target for s in samples]).to(vae.device, vae.dtype)
            moments = vae.encode(pixels).latent_dist
            spread = torch.stack([s.spread for s in samples]).to(device)
            latents = (
                moments.mean.float() + moments.std.float() * spread
            ) * vae.config.scaling_factor
        noise = torch.stack([s.noise for s in samples]).to(device)
        most = self.noising.config.num_train_timesteps
        t = torch.tensor(
            [min(most - 1, int(s.t * most)) for s in samples], device=device
        )
        no_text, no_picture = dropped(
            torch.tensor([s.u for s in samples], device=device), self.hp.drop
        )
        condition = torch.where(
            no_text[:, None, None], editor.edit_head.null(len(samples)), condition
        )
        source = source * (~no_picture)[:, None, None, None]
        inputs = torch.cat([self.noising.add_noise(latents, noise, t), source], 1)
        predicted = editor.unet(inputs, t, encoder_hidden_states=condition).sample
        wanted = noise
        if self.noising.config.prediction_type == "v_prediction":
            wanted = self.noising.get_velocity(latents, noise, t)
        return nn.functional.mse_loss(predicted.float(), wanted)

    def _n_labels(self, pairs: Sequence[EditPair]) -> int:
        """Return how many tokens the instruction loss of some pairs counts, without running anything."""
        config = self.editor.pipeline.mllm.config
        n_image = (
            config.vision_config.image_size // config.vision_config.patch_size
        ) ** 2
        total = 0
        for pair in pairs:
            ids, n_prompt = self.guide.token_ids(
                pair.instruction, self.expressive[_key(pair)], n_image
            )
            visual_only = self.hparams.train_lm == "two_phase" and not self.first_phase
            total += (0 if visual_only else len(ids) - n_prompt) + 9
        return total

    # -- steps --------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Take the steps that are left, and keep what was trained; control-C ends them with the present step."""
        with runtime.Interrupts(self.how.say) as interrupts:
            self._go_on(interrupts)
        if self.processes.rank == 0:
            self._keep()

    def _go_on(self, interrupts: runtime.Interrupts) -> None:
        writes, spent, started = (
            self.processes.rank == 0,
            self.seconds,
            time.monotonic(),
        )
        saved = started
        while self.step < self.hp.steps or self._look_is_due():
            if self._look_is_due():
                with interrupts.at_once():  # what it is about is saved
                    self._validate()
            else:
                self._step()
                self.step += 1
                if writes:
                    self.how.tick("steps", 1)
                    if self._look_is_due() or self.step % LOG_EVERY == 0:
                        self._log()
            self.seconds = spent + time.monotonic() - started
            looked = self.looked == self.step
            overdue = time.monotonic() - saved >= SAVE_SECONDS
            if writes and (looked or overdue or self._look_is_due() or interrupts.came):
                self._save()
                saved = time.monotonic()
            interrupts.stop_if_asked()

    def _look_is_due(self) -> bool:
        """Whether the held-out pairs are to be scored before the next step."""
        here = self.step % self.hp.validate_every == 0 or self.step == self.hp.steps
        return here and self.step > self.looked and self.processes.rank == 0

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.hp, self.step) * group["scale"]
        first = self.first_phase
        for name, parameter in self.trained.items():
            in_lm = name.startswith("mllm.")
            parameter.requires_grad_(not in_lm or not self.frozen_prefix)
            if first and not in_lm and ".tokens." not in name:
                parameter.requires_grad_(False)
        batch = self._batch()
        total, (rank, world) = (
            self._n_labels([p for p, _ in batch]),
            (self.processes.rank, self.processes.world),
        )
        own = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]
        sums = {name: torch.zeros(()) for name in ("instruction", "edit", "align")}
        for start in range(0, len(own), self.hp.micro_batch):
            part = [
                self.sample(pair, number)
                for pair, number in own[start : start + self.hp.micro_batch]
            ]
            found, share = self.losses(part), len(part) / len(batch)
            losses = {
                "instruction": found.said / total,
                "edit": found.edit * share,
                "align": found.align * share,
            }
            self._total(losses).backward()
            for name, loss in losses.items():
                sums[name] += loss.detach().cpu()
        self._add_gradients()
        if self.hp.clip is not None:
            nn.utils.clip_grad_norm_(
                [p for p in self.trained.values() if p.grad is not None], self.hp.clip
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow()
        sums["total"] = self._total(sums)
        for name, value in {**sums, "steps": torch.ones(())}.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + value

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return (
            losses["instruction"]
            + self.hp.edit_weight * losses["edit"]
            + self.hp.align_weight * losses["align"]
        )

    def _add_gradients(self) -> None:
        if self.processes.world == 1:
            return
        for parameter in self.trained.values():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad = self.processes.add(parameter.grad)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the running mean of the denoiser."""
        if self.hp.ema and not self.first_phase:
            keep = min(self.hp.ema, (1 + self.step) / (_EMA_WARMUP + self.step))
            for name, mean in self.mean.items():
                mean.lerp_(self.trained[name], 1 - keep)

    def _log(self) -> None:
        steps = float(self._sums.pop("steps"))
        losses = {
            name: round(float(value) / steps, 5) for name, value in self._sums.items()
        }
        self._sums = {}
        if not math.isfinite(losses["total"]):
            raise MmeditError(
                f"the loss became {losses['total']} at step {self.step}",
                "lower learning_rate",
            )
        self.run.append(
            "log",
            [
                {
                    "step": self.step,
                    "rate": rate_at(self.hp, self.step - 1),
                    "losses": losses,
                }
            ],
        )

    @torch.no_grad()
    def _validate(self) -> None:
        """Write the losses on the held-out pairs: the same noise each time, nothing dropped."""
        said, count, edit, align = 0.0, 0, 0.0, 0.0
        for start in range(0, len(self.held_out), self.hp.micro_batch):
            part = self.held_out[start : start + self.hp.micro_batch]
            some = self.losses(
                [
                    self.sample(p, -1 - start - i, by_chance=False)
                    for i, p in enumerate(part)
                ]
            )
            said, count = said + float(some.said), count + some.count
            edit, align = (
                edit + float(some.edit) * len(part),
                align + float(some.align) * len(part),
            )
        n = max(1, len(self.held_out))
        found = {
            "instruction": said / max(1, count),
            "edit": edit / n,
            "align": align / n,
        }
        self.run.append(
            "log",
            [
                {
                    "step": self.step,
                    "held_out": {k: round(v, 5) for k, v in found.items()},
                }
            ],
        )
        told = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        self.how.say(f"step {self.step}/{self.hp.steps}  held out: {told}")
        self.looked = self.step

    # -- files --------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Write what was trained, the running mean in place of the denoiser if there is one."""
        tensors = {
            name: parameter.detach() for name, parameter in self.trained.items()
        } | self.mean
        hparams = {
            **asdict(self.hparams),
            "diffusion": _lasting(self.hparams.diffusion),
        }
        about = {
            "hparams": hparams,
            "model": _lasting(self.editor.model),
            "fingerprint": self.editor.fingerprint,
        }
        about["diffusion"] = content_of(self.hparams.diffusion)
        self.run.save_tensors("editor", tensors, {"mgie": json.dumps(about)})

    def _save(self) -> None:
        tensors = {
            f"trained.{name}": parameter.detach()
            for name, parameter in self.trained.items()
        }
        tensors |= {f"mean.{name}": value for name, value in self.mean.items()}
        tensors |= {f"sums.{name}": value for name, value in self._sums.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{key}": value for key, value in state.items()
            }
        metadata = {
            "step": str(self.step),
            "looked": str(self.looked),
            "seconds": str(self.seconds),
        }
        self.run.save_tensors("last", tensors, metadata)

    def _restore(self) -> None:
        """Continue from the last saved step; the log is cut back to it."""
        saved = self.run.load_tensors("last")
        if saved is not None:
            tensors, metadata = saved
            restore(self.trained, below(tensors, "trained."), str(self.run.folder))
            self.mean = {
                name: value.to(self.editor.device)
                for name, value in below(tensors, "mean.").items()
            }
            self._sums = dict(below(tensors, "sums."))
            state = self.optimizer.state_dict()
            state["state"] = {}
            for name, value in below(tensors, "optimizer.").items():
                index, _, key = name.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
            self.optimizer.load_state_dict(state)
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            self.looked = int(
                metadata.get("looked", metadata["step"])
            )  # older files were saved after the look
        if self.processes.rank == 0:
            self.run.rewrite(
                "log", [line for line in self.run.read("log") if self._is_past(line)]
            )

    def _is_past(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log belongs to what was saved."""
        return bool(line["step"] <= (self.looked if "held_out" in line else self.step))


def _key(pair: EditPair) -> str:
    """Return what stands for a pair among those of all files."""
    return f"{pair.uid}:{pair.digest}"


def _lasting(name: str) -> str:
    """Return the name of a model that still leads to it from another folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name
