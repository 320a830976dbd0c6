"""The machine: device, number format, seeds, memory, and a snapshot of the environment. `cuda` lives here alone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedit_cli import __version__
from mmedit_cli.errors import UserError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "pillow",
    "numpy",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a pipeline is loaded; the option classes of drawing inherit these fields, those of pictures have one.

    `device` is auto, cpu, cuda, cuda:N or mps; `dtype` auto, float32, bfloat16 or float16; `revision` a branch, tag or
    commit of the hub.
    """

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; raise UserError when it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name}: not a device", "use auto, cpu, cuda, cuda:N or mps"
        ) from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available()
        and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise UserError(
            f"--device {name}: not available on this machine", "try --device auto"
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return the number format; `auto` is float32 on a CPU and the checkpoint's own elsewhere."""
    import torch

    if name not in DTYPES:
        raise UserError(
            f"--dtype {name}: not a number format", f"use one of {', '.join(DTYPES)}"
        )
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Interrupts:
    """Control-C is held back inside the `with` block, which looks at `came` where it can stop without losing work.

    `say` is told of it. A second control-C does not wait, nor does the first one inside `at_once`. Both are exceptions
    in the main thread alone, so elsewhere nothing changes, nor where the process ignores control-C.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.came = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop at once inside this block: there is nothing to lose in it."""
        self.stop_if_asked()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def stop_if_asked(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there is one."""
        if self.came:
            raise KeyboardInterrupt

    def _take(self, *_: object) -> None:
        if self.came or self._at_once:
            raise KeyboardInterrupt
        self.came = True
        self.say(
            "interrupted: this step is finished and saved first; control-C again stops at once"
        )


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a seeded source of randomness: it is passed on, never global."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True)
class Processes:
    """The processes that work together: this one is `rank` of `world`, on `device`.

    `add` sums a tensor over all of them; `wait` returns when all have come to it.
    """

    rank: int = 0
    world: int = 1
    device: str = "auto"
    add: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """Return what each process gives, in the order of their ranks; every process gets all of it."""
        import torch

        if self.world == 1:
            return [data]
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(data)
        lengths = self.add(sizes).tolist()
        rows = torch.zeros(
            self.world,
            max(lengths),
            dtype=torch.uint8,
            device=self.device,
        )
        own = torch.tensor(list(data), dtype=torch.uint8)
        rows[self.rank, : len(data)] = own.to(self.device)
        gathered = self.add(rows).cpu().numpy()
        parts = []
        for row, length in zip(gathered, lengths, strict=True):
            parts.append(row[:length].tobytes())
        return parts


def process_count() -> int:
    """Return how many processes `accelerate launch` or `torchrun` has started together, 1 without them."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or not 0 < int(text[:9]) < 10**6:
        problem = f"WORLD_SIZE={text[:40]}: not a number of processes"
        raise UserError(problem, "unset it, or start with accelerate launch")
    return int(text)


def is_first_process() -> bool:
    """Whether this process is the first of those that were started together: the others print no result."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def join_processes(device: str) -> Processes:
    """Meet the other processes that were started together, if there are any."""
    if process_count() == 1:
        return Processes(device=device)
    from accelerate import Accelerator

    group = Accelerator(cpu=device == "cpu")
    return Processes(
        group.process_index,
        group.num_processes,
        str(group.device),
        lambda tensor: group.reduce(tensor, "sum"),
        group.wait_for_everyone,
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued, so that a clock tells the truth."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory in bytes: `process` (resident; not on Windows) and, on a GPU, `device` (allocated)."""
    import torch

    peak: dict[str, int] = {}
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def sleep_while_waiting() -> None:
    """Let threads that wait for others sleep, unless the user says otherwise; it counts before torch is imported.

    Beside other work they would spin while one of them is set aside by the system (docs/several-processes.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_libraries() -> None:
    """Turn off the progress bars and advice of transformers: the program speaks for itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def versions() -> dict[str, str]:
    """Return the versions that may change a number, read without importing the packages."""
    found = {"mmedit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return what else a reader of a report wants to know: platform, device, commit."""
    import torch

    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def machine() -> dict[str, Any]:
    """Return what a report of a bug needs: versions, platform, threads, devices, and which variables are set."""
    import torch

    devices = [f"cpu: {platform.processor() or platform.machine()}"]
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        size = torch.cuda.get_device_properties(index).total_memory >> 30
        devices.append(f"cuda:{index}: {name}, {size} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    ours = ("MMEDIT_", "HF_", "CUDA_", "OMP_", "TRANSFORMERS_")
    variables = sorted(name for name in os.environ if name.startswith(ours))
    return {
        "versions": versions(),
        "commit": _commit(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "variables that are set": variables,
    }


def _commit() -> str | None:
    """Return the commit of the checkout the package runs from, with `+` when it has changes; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", *words), cwd=root, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
