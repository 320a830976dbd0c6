"""Is a model that no family was written for understood? It is compared with its own processor and `generate`, once.

What was found is kept in the cache folder by the fingerprint of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmedit_cli.errors import MmeditError, ModelError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.generic import Generic
from mmedit_cli.knowledge.models.shared.generation import set_aside
from mmedit_cli.model_folder import reason
from mmedit_cli.reading import read_json_object
from mmedit_cli.registry import cache_dir
from mmedit_cli.storage import temporary_folder, write_json
from mmedit_cli.types import Query

VERSION = 1  # raise it when a check changes: models are then checked again
_FURTHEST = {torch.float32: 1e-3}  # of two logits; other formats round more
_ROUNDED = 0.5
_NEW_TOKENS = 4
_SIZES = {"square": (96, 96), "wide": (160, 60)}  # pixels
FAST = "layer by layer"


@dataclass(frozen=True)
class Check:
    """What one check found; `ok` is None where it has nothing to compare with."""

    name: str
    ok: bool | None
    found: str


@dataclass(frozen=True)
class SelfCheck:
    """All checks of a model."""

    checks: tuple[Check, ...]

    @property
    def fast(self) -> bool:
        """Whether its layers can be run one by one."""
        return all(check.ok is not False for check in self.checks if check.name == FAST)

    @property
    def failed(self) -> list[Check]:
        """What it cannot be used without, and failed."""
        return [c for c in self.checks if c.ok is False and c.name != FAST]


def ensure_checked(backbone: VisionLanguageModel, *, again: bool = False) -> SelfCheck:
    """Check a model that was not checked before, or `again`, and let it run as was found."""
    found = None if again else _kept(backbone)
    if found is None:
        found = self_check(backbone)
        _keep(backbone, found)
    if isinstance(backbone, Generic):
        backbone.fast = found.fast
    return found


def require_sound(backbone: VisionLanguageModel) -> None:
    """Raise ModelError, with what failed, for a model that is not understood."""
    found = ensure_checked(backbone)
    if found.failed:
        said = "; ".join(f"{check.name}: {check.found}" for check in found.failed)
        raise ModelError(
            f"{backbone.name}: {type(backbone.model).__name__} is not understood: {said}",
            f"mmedit doctor {backbone.name} checks it again; "
            "a family of a plug-in can say what is special: CONTRIBUTING.md",
        )


def self_check(backbone: VisionLanguageModel) -> SelfCheck:
    """Compare a model with its own processor and `generate`, on two pictures of other sizes and a text alone."""
    with temporary_folder() as folder, torch.no_grad():
        made = _Comparison(backbone, folder)
        return SelfCheck(tuple(made.checks()))


class _Comparison:
    """A backbone, what it is asked, and what its model says to the same by itself."""

    def __init__(self, backbone: VisionLanguageModel, folder: Path) -> None:
        self.backbone = backbone
        self.furthest = _FURTHEST.get(backbone.dtype, _ROUNDED)
        self.queries = [Query("What is the capital of France?", "Paris")]
        if backbone.sees:
            square, wide = _pictures(folder)
            self.queries += [
                Query("What is this?", "a blue star", square),
                Query("Which colour do you see in this picture?", "green", wide),
            ]

    def checks(self) -> Iterator[Check]:
        """Yield what was found, in order; what others rest on comes first."""
        backbone = self.backbone
        if not isinstance(backbone, Generic):
            yield Check(
                "ids, logits, answers", None, "its family is compared by its own tests"
            )
            yield _tried("batch", self.batch)
            yield _tried(FAST, self.layers)
            return
        for name, run in (
            ("ids", self.ids),
            ("logits", self.logits),
            ("batch", self.batch),
            ("answers", self.answers),
            ("left padding", self.left_padding),
        ):
            check = _tried(name, run)
            yield check
            if not check.ok:  # the others would fail as well
                return
        backbone.fast = True
        layers = _tried(FAST, self.layers)
        yield layers
        if not layers.ok:
            backbone.fast = False
            yield _tried("stopping in the middle", self.layers)

    # -- one check each -----------------------------------------------------------------------------------------

    def ids(self) -> tuple[bool, str]:
        """Our ids are those of the processor, for plain questions and chats."""
        backbone = self.backbone
        assert isinstance(backbone, Generic)
        asked = [query for query in self.queries if query.image is not None]
        if backbone.tokenizer.chat_template:
            asked += [replace(query, chat=True) for query in asked]
        for query in asked:
            ours = backbone.encode(query, with_answer=False).ids
            own = backbone.processed(query)["input_ids"][0].tolist()
            if ours != own:
                place = _first_difference(ours, own)
                return False, (
                    f"{len(ours)} tokens where the processor makes {len(own)}; token {place} differs"
                )
        return True, f"{len(asked)} questions are those of the processor"

    def logits(self) -> tuple[bool, str]:
        """Our logits are those of the model's own forward pass."""
        backbone = self.backbone
        away = 0.0
        for query, own in zip(self.queries, self.own, strict=True):
            batch = backbone.batch([query], with_answer=False)
            ours = backbone.logits(batch)
            whole = backbone.model(**own, use_cache=False)
            away = max(away, _away(ours, whole.logits))
        return self._within(away, "from those of the model's own forward pass")

    def batch(self) -> tuple[bool, str]:
        """Questions with pictures of several sizes, and without, are answered together as alone."""
        together = self._logits(self.queries)
        away = 0.0
        for row, query in zip(together, self.queries, strict=True):
            (alone,) = self._logits([query])
            length = len(alone)
            away = max(away, _away(row[:length], alone))
        return self._within(away, "from those of each question alone")

    def _logits(self, queries: Sequence[Query]) -> Tensor:
        batch = self.backbone.batch(queries)
        return self.backbone.logits(batch)

    def answers(self) -> tuple[bool, str]:
        """Greedy answers are those of the model's own `generate`."""
        for query, own in zip(self.queries, self.generated, strict=True):
            batch = self.backbone.batch([query], with_answer=False, left_pad=True)
            (ours,) = self._continued(batch)
            problem = self._differs(ours, own)
            if problem:
                return False, f"{query.prompt!r}: {problem}"
        return True, f"{len(self.queries)} are those of the model's own generate"

    def left_padding(self) -> tuple[bool, str]:
        """The same in one batch that is padded on the left."""
        batch = self.backbone.batch(self.queries, with_answer=False, left_pad=True)
        rows = zip(self.queries, self._continued(batch), self.generated, strict=True)
        for query, ours, own in rows:
            problem = self._differs(ours, own)
            if problem:
                return False, f"{query.prompt!r}: {problem}"
        padding = int((batch.attention_mask == 0).sum())
        return True, f"the same answers behind {padding} padding tokens"

    def layers(self) -> tuple[bool, str]:
        """Stopped on entering any layer and resumed, the model says what it says in one pass."""
        backbone = self.backbone
        batch = backbone.batch(self.queries)
        whole = backbone.logits(batch)
        away = 0.0
        prefix = backbone.prefix(batch, 0)
        # one layer at a time: every depth is reached, and no layer is run twice
        for layer in range(1, backbone.n_layers + 1):
            prefix = backbone.advance(prefix, layer)
        away = _away(backbone.resume(prefix), whole)
        for layer in (0, backbone.n_layers // 2, backbone.n_layers):
            hidden = backbone.prefix(batch, layer).hidden
            rebuilt = backbone.prefix_of(hidden, batch, layer)
            away = max(away, _away(backbone.resume(rebuilt), whole))
        return self._within(
            away, f"from those of one pass, stopped at {backbone.n_layers} depths"
        )

    # -- what is compared with ----------------------------------------------------------------------------------

    @cached_property
    def own(self) -> list[dict[str, Any]]:
        """What the model itself takes, question by question."""
        backbone = self.backbone
        assert isinstance(backbone, Generic)
        return [backbone.processed(query) for query in self.queries]

    @cached_property
    def generated(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The tokens that the model's own `generate` puts behind each question, and the logits of every step."""
        found = []
        model = self.backbone.model
        for inputs in self.own:
            with set_aside(model):
                made = model.generate(
                    **inputs,
                    max_new_tokens=_NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=self.backbone.pad_id,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            length = inputs["input_ids"].shape[1]
            logits = [step[0] for step in made.logits]
            found.append((made.sequences[0, length:], logits))
        return found

    def _continued(self, batch: Any) -> list[list[int]]:
        tokens = self.backbone.continued(batch, _NEW_TOKENS)
        rows: list[list[int]] = tokens.tolist()
        return rows

    def _differs(
        self, ours: Sequence[int], own: tuple[Tensor, list[Tensor]]
    ) -> str | None:
        """Return how an answer differs from the model's own, None if it does not, or only between equals."""
        tokens, logits = own
        for step, (token, other) in enumerate(zip(ours, tokens.tolist(), strict=False)):
            if token != other:
                gap = float(logits[step][other] - logits[step][token])
                if gap <= self.furthest:
                    return None
                return f"token {step + 1} is {token} where generate has {other}"
            if self.backbone.stops(token):
                return None
        return None

    def _within(self, away: float, what: str) -> tuple[bool, str]:
        return away <= self.furthest, f"logits are at most {away:.2g} away {what}"


def _tried(name: str, run: Callable[[], tuple[bool, str]]) -> Check:
    """Run a check; a model that is not understood may raise anything there."""
    try:
        ok, found = run()
    except MmeditError as error:
        return Check(name, False, error.problems[0])
    except (MemoryError, Warning):
        raise
    except Exception as error:
        return Check(name, False, reason(error))
    return Check(name, ok, found)


def _pictures(folder: Path) -> list[Path]:
    """Write two pictures of other sizes and shapes."""
    from PIL import Image

    found = []
    for name, (width, height) in _SIZES.items():
        across = Image.linear_gradient("L").resize((width, height))
        around = Image.radial_gradient("L").resize((width, height))
        picture = Image.merge(
            "RGB", (across, around, across.transpose(Image.Transpose.ROTATE_180))
        )
        path = folder / f"{name}.png"
        picture.save(path)
        found.append(path)
    return found


def _away(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    place = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        place += 1
    return place


# -- what is kept -----------------------------------------------------------------------------------------------


def _file(backbone: VisionLanguageModel) -> Path:
    import transformers

    number = str(backbone.dtype).removeprefix("torch.")
    name = f"{backbone.fingerprint}-{transformers.__version__}-{number}-{VERSION}.json"
    return cache_dir() / "checks" / name


def _kept(backbone: VisionLanguageModel) -> SelfCheck | None:
    path = _file(backbone)
    if not path.is_file():
        return None
    with suppress(ModelError):  # a file that was cut off: the model is checked again
        content = read_json_object(path, error=ModelError, hint="")
        rows = content.records("checks")
        return SelfCheck(tuple(_read(row) for row in rows))
    return None


def _read(row: Any) -> Check:
    ok = row.values.get("ok")
    if not isinstance(ok, bool | None):
        raise ModelError("ok is neither true nor false")
    return Check(row.text("name"), ok, row.text("found"))


def _keep(backbone: VisionLanguageModel, found: SelfCheck) -> None:
    path = _file(backbone)
    # without a cache folder it is checked again the next time
    with suppress(OSError, MmeditError):
        path.parent.mkdir(parents=True, exist_ok=True)
        checks = [asdict(check) for check in found.checks]
        write_json(path, {"model": backbone.name, "checks": checks}, indent=1)
