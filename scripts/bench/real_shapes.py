"""Every command on models of real size: seconds and peak memory of opening, asking, editing, undoing, drawing.

    python scripts/bench/real_shapes.py blip2-opt-2.7b --out FOLDER                  # again: goes on
    python scripts/bench/real_shapes.py blip2-opt-2.7b --out FOLDER --steps open,ask,ft
    python scripts/bench/real_shapes.py --out FOLDER --docs docs/real-sizes.md       # the table of all that was run

Models have the shape of published ones and random weights (`random_weights.py`), so answers and pictures are nonsense,
and what they cost is not. Each step is a process of its own, killed if it takes more memory than its limit. A step
with the name of an editor opens the model, makes one edit, takes it back, and compares every weight with the file and
every logit with those before. Memory is anonymous (RssAnon): weights that lie in memory-mapped files are counted
beside it, as resident.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401 - once, for all copies of this process
from peak_memory import Peak, Spent, available_gib, in_a_copy
from random_weights import SHAPES, Shape
from torch import Tensor

from mmedit_cli import load_backbone, load_editor, registry
from mmedit_cli.app import main as mmedit
from mmedit_cli.runtime import versions
from mmedit_cli.types import Query

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "tests" / "data" / "shapes" / "solid" / "red-star.png"
QUESTION = "What is this?"
TARGET = "a lynx"
STEPS_OF = {
    "vlm": ("open", "ask", "train-editor", "edit", "undo", "ask after undo", "export"),
    "sd": ("generate", "generate --low-memory"),
    "ip2p": ("image-edit", "image-edit --low-memory"),
}
BEGIN = "<!-- written by scripts/bench/real_shapes.py -->"
END = "<!-- end of what it wrote -->"


class Steps:
    """The steps of one shape: each is a function that runs in a process of its own and returns an exit code."""

    def __init__(self, shape: Shape, args: argparse.Namespace) -> None:
        self.shape = shape
        self.model = args.out / "models" / shape.name
        self.work = args.out / shape.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = args.device
        self.dtype = args.dtype
        self.overrides: list[str] = args.set
        self.noted: Path = self.work / "noted.json"

    @property
    def names(self) -> tuple[str, ...]:
        """All steps, editors among them."""
        own = STEPS_OF[self.shape.kind]
        if self.shape.kind != "vlm":
            return own
        first, second, *rest = own
        return (first, second, *registry.editors.names(), *rest)

    def run(self, name: str) -> int:
        """Run one step here."""
        how = ("--device", self.device, "--dtype", self.dtype)
        model = ("--model", str(self.model), *how)
        records = ("--records", str(self.work / "records"))
        ledger = str(self.work / "ledger")
        about = ("--image", str(PICTURE))
        commands: dict[str, tuple[str, ...]] = {
            "ask": ("ask", *model, *about, QUESTION, "--max-new-tokens", "4"),
            "train-editor": self._training(model, records),
            "edit": (
                *("edit", "ft", *model, *about, "--prompt", QUESTION),
                *("--target", TARGET, "--into", ledger),
            ),
            "undo": ("edits", "undo", ledger, "all"),
            "ask after undo": (
                *("ask", "--edits", ledger, *about, QUESTION),
                *("--max-new-tokens", "4", "--device", self.device),
            ),
        }
        if name == "open":
            return self._open()
        if name == "export":
            return self._export(ledger)
        if name in commands:
            return mmedit(list(commands[name]))
        if name.startswith(("generate", "image-edit")):
            return self._draw(name, model, records)
        return self._edit_and_undo(name)

    def _training(
        self, model: tuple[str, ...], records: tuple[str, ...]
    ) -> tuple[str, ...]:
        data = str(ROOT / "tests" / "data" / "shapes")
        once = ("--set", "training.steps=1", "--set", "training.batch_size=1")
        return (
            *("train-editor", "liveedit", *model, *records, "--data", data),
            *("--limit", "3", "--batch-size", "1", *once, "--force"),
        )

    def _export(self, ledger: str) -> int:
        again = mmedit(["edits", "redo", ledger, "all"])
        target = self.work / "exported"
        code = again or mmedit(["edits", "export", ledger, "--to", str(target)])
        shutil.rmtree(target, ignore_errors=True)
        return code

    def _draw(self, name: str, model: tuple[str, ...], records: tuple[str, ...]) -> int:
        command, *more = name.split()
        target = str(self.work / f"{name}.png")
        few = ("--steps", "2", "--force", *more)
        if command == "generate":
            return mmedit(["generate", "a red star", *model, "-o", target, *few])
        words = ("image-edit", "instruct-pix2pix", "make it blue", "-i", str(PICTURE))
        return mmedit([*words, *model, *records, "-o", target, *few])

    # -- through the library ------------------------------------------------------------------------------------

    def _opened(self) -> Any:
        return load_backbone(str(self.model), device=self.device, dtype=self.dtype)

    def _open(self) -> int:
        with Peak() as peak:
            backbone = self._opened()
        weights = sum(
            parameter.numel() * parameter.element_size()
            for parameter in backbone.model.parameters()
        )
        gib = weights / 2**30
        ratio = peak.anonymous / gib
        self._note(f"{gib:.2f} GiB of weights; anonymous memory {ratio:.2f} of them")
        return 0

    def _edit_and_undo(self, name: str) -> int:
        backbone = self._opened()
        trains = registry.editors.get(name).trains
        editor = load_editor(
            name,
            backbone,
            checkpoint="untrained" if trains else None,
            overrides=self.overrides,
        )
        request = Query(QUESTION, TARGET, PICTURE)

        layer = editor.first_layer
        frozen = None

        @torch.no_grad()
        def logits() -> Tensor:
            nonlocal frozen
            if layer is None:
                return backbone.logits(backbone.batch([request]))
            # no editor changes what lies below
            frozen = frozen or backbone.prefix(backbone.batch([request]), layer)
            return backbone.resume(frozen)

        clock = time.process_time if self.device == "cpu" else time.monotonic
        # as in an evaluation, the picture is encoded once
        with backbone.cached_activations(None, [request], group=1, budget=1 << 30):
            before = logits()
            start = clock()
            handle = editor.edit([request])
            seconds = clock() - start
            after = logits()
            editor.undo(handle.ids)
            again = logits()
        moved = after.shape != before.shape or not torch.equal(after, before)
        same = torch.equal(again, before) and self._as_on_disk(backbone.model)
        self._note(
            f"edit {seconds:.0f} s; "
            f"logits {'moved' if moved else 'as before'}; "
            f"undone {'bit for bit' if same else 'NOT TO THE BIT'}"
            + ("; untrained networks" if trains else "")
            + "".join(f"; {change}" for change in self.overrides)
        )
        return 0 if same else 1

    def _as_on_disk(self, model: Any) -> bool:
        """Whether every weight of a model is what its files say, to the bit."""
        from safetensors import safe_open

        mine = model.state_dict()
        for path in sorted(self.model.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    written = file.get_tensor(key).to(mine[key].dtype)
                    if not torch.equal(mine[key].cpu(), written):
                        print(f"{key} is not what it was")
                        return False
        return True

    def _note(self, text: str) -> None:
        self.noted.write_text(json.dumps(text))


def measure(shape: Shape, args: argparse.Namespace) -> None:
    """Run the steps that were not run, and write a line for each."""
    steps = Steps(shape, args)
    if not steps.model.is_dir():
        print(f"building {shape.name}", flush=True)
        shape.build(steps.model)
    results = args.out / "steps.jsonl"
    wanted = args.steps.split(",") if args.steps else steps.names
    done = {key(line) for line in read(results)}
    for name in wanted:
        line = {
            "shape": shape.name,
            "step": name,
            "device": described(args.device),
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
        }
        if key(line) in done:
            continue
        while available_gib() < args.need_gib:
            time.sleep(5)
        steps.noted.unlink(missing_ok=True)
        log = steps.work / f"{name}.log"
        spent = in_a_copy(bound(steps, name), log, shape.largest_gib)
        line |= vars(spent)
        line["note"] = note(steps, spent, shape)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{shape.name} {name}: {spent} {line['note']}", flush=True)


def bound(steps: Steps, name: str) -> Callable[[], int]:
    """Return the step as a function."""
    return lambda: steps.run(name)


def note(steps: Steps, spent: Spent, shape: Shape) -> str:
    """Return what a step said of itself, or how it ended."""
    text = ""
    if steps.noted.is_file():
        text = json.loads(steps.noted.read_text())
    if spent.code == -9:
        return f"killed: above {shape.largest_gib:g} GiB, or the machine was full"
    if spent.code not in (0, 1):
        return f"exit code {spent.code}"
    return text


def key(line: dict[str, Any]) -> tuple[str, ...]:
    """Return what a step is known by."""
    return tuple(line[part] for part in ("shape", "step", "device", "dtype"))


def read(results: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of what was measured."""
    if results.is_file():
        for text in results.read_text().splitlines():
            yield json.loads(text)


def described(device: str) -> str:
    """Return what a table calls a device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return f"{value.strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def seconds(line: dict[str, Any]) -> float:
    """Return what a step took: of the processor where that did the work, so that other programs do not count."""
    found: float = line["seconds"]
    if "cores" in line["device"]:
        found = line["processor_seconds"]
    return found


def table(results: Path) -> str:
    """Return what was measured, in Markdown."""
    rows = [
        "| shape | step | format | seconds | anonymous GiB | with mapped files | |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    machines = set()
    for line in read(results):
        found = line["versions"]
        libraries = ", ".join(f"{name} {found[name]}" for name in found)
        machines.add(
            f"{line['date']}, {line['device']}, {line['threads']} thread(s); {libraries}."
        )
        rows.append(
            f"| {line['shape']} | {line['step']} | {line['dtype']} | {seconds(line):.0f} "
            f"| {line['anonymous']:.2f} | {line['resident']:.2f} | {line['note']} |"
        )
    return "\n".join([*sorted(machines), "", *rows])


def write_docs(results: Path, page: Path) -> None:
    """Put the table between its two marks on a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def main() -> None:
    """Measure one shape, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", help="some of the steps, separated by commas")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a hyper-parameter of the editors among the steps; repeatable",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--need-gib", type=float, default=4.0, help="wait until so much is available"
    )
    parser.add_argument("--docs", type=Path, help="the page with the table")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.shape:
        measure(SHAPES[args.shape], args)
    results = args.out / "steps.jsonl"
    if args.docs:
        write_docs(results, args.docs)
    else:
        print(table(results))


if __name__ == "__main__":
    main()
