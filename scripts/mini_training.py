"""How a mini model is trained, whatever it is: recipe, stages, steps, the log, and files to be continued from.

A run is a recipe (a YAML file) and a `Trainee`; stages are trained one after another, each with batches that depend on
the seed, the stage and the step alone. So a run that was stopped ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import yaml
from mini_vlm_data import number
from safetensors import safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn

from mmedit_cli.errors import UserError
from mmedit_cli.storage import write_atomic

LOG_SECONDS, SAVE_SECONDS = 20, 180
BETAS, CLIP = (0.9, 0.95), 1.0


# -- what is trained --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long a stage is trained and how fast: `passes` over its pictures in batches of `pictures`.

    `rate` is the peak of the learning rate (linear warm-up over the first `warmup` of the steps, then a cosine to
    zero).
    """

    passes: int
    pictures: int
    rate: float
    decay: float
    warmup: float = 0.03


@dataclass(frozen=True)
class BaseRecipe:
    """What the recipes of all mini models have; `stages` are trained in their order in STAGES.

    A recipe may lack those in OPTIONAL.
    """

    STAGES: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    STAGE: ClassVar[type[Schedule]] = Schedule

    name: str
    seed: int
    data: dict[str, Any]
    stages: dict[str, Any]

    @property
    def shape(self) -> dict[str, Any]:
        """Return what must not change when a run is continued; schedules may."""
        return {key: value for key, value in asdict(self).items() if key != "stages"}

    @classmethod
    def read(cls, path: Path, *, quick: bool = False) -> Self:
        """Return the recipe in a YAML file, with its `quick` section put over it if asked; raise UserError."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            changes = values.pop("quick", {})
            values |= changes if quick else {}
            given = values["stages"]
            wanted = [s for s in cls.STAGES if s in given or s not in cls.OPTIONAL]
            stages = {name: cls.STAGE(**given[name]) for name in wanted}
            return cls(**{**values, "stages": stages})
        except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a recipe ({type(error).__name__}: {error})"
            ) from error


class BaseTrainee(nn.Module):
    """A model, what helps to train it and is not shipped, and its data, all on one device.

    `columns` names the running accuracies of the log.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: Any, device: torch.device) -> None:
        super().__init__()
        self.recipe, self.device = recipe, device

    def usable(self, stage: str) -> Tensor:
        """Return the indices of the pictures a stage is trained on, a pass showing each of them once: (n,)."""
        raise NotImplementedError

    def select(self, stage: str) -> dict[str, nn.Parameter]:
        """Let exactly the parameters of a stage be trained and return them by name."""
        raise NotImplementedError

    def loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch of pictures (B,), and (2, columns) right and asked."""
        raise NotImplementedError

    def stepped(self, stage: str, step: int) -> None:
        """Do what is to be done after each step, counted from 0."""


AVERAGE = (
    0.999  # how much of a running mean of weights each step keeps, once there are many
)


@torch.no_grad()
def follow(mean: nn.ModuleDict, trainee: nn.Module, step: int) -> None:
    """Let the running means of some parts of a trainee follow them after a step, counted from 0."""
    keep = min(AVERAGE, (1 + step) / (10 + step))
    for name, part in mean.items():
        torch._foreach_lerp_(
            list(part.parameters()), list(getattr(trainee, name).parameters()), 1 - keep
        )


# -- steps ------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a stage is, and what it cost so far."""

    stage: str
    step: int = 0
    seconds: float = 0.0
    origin: str = ""  # whose tower this one started from
    last: dict[str, Any] = field(default_factory=dict)  # the last line of its log


def rate_at(step: int, steps: int, stage: Schedule) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warm = max(1, round(stage.warmup * steps))
    if step < warm:
        return stage.rate * (step + 1) / warm
    return (
        stage.rate
        * 0.5
        * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


def steps_of(trainee: BaseTrainee, name: str) -> tuple[int, int]:
    """Return (steps a pass, steps in all)."""
    stage = trainee.recipe.stages[name]
    each = max(1, len(trainee.usable(name)) // stage.pictures)
    return each, each * int(stage.passes)


def batches(
    trainee: BaseTrainee, name: str, first: int
) -> Iterator[tuple[int, Tensor, Generator]]:
    """Yield (step, pictures, randomness) from step `first` on: each depends on the seed, the stage and the step."""
    stage, seed, device = (
        trainee.recipe.stages[name],
        trainee.recipe.seed,
        trainee.device,
    )
    each, steps = steps_of(trainee, name)
    usable, order = trainee.usable(name), None
    for step in range(first, steps):
        turn, place = divmod(step, each)
        if order is None or place == 0:
            generator = Generator(device).manual_seed(number(seed, name, "pass", turn))
            order = usable[
                torch.randperm(len(usable), generator=generator, device=device)
            ]
        generator = Generator(device).manual_seed(number(seed, name, "step", step))
        yield (
            step,
            order[place * stage.pictures : (place + 1) * stage.pictures],
            generator,
        )


def train_stage(
    trainee: BaseTrainee,
    name: str,
    out: Path,
    stop: Callable[[], bool],
    say: Callable[[dict[str, Any]], None],
) -> bool:
    """Train one stage from where its file in `out` left it; return whether it came to its end."""
    stage = trainee.recipe.stages[name]
    parameters = trainee.select(name)
    optimizer = _optimizer(parameters, stage)
    progress = load(trainee, parameters, optimizer, name, out)
    _, steps = steps_of(trainee, name)
    meter, saved = _Meter(stage, steps, progress, trainee.columns), time.monotonic()
    for step, chosen, generator in batches(trainee, name, progress.step):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, stage)
        with torch.autocast(
            trainee.device.type, torch.bfloat16, enabled=trainee.device.type == "cuda"
        ):
            loss, counts = trainee.loss(name, chosen, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        trainee.stepped(name, step)
        meter.add(step, loss.detach(), counts)
        halt = stop()
        if halt or step + 1 == steps or meter.due:
            progress.last = meter.line(optimizer.param_groups[0]["lr"])
            say(progress.last)
        if halt or step + 1 == steps or time.monotonic() - saved > SAVE_SECONDS:
            store(trainee, parameters, optimizer, progress, out)
            saved = time.monotonic()
        if halt:
            return step + 1 == steps
    return True


def _optimizer(
    parameters: dict[str, nn.Parameter], stage: Schedule
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors and embeddings of positions and classes do not."""
    matrices = [p for p in parameters.values() if p.dim() == 2 or p.dim() == 4]
    others = [p for p in parameters.values() if p.dim() not in (2, 4)]
    groups = [
        {"params": matrices, "weight_decay": stage.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.rate, betas=BETAS, foreach=True)


class _Meter:
    """Running loss and accuracies since the last line, the speed, and the time left; keeps `progress` up to date."""

    def __init__(
        self, stage: Schedule, steps: int, progress: Progress, columns: tuple[str, ...]
    ) -> None:
        self._stage, self._steps, self.progress, self._columns = (
            stage,
            steps,
            progress,
            columns,
        )
        self._before, self._started, self._first = (
            progress.seconds,
            time.monotonic(),
            progress.step,
        )
        self._reset()

    def _reset(self) -> None:
        self._since, self._sums, self._from = time.monotonic(), [], self.progress.step

    def add(self, step: int, loss: Tensor, counts: Tensor) -> None:
        self._sums.append(torch.cat((loss.view(1).float(), counts.flatten())))
        self.progress.step = step + 1
        self.progress.seconds = self._before + time.monotonic() - self._started

    @property
    def due(self) -> bool:
        return time.monotonic() - self._since > LOG_SECONDS

    def line(self, rate: float) -> dict[str, Any]:
        """Return one line of the log and begin anew."""
        done, took = (
            self.progress.step - self._from,
            max(time.monotonic() - self._since, 1e-9),
        )
        values = torch.stack(self._sums).cpu()
        right, asked = values[:, 1:].sum(0).view(2, len(self._columns)).tolist()
        line = {
            "stage": self.progress.stage,
            "step": self.progress.step,
            "steps": self._steps,
            "loss": round(values[:, 0].mean().item(), 4),
            "accuracy": {
                c: round(r / a, 4)
                for c, r, a in zip(self._columns, right, asked, strict=True)
                if a
            },
            "rate": rate,
            "pictures_per_second": round(done * self._stage.pictures / took, 1),
            "seconds": round(self.progress.seconds, 1),
            "seconds_left": round(
                (self._steps - self.progress.step) * took / max(done, 1)
            ),
        }
        self._reset()
        return line


# -- files ------------------------------------------------------------------------------------------------------


def store(
    trainee: BaseTrainee,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    out: Path,
) -> None:
    """Write `<stage>.safetensors` atomically: all weights, the optimizer's moments, and where the stage is."""
    tensors = {name: p.detach() for name, p in trainee.named_parameters()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    metadata = {
        "progress": json.dumps(vars(progress)),
        "shape": json.dumps(trainee.recipe.shape, sort_keys=True),
    }
    data = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata
    )
    write_atomic(out / f"{progress.stage}.safetensors", data)


def read_progress(out: Path, name: str) -> Progress | None:
    """Return where a stage stopped, or None if it never began."""
    path = out / f"{name}.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return Progress(**json.loads(file.metadata()["progress"]))


def load(
    trainee: BaseTrainee,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    name: str,
    out: Path,
) -> Progress:
    """Put back the state of a stage; one that never began starts from the weights of the stage before it."""
    order = trainee.recipe.STAGES
    earlier = [
        s
        for s in reversed(order[: order.index(name)])
        if (out / f"{s}.safetensors").exists()
    ]
    source = (
        name
        if (out / f"{name}.safetensors").exists()
        else earlier[0]
        if earlier
        else None
    )
    if source is None:
        return Progress(name)
    path = out / f"{source}.safetensors"
    with safe_open(path, "pt", device=str(trainee.device)) as file:
        if json.loads(file.metadata()["shape"]) != json.loads(
            json.dumps(trainee.recipe.shape)
        ):
            raise UserError(
                f"{path}: from another recipe",
                "choose another --out, or start anew with --no-resume",
            )
        known = set(file.keys())
        with torch.no_grad():
            for key, parameter in trainee.named_parameters():
                if key in known:
                    parameter.copy_(file.get_tensor(key))
        if source != name:
            return Progress(name)
        for key, parameter in parameters.items():
            if optimizer is not None and f"optimizer/step/{key}" in known:
                parts = ("step", "exp_avg", "exp_avg_sq")
                state = {
                    part: file.get_tensor(f"optimizer/{part}/{key}") for part in parts
                }
                optimizer.state[parameter] = state | {
                    "step": state["step"].cpu()
                }  # AdamW counts on the CPU
        return Progress(**json.loads(file.metadata()["progress"]))


@contextmanager
def replacing_folder(folder: Path, records: dict[str, Any]) -> Iterator[Path]:
    """Yield a new folder to write a model into; then add `records`, JSON files by name, and replace the old one."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for name, record in records.items():
        (fresh / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for file in fresh.rglob("*.*"):
        file.chmod(0o644)  # safetensors makes its files private
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
