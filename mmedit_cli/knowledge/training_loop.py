"""Training the networks of an editor: steps, held-out cases, and files to continue from."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmedit_cli import runtime
from mmedit_cli.errors import DataError, MmeditError
from mmedit_cli.knowledge.evaluation.answers import Answer, ask
from mmedit_cli.knowledge.evaluation.protocol import PREPARING, score_case
from mmedit_cli.knowledge.methods.base import TrainedEditor
from mmedit_cli.records import Run
from mmedit_cli.runtime import Processes
from mmedit_cli.types import EditCase, Query

LOG_EVERY, SAVE_SECONDS = 20, 60.0
SCORE = "tf_em"  # of held-out cases; the checkpoint with the best mean over the columns is kept
_STEPS = "steps"  # among the sums since the last line of the log: how many there were


@dataclass(frozen=True)
class Conditions:
    """What a training takes place in; nothing of it but the number of processes changes the result.

    batch_size: queries in one frozen forward pass; cache_bytes: memory for what is frozen, the rest goes to disk;
    tick(what, n), say(text) and curve(name, value, step) are told how it goes.
    """

    processes: Processes = field(default_factory=Processes)
    batch_size: int = 32
    cache_bytes: int = 4 << 30
    tick: Callable[[str, int], None] = lambda _what, _n: None
    say: Callable[[str], None] = lambda _text: None
    curve: Callable[[str, float, int], None] = lambda _name, _value, _step: None


@dataclass
class _Progress:
    """Where a training is: the next step, the best score so far and when it was reached, seconds spent.

    `looked` is the last step after which the held-out cases were scored.
    """

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    looked: int = 0


def train_networks(
    editor: TrainedEditor,
    cases: Sequence[EditCase],
    held_out: Sequence[EditCase],
    run: Run,
    how: Conditions | None = None,
) -> dict[str, Any]:
    """Train from where `run` left it; the best networks are in `editor.safetensors` and in the editor at the end.

    What lies below the first layer that an edit changes is computed once for each distinct question and answer, and
    kept. Batches, random choices and scores depend on the seed and the step
    alone, so a training that was interrupted ends with the same bits. Returns what a report tells about the training.
    Raises DataError for cases that cannot be learned from.
    """
    hp, how = editor.hparams.training, how or Conditions()
    if len(cases) < 2:
        raise DataError(
            "one case is too few: networks learn by comparing edits",
            "train on more cases",
        )
    taught = with_alternatives(cases, hp, editor.seed)
    shown = [*(case for variants in taught for case in variants), *held_out]
    everything = [q for case in shown for _, qs in case.columns() for q in qs]
    activations = editor.backbone.cached_activations(
        editor.first_layer,
        everything,
        group=how.batch_size,
        budget=how.cache_bytes,
        tick=lambda n: how.tick(PREPARING, n),
    )
    with activations:
        if found := editor.gather(cases):
            how.say(found)
        training = _EditorTraining(editor, taught, held_out, run, how)
        how.tick("steps", training.progress.step)
        training.go_on()
        chosen = training.calibrate() if how.processes.rank == 0 else {}
    if how.processes.rank:
        return {}
    editor.load_networks(run.folder / "editor.safetensors")
    log = run.read("log")
    for line in log:
        for name, value in {**line.get("losses", {}), **line.get("scores", {})}.items():
            how.curve(name, value, line["step"])
    return {
        "steps": hp.steps,
        "calibrated": chosen,
        "validation_cases": len(training.held_out),
        "validation_edits": max(
            len(training.held_out), getattr(hp, "validation_edits", 0)
        ),
        "best": next(
            line
            for line in log
            if "score" in line and line["step"] == training.progress.best_step
        ),
        "curve": [line for line in log if "score" in line],
        "losses": [line for line in log if "losses" in line],
        "trained_parameters": sum(p.numel() for p in editor.networks.parameters()),
        "cost": {"seconds": training.progress.seconds},
    }


class _EditorTraining:
    """The state of one training."""

    def __init__(
        self,
        editor: TrainedEditor,
        cases: Sequence[Sequence[EditCase]],
        held_out: Sequence[EditCase],
        run: Run,
        how: Conditions,
    ) -> None:
        self.editor, self.cases, self.run, self.how, self.processes = (
            editor,
            cases,
            run,
            how,
            how.processes,
        )
        self.hp, self.batch_size = editor.hparams.training, how.batch_size
        self.held_out = distinct(held_out)[: self.hp.validation_cases]
        self.parameters = dict(editor.networks.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.hp.learning_rate,
            weight_decay=self.hp.weight_decay,
        )
        self.progress = _Progress()
        self._sums: dict[str, Tensor] = {}
        self._base: dict[Query, Answer] | None = None
        self._restore()

    def go_on(self) -> None:
        """Take the steps that are left; control-C ends them with the step that is being taken, and nothing is lost."""
        with runtime.Interrupts(self.how.say) as interrupts:
            self._go_on(interrupts)

    def _go_on(self, interrupts: runtime.Interrupts) -> None:
        progress, writes = self.progress, self.processes.rank == 0
        first, spent, started = progress.step, progress.seconds, time.monotonic()
        saved = started
        while progress.step < self.hp.steps or self._look_is_due():
            if writes and self._look_is_due():
                with (
                    interrupts.at_once()
                ):  # what it is about is saved, and it may take minutes
                    scores = self._validate()
                seconds = time.monotonic() - started
                rate = seconds / max(1, progress.step - first)
                self.how.say(self._line(scores, rate * (self.hp.steps - progress.step)))
            else:
                self._step(progress.step)
                progress.step += 1
                seconds = time.monotonic() - started
                if writes:
                    self.how.tick("steps", 1)
                    if self._look_is_due() or progress.step % LOG_EVERY == 0:
                        self._log()
            progress.seconds = spent + seconds
            looked = progress.looked == progress.step
            overdue = time.monotonic() - saved >= SAVE_SECONDS
            if writes and (looked or overdue or self._look_is_due() or interrupts.came):
                self._save()
                saved = time.monotonic()
            interrupts.stop_if_asked()

    def _look_is_due(self) -> bool:
        """Whether the held-out cases are to be scored before the next step."""
        step = self.progress.step
        here = step % self.hp.validate_every == 0 or step == self.hp.steps
        return here and step > self.progress.looked and self.processes.rank == 0

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.hp, step)
        source = runtime.generator(self.editor.seed * 1_000_003 + step)
        self.editor.networks.requires_grad_(True)
        try:
            with torch.enable_grad():
                batch = self._batch(step)
                losses = self.editor.losses(
                    batch,
                    source,
                    others=self._others(batch, step),
                    rank=self.processes.rank,
                    world=self.processes.world,
                )
                self.optimizer.zero_grad()
                losses["total"].backward()
        finally:
            self.editor.networks.requires_grad_(False)
        self._add_gradients()
        if self.hp.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.hp.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in {**losses, _STEPS: torch.ones(())}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _batch(self, step: int) -> list[EditCase]:
        """Return the cases of a step: every epoch in its own order; a last part that fills no batch is left out."""
        size = min(len(self.cases), self.hp.batch_size * self.processes.world)
        epoch, place = divmod(step, len(self.cases) // size)
        source = runtime.generator(self.editor.seed * 7_368_787 + epoch)
        order = torch.randperm(len(self.cases), generator=source)
        variant = torch.randint(1 << 30, (len(self.cases),), generator=source)
        chosen = order[place * size : (place + 1) * size]
        return [
            self.cases[i][v % len(self.cases[i])]
            for i, v in zip(chosen, variant[chosen], strict=True)
        ]

    def _others(self, batch: Sequence[EditCase], step: int) -> list[EditCase]:
        """Return edits that are made beside the batch: routers learn to choose among many."""
        source = runtime.generator(self.editor.seed * 15_485_863 + step)
        used = {case.uid for case in batch}
        chosen = torch.randperm(len(self.cases), generator=source)[
            : getattr(self.hp, "others", 0)
        ].tolist()
        return [self.cases[i][0] for i in chosen if self.cases[i][0].uid not in used]

    def _add_gradients(self) -> None:
        if self.processes.world == 1:
            return
        having = [p for p in self.parameters.values() if p.grad is not None]
        flat = self.processes.add(
            torch.cat([p.grad.flatten() for p in having if p.grad is not None])
        )
        for parameter, part in zip(
            having, flat.split([p.numel() for p in having]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def _log(self) -> None:
        """Write the means since the last line."""
        steps = float(self._sums.pop(_STEPS))
        # by name: a continued training reads the sums from a file, which keeps no order
        sums = sorted(self._sums.items())
        losses = {name: round(float(total) / steps, 5) for name, total in sums}
        self._sums = {}
        if not math.isfinite(losses["total"]):
            raise MmeditError(
                f"the loss became {losses['total']} at step {self.progress.step}",
                "lower learning_rate",
            )
        self.run.append(
            "log",
            [
                {
                    "step": self.progress.step,
                    "rate": rate_at(self.hp, self.progress.step - 1),
                    "losses": losses,
                }
            ],
        )

    # -- held-out cases -----------------------------------------------------------------------------------------

    def calibrate(self) -> dict[str, float]:
        """Choose what the editor leaves open on held-out cases, for the best networks, and keep it with them."""
        editor, chosen = self.editor, {}
        editor.load_networks(self.run.folder / "editor.safetensors")
        for key, candidates in editor.calibrated.items():
            found = []
            for value in candidates:
                editor.hparams = replace(editor.hparams, **{key: value})
                found.append((statistics.fmean(self._scores().values()), value))
                self.how.say(f"{key} {value}: held out mean {100 * found[-1][0]:.1f}")
            chosen[key] = max(found)[1]
            editor.hparams = replace(editor.hparams, **{key: chosen[key]})
        self._keep()
        return chosen

    def _keep(self) -> None:
        """Write the present networks as the best ones."""
        tensors, metadata = self.editor.networks_state()
        progress = self.progress
        metadata |= {"step": str(progress.best_step), "score": f"{progress.best:.4f}"}
        metadata |= {"steps": str(self.hp.steps), "run": self.run.folder.name}
        self.run.save_tensors("editor", tensors, metadata)

    def _validate(self) -> dict[str, float]:
        """Score the held-out cases; keep the networks if they are the best so far."""
        self.editor.finalize()
        progress, scores = self.progress, self._scores()
        score = statistics.fmean(scores.values())
        self.run.append(
            "log", [{"step": progress.step, "score": score, "scores": scores}]
        )
        if score > progress.best:
            progress.best, progress.best_step = score, progress.step
            self._keep()
        progress.looked = progress.step
        return scores

    @torch.no_grad()
    def _scores(self) -> dict[str, float]:
        """Edit the held-out cases in a row, ask everything about them, and take all of it back: mean by column."""
        editor = self.editor
        queries = list(
            dict.fromkeys(
                q for case in self.held_out for _, qs in case.columns() for q in qs
            )
        )
        if self._base is None:
            self._base = self._ask(queries)
        more = max(0, getattr(self.hp, "validation_edits", 0) - len(self.held_out))
        others = distinct([variants[0] for variants in self.cases])[:more]
        edits = [case.request for case in (*self.held_out, *others)]
        for start in range(0, len(edits), self.batch_size):
            editor.edit(edits[start : start + self.batch_size])
        touched = [
            q for q, may in zip(queries, editor.affects(queries), strict=True) if may
        ]
        answers = {**self._base, **self._ask(touched)}
        editor.undo()
        lines = [
            score_case(case, self._base, answers, (SCORE,))["scores"][SCORE]
            for case in self.held_out
        ]
        names = dict.fromkeys(
            name
            for line in lines
            for name in line
            if not name.startswith("portability")
        )
        return {
            name: statistics.fmean(line[name] for line in lines if name in line)
            for name in names
        }

    def _ask(self, queries: Sequence[Query]) -> dict[Query, Answer]:
        return ask(
            self.editor.backbone, queries, layer=self.editor.first_layer or 0, top={}, max_new_tokens=0,
            batch_size=self.batch_size,
        )  # fmt: skip

    def _line(self, scores: Mapping[str, float], seconds_left: float) -> str:
        log = [line for line in self.run.read("log") if "losses" in line]
        columns = "  ".join(
            f"{name} {100 * value:.1f}" for name, value in scores.items()
        )
        best = (
            "best so far"
            if self.progress.best_step == self.progress.step
            else f"best {100 * self.progress.best:.1f}"
        )
        return (
            f"step {self.progress.step}/{self.hp.steps}  loss {log[-1]['losses']['total']:.3f}  held out: {columns}"
            f"  mean {100 * statistics.fmean(scores.values()):.1f} ({best})  {seconds_left / 60:.0f} min left"
        )

    # -- files --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {
            f"networks.{name}": tensor
            for name, tensor in self.editor.networks.state_dict().items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{key}": value for key, value in state.items()
            }
        tensors |= {f"sums.{name}": value for name, value in self._sums.items()}
        self.run.save_tensors(
            "last",
            tensors,
            {key: str(value) for key, value in vars(self.progress).items()},
        )

    def _restore(self) -> None:
        """Continue from the last saved step; the log is cut back to it."""
        saved = self.run.load_tensors("last")
        if saved is not None:
            tensors, metadata = saved
            self.editor.networks.load_state_dict(below(tensors, "networks."))
            state = self.optimizer.state_dict()
            state["state"] = {}
            for name, value in below(tensors, "optimizer.").items():
                index, _, key = name.partition(".")
                state["state"].setdefault(int(index), {})[key] = value
            self.optimizer.load_state_dict(state)
            self._sums = dict(below(tensors, "sums."))
            self.progress = _Progress(
                step=int(metadata["step"]),
                best=float(metadata["best"]),
                best_step=int(metadata["best_step"]),
                seconds=float(metadata["seconds"]),
                looked=int(
                    metadata.get("looked", metadata["step"])
                ),  # older files were saved after the look
            )
        if self.processes.rank == 0:
            log = self.run.read("log")
            self.run.rewrite("log", [line for line in log if self._is_past(line)])

    def _is_past(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log belongs to what was saved."""
        return bool(
            line["step"]
            <= (self.progress.looked if "score" in line else self.progress.step)
        )


def distinct(cases: Sequence[EditCase]) -> list[EditCase]:
    """Return the cases but those that say about the same picture what an earlier one says.

    A fact that is edited by way of several pictures would be found by any of its edits, which hides how well one is.
    """
    kept: list[EditCase] = []
    said: set[tuple[Any, str]] = set()
    for case in cases:
        queries = (
            case.request,
            *(query for queries in case.generality.values() for query in queries),
        )
        here = {
            (query.image, query.target) for query in queries if query.image is not None
        }
        if not here & said:
            kept.append(case)
            said |= here
    return kept


def with_alternatives(
    cases: Sequence[EditCase], training: Any, seed: int
) -> list[tuple[EditCase, ...]]:
    """Return each case with its `alternatives`: everything that networks are taught with."""
    return [
        (case, *alternatives(case, cases, training.alternatives, seed))
        for case in cases
    ]


def alternatives(
    case: EditCase, cases: Sequence[EditCase], count: int, seed: int
) -> list[EditCase]:
    """Return the case with the targets of `count` other cases, so that networks learn to copy and not to remember.

    Which ones depends on the case, the number of cases and the seed alone.
    """
    source = random.Random(f"{seed}/{case.uid}")
    targets = [source.choice(cases).request.target for _ in range(count)]
    return [
        replace(
            case,
            request=replace(case.request, target=target),
            generality={
                k: tuple(replace(q, target=target) for q in qs)
                for k, qs in case.generality.items()
            },
            portability={},
            needs={},
        )
        for target in targets
    ]


def rate_at(training: Any, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to 0 or one cut, as `schedule` says."""
    rate = float(training.learning_rate)
    if step < training.warmup:
        return rate * (step + 1) / training.warmup
    if training.schedule == "step":
        return rate * (training.decay if step >= training.decay_at else 1.0)
    share = (step - training.warmup) / max(1, training.steps - training.warmup)
    return rate * 0.5 * (1 + math.cos(math.pi * share))


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with `prefix`, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
