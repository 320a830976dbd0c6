"""What a sampler of diffusers can do, tried before the first picture is drawn."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from mmedit_cli.errors import DataError, ModelError
from mmedit_cli.model_folder import reason

_PREDICTIONS = ("epsilon", "v_prediction")


def check_scheduler(scheduler: Any, name: str) -> None:
    """Raise ModelError unless a scheduler adds and removes noise as Stable Diffusion was trained with.

    One for flow matching has other noise levels, and the denoiser would predict something else.
    """
    kind = type(scheduler).__name__
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in _PREDICTIONS:
        raise ModelError(
            f"{name}: its scheduler {kind} (prediction_type {prediction}) is not one for Stable Diffusion",
            "put the scheduler_config.json of the original model there, e.g. of a DDIMScheduler",
        )


def check_flow_scheduler(scheduler: Any, name: str) -> None:
    """Raise ModelError unless a scheduler follows a flow, as Stable Diffusion 3.x and FLUX were trained."""
    kind = type(scheduler).__name__
    if not kind.startswith("FlowMatch"):
        raise ModelError(
            f"{name}: its scheduler {kind} is not one for flow matching",
            "put the scheduler_config.json of the original model there, e.g. of a FlowMatchEulerDiscreteScheduler",
        )


def check_steps(scheduler: Any, steps: int) -> None:
    """Raise DataError unless a scheduler can make so many steps: they are all made, on latents of a few numbers.

    Global randomness is left as it was.
    """
    kind = type(scheduler).__name__
    most = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= most:
        raise DataError(
            f"--steps {steps}: {kind} was made for 1 to {most}", "50 are usual"
        )
    tried = copy.deepcopy(scheduler)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            latents = _make_all(tried, steps)
    except Exception as error:  # each scheduler fails in its own way
        problem = (
            f"--steps {steps}: {kind} cannot make so many or so few: {reason(error)}"
        )
        raise DataError(problem, "try --steps 50, or another scheduler") from error
    if not torch.isfinite(latents).all():
        raise DataError(
            f"--steps {steps}: {kind} gives what is not a number", "try --steps 50"
        )


def _make_all(scheduler: Any, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    latents: torch.Tensor = torch.ones(1, 4, 8, 8) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    random = {"generator": torch.Generator()} if "generator" in known else {}
    for step in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, step)
        latents, *_ = scheduler.step(
            torch.zeros_like(seen),
            step,
            latents,
            **random,
            return_dict=False,
        )
    return latents
