"""Where the runs of a sweep are made: in this process, by Ray, or by Slurm through submitit."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedit_cli.errors import UserError

# what is sent to a worker: plain values
Payload = Mapping[str, Any]
Work = Callable[[Payload], str]
POLL_SECONDS = 0.5
# what `work` says begins with it where the input is wrong, which no retry mends
LASTING = "!"


@dataclass(frozen=True)
class Resources:
    """What a run needs, and how many run at once; `minutes` and `partition` are Slurm's."""

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    minutes: int = 240
    partition: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("workers", "cpus", "minutes"):
            value = getattr(self, name)
            if value < 1:
                problems.append(f"--{name} {value}: must be at least 1")
        if not 0 <= self.gpus < 1000:
            problems.append(f"--gpus {self.gpus}: not a number of GPUs")
        if problems:
            raise UserError(problems)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `problem` is empty if it is finished; `lasting` if it would fail again in the same way."""

    index: int
    problem: str = ""
    lasting: bool = False


class Engine(ABC):
    """Makes runs, each by `work(payload)`, which returns an empty text or what went wrong."""

    name: str

    @abstractmethod
    def run(self, work: Work, payloads: Sequence[Payload]) -> Iterator[Outcome]:
        """Yield how each run ended, as they end; a worker that dies is such an end."""


class InThisProcess(Engine):
    """One run after another, here."""

    name = "this process"

    def run(self, work: Work, payloads: Sequence[Payload]) -> Iterator[Outcome]:
        """Yield how each run ended, in their order."""
        for index, payload in enumerate(payloads):
            yield outcome(index, work(payload))


class OnRay(Engine):
    """On a cluster of Ray: that of RAY_ADDRESS, else one on this machine for as long as the sweep takes.

    Ray itself starts nothing again: what a worker that died leaves is a failure, and the sweep makes the run again.
    """

    name = "ray"

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.ray = _imported("ray", "ray")

    def run(self, work: Work, payloads: Sequence[Payload]) -> Iterator[Outcome]:
        """Yield how each run ended, as they end."""
        ray = self.ray
        needs = self.resources
        with _cluster(ray, needs):
            remote = ray.remote(
                num_cpus=needs.cpus,
                num_gpus=needs.gpus,
                max_retries=0,
            )(work)
            waiting = list(enumerate(payloads))
            running: dict[Any, int] = {}
            while waiting or running:
                while waiting and len(running) < needs.workers:
                    index, payload = waiting.pop(0)
                    reference = remote.remote(payload)
                    running[reference] = index
                references = list(running)
                ended, _ = ray.wait(
                    references,
                    timeout=POLL_SECONDS,
                )
                for reference in ended:
                    index = running.pop(reference)
                    yield self._outcome(index, reference)

    def _outcome(self, index: int, reference: Any) -> Outcome:
        ray = self.ray
        try:
            said = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = _first_line(error)
            problem = f"the worker ended: {reason}"
            return Outcome(index, problem)
        return outcome(index, said)


class OnSlurm(Engine):
    """As jobs of Slurm, through submitit, whose files lie in `folder`; `cluster` may be another one of submitit."""

    name = "slurm"

    def __init__(
        self, resources: Resources, folder: Path, cluster: str = "slurm"
    ) -> None:
        submitit = _imported("submitit", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        except RuntimeError as error:
            raise UserError(
                f"--on slurm: {error}", "run it where sbatch and srun are"
            ) from error
        settings: dict[str, Any] = {
            "timeout_min": resources.minutes,
            "cpus_per_task": resources.cpus,
            "name": "mmedit-sweep",
        }
        if resources.gpus:
            settings["gpus_per_node"] = round(resources.gpus)
        if cluster == "slurm":
            settings["slurm_array_parallelism"] = resources.workers
            if resources.partition is not None:
                settings["slurm_partition"] = resources.partition
        self.executor.update_parameters(**settings)

    def run(self, work: Work, payloads: Sequence[Payload]) -> Iterator[Outcome]:
        """Yield how each run ended, as they end."""
        jobs = self.executor.map_array(work, list(payloads))
        running = dict(enumerate(jobs))
        while running:
            ended = []
            for index, job in running.items():
                if job.done():
                    ended.append(index)
            for index in ended:
                job = running.pop(index)
                yield self._outcome(index, job)
            if not ended:
                time.sleep(POLL_SECONDS)

    def _outcome(self, index: int, job: Any) -> Outcome:
        error = job.exception()
        if error is None:
            said = job.result()
            return outcome(index, said)
        reason = _first_line(error)
        problem = f"job {job.job_id} ended: {reason}"
        return Outcome(index, problem)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    first, _, _ = text.partition("\n")
    return first


def outcome(index: int, said: str) -> Outcome:
    """Return the outcome of what `work` said."""
    return Outcome(index, said.removeprefix(LASTING), said.startswith(LASTING))


def engine_of(name: str, resources: Resources, folder: Path) -> Engine:
    """Return the engine of that name; raise UserError for another one, or if its package is not installed."""
    if name == "local":
        return InThisProcess()
    if name == "ray":
        return OnRay(resources)
    if name == "slurm":
        return OnSlurm(resources, folder / "slurm")
    raise UserError(f"--on {name}: unknown", "use local, ray or slurm")


def _imported(package: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"--on {extra}: {package} is not installed",
            f"pip install 'mmedit-cli[{extra}]'",
        ) from error


@contextmanager
def _cluster(ray: Any, resources: Resources) -> Iterator[None]:
    """Inside the block there is a cluster; one that is started for it ends with it."""
    if ray.is_initialized():
        yield
        return
    # what RAY_ADDRESS names has processors of its own
    own = "RAY_ADDRESS" not in os.environ
    size = {"num_cpus": resources.workers * resources.cpus} if own else {}
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        **size,
    )
    try:
        yield
    finally:
        ray.shutdown()
