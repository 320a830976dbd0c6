"""What `fuzz.py` gives hostile files to: each reader makes a folder of valid files, and reads it."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUERY = {"prompt": "What is this?", "target": "a star", "image": "a.png"}
CASE = {
    "id": "1",
    "type": "name",
    "request": QUERY,
    "generality": {"text": [QUERY]},
    "locality": {"text": [{"prompt": "Who?", "target": "me"}]},
    "portability": {},
    "needs": {},
}
RECORD = {
    "src": "What is this?",
    "alt": "a star",
    "rephrase": "What do you see?",
    "image": "a.png",
    "image_rephrase": "a.png",
    "loc": "Who?",
    "loc_ans": "me",
    "m_loc": "a.png",
    "m_loc_q": "And this?",
    "m_loc_a": "a cat",
    "port_new": [
        {
            "port_q": "What does it do?",
            "port_a": "shine",
            "port_type": "1-hop",
            "Q&A": {"Question": "What does it do?", "Answer": "shine"},
        }
    ],
}


@dataclass(frozen=True)
class Reader:
    """`make` writes valid files into an empty folder; `read` returns an exit code, or raises as a library does."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], int]


def import_all() -> None:
    """Import what is heavy: neither its time nor its memory is a reader's."""
    import pyarrow  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import mmedit_cli.app  # noqa: F401


def readers() -> list[Reader]:
    """Return all readers."""
    return [
        Reader(
            "cases.jsonl",
            lambda f: _data(f, "cases.jsonl", _lines(CASE, {**CASE, "id": "2"})),
            _cases(""),
        ),
        Reader(
            "facts.json",
            lambda f: _data(f, "facts.json", json.dumps([QUERY, QUERY])),
            _cases("facts.json"),
        ),
        Reader("facts.csv", lambda f: _data(f, "facts.csv", _CSV), _cases("facts.csv")),
        Reader("facts.jsonl.gz", _gzipped, _cases("facts.jsonl.gz")),
        Reader(
            "vlkeb",
            lambda f: _data(f, "eval_multihop.json", json.dumps([RECORD])),
            _vlkeb,
        ),
        Reader(
            "doctor data",
            lambda f: _data(f, "cases.jsonl", _lines(CASE)),
            _command("doctor", "."),
        ),
        Reader("subset", _subset, _read_subset),
        Reader(
            "questions",
            lambda f: _text(f / "q.txt", "Who?\nWhat?\n"),
            _questions("q.txt"),
        ),
        Reader("captions", lambda f: _text(f / "c.txt", "a cat\na dog\n"), _captions),
        Reader("subjects.yaml", _subjects, _read_subjects),
        Reader("pairs.jsonl", _pairs, _read_pairs("pairs.jsonl")),
        Reader("pairs folder", _pairs_folder, _read_pairs("")),
        Reader("image-edit batch", _batch, _read_batch),
        Reader("hparams", lambda f: _text(f / "ft.yaml", _HPARAMS), _hparams),
        Reader(
            "catalogue", lambda f: _text(f / "c.yaml", _CATALOGUE), _command(*_LIST)
        ),
        Reader(
            "receipt",
            _receipt,
            _command(
                "download", "mine", "--catalogue", "c.yaml", "--to", "mine", "--verify"
            ),
        ),
        Reader("report.json", _report, _command("report", "run")),
        Reader("reports", _report, _command("report", "--records", ".")),
        Reader("ledger", _ledger, _command("edits", "list", "edits")),
        Reader("ledger shown", _ledger, _command("edits", "show", "edits", "1")),
        Reader("concepts", _concepts, _command("edits", "list", "mine")),
        Reader("model configs", _model, _model_configs),
        Reader("tensors", _tensors, _read_tensors),
        Reader("picture", lambda f: _picture(f / "a.png"), _load_picture),
        Reader("archives", _archives, _unpack),
        Reader("pairs parquet", _parquet, _read_pairs("")),
        Reader("covariance", _covariance, _read_covariance),
        Reader("networks", _networks, _read_networks),
        Reader("ledger repaired", _ledger, _command("edits", "repair", "edits")),
        Reader("stdin", lambda f: _text(f / "stdin", "Who?\nWhat?\n"), _read_stdin),
        Reader("opened model", _whole_model, _open_model),
    ]


_LIST = ("download", "--list", "--catalogue", "c.yaml")


# -- what is valid ------------------------------------------------------------------------------------------------

_CSV = 'prompt,target,image\nWhat is this?,a star,a.png\n"Who, again?",me,\n'
_HPARAMS = (
    "layers: [1]\nsteps: 3\nlearning_rate: 0.1\nvariants:\n  tiny-blip2: {steps: 5}\n"
)
_CATALOGUE = """
mine:
  summary: mine
  licence: none
  terms: ''
  homepage: ''
  items:
    one:
      summary: one file
      sources: [{url: 'http://127.0.0.1:9/a.txt'}]
      files: [{path: a.txt, bytes: 3}]
"""


def _lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _picture(path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (20, 20), (200, 30, 30))
    image.putpixel((3, 3), (0, 0, 0))
    image.save(path)


def _data(folder: Path, name: str, text: str) -> None:
    _picture(folder / "a.png")
    _text(folder / name, text)


def _gzipped(folder: Path) -> None:
    import gzip

    _picture(folder / "a.png")
    (folder / "facts.jsonl.gz").write_bytes(
        gzip.compress(_lines(QUERY, {**QUERY, "target": "b"}).encode())
    )


def _subset(folder: Path) -> None:
    _data(folder, "cases.jsonl", _lines(CASE))
    _text(folder / "list.json", json.dumps({"cases": {"1": ["locality.text"]}}))


def _subjects(folder: Path) -> None:
    for name in ("a", "b", "c"):
        _picture(folder / "teddy" / f"{name}.png")
    subjects = {
        "subjects": {"teddy": {"superclass": "toy", "token": "<t>"}},
        "pair": "a {} and a {}",
        "generality": ["a {} at sea"],
        "locality": ["a boat"],
        "reliability": ["a {}"],
    }
    _text(folder / "subjects.yaml", json.dumps(subjects))


def _pairs(folder: Path) -> None:
    pair = {
        "source": "a.png",
        "target": "a.png",
        "instruction": "make it blue",
        "id": "x",
        "caption": "a",
    }
    _data(folder, "pairs.jsonl", _lines(pair, {**pair, "id": "y"}))


def _pairs_folder(folder: Path) -> None:
    _text(
        folder / "1" / "prompt.json",
        json.dumps({"edit": "make it blue", "input": "a", "output": "b"}),
    )
    for i in (0, 1):
        _picture(folder / "1" / f"7_{i}.jpg")


def _batch(folder: Path) -> None:
    wish = {
        "image": "a.png",
        "instruction": "make it blue",
        "output": "b.png",
        "seed": 3,
        "expressive": "blue",
    }
    _data(folder, "batch.jsonl", _lines(wish, {**wish, "output": "c.png"}))


def _receipt(folder: Path) -> None:
    _text(folder / "c.yaml", _CATALOGUE)
    _text(folder / "mine" / "a.txt", "abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    entry = {
        "source": "http://x/a",
        "revision": None,
        "checked": "source",
        "files": {"a.txt": [3, digest]},
    }
    _text(
        folder / "mine" / "download.json",
        json.dumps({"group": "mine", "items": {"one": entry}}),
    )


def _report(folder: Path) -> None:
    score = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 10}
    milestone = {
        "edits": 10,
        "cases": 10,
        "short_group": False,
        "scores": {
            "ar": {
                "reliability": score,
                "generality.text": score,
                "locality.text": score,
            }
        },
        "before": {"ar": {"reliability": score}},
    }
    example = {
        "case": "1",
        "prompt": "What?",
        "target": "a",
        "before": "b",
        "after": "c",
        "image": None,
    }
    report = {
        "editor": "ft",
        "model": {"name": "m", "fingerprint": "0"},
        "data": {"name": "d", "cases": 10},
        "milestones": [milestone],
        "retention": {"milestones": [10]},
        "examples": [example],
        "cost": {
            "seconds_per_edit": {"mean": 0.1, "median": 0.1, "p95": 0.2},
            "edits": 10,
            "asked": {"questions": 100, "seconds": 2.0},
        },
    }
    _text(folder / "run" / "report.json", json.dumps(report))


def _ledger(folder: Path) -> None:
    import torch

    from mmedit_cli.knowledge.ledger.ledger import Ledger
    from mmedit_cli.types import Query

    _picture(folder / "a.png")
    config = {
        "editor": "nobody",
        "hparams": {"a": 1},
        "model": {"name": "none", "fingerprint": "0"},
        "dtype": "float32",
        "seed": 0,
        "rows": True,
        "checkpoint": None,
        "state": {},
    }
    with Ledger.create(folder / "edits", config, {}) as ledger:
        for i in range(3):
            request = ledger.keep_picture(
                Query("What is this?", f"target {i}", folder / "a.png")
            )
            ledger.add(
                [request], {"row": torch.ones(1, 4)}, before=["b"], names=["a.png"]
            )
        ledger.mark("undo", [2])


def _concepts(folder: Path) -> None:
    _text(folder / "mine" / "toy.safetensors", "no tensors")
    entry = {
        "token": "<toy>",
        "superclass": "toy",
        "file": "toy.safetensors",
        "bytes": 10,
        "sha256": "0" * 64,
        "seed": 0,
        "identifier": "<toy>",
        "images": [{"name": "a.png", "sha256": "0" * 64}],
        "time": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
    }
    index = {
        "format": 1,
        "editor": "perfusion",
        "model": "tiny-sd",
        "fingerprint": "0",
        "concepts": [entry],
    }
    _text(folder / "mine" / "index.json", json.dumps(index))


def _model(folder: Path) -> None:
    _text(
        folder / "config.json",
        json.dumps({"model_type": "llava", "text_config": {"hidden_size": 8}}),
    )
    _text(folder / "settings.json", json.dumps({"steps": 3}))
    _text(
        folder / "model.safetensors.index.json",
        json.dumps({"weight_map": {"w": "model.safetensors"}}),
    )
    _tensors(folder)


def _tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(
        {"w": torch.ones(2, 3)}, folder / "model.safetensors", {"hparams": '{"a": 1}'}
    )


def _archives(folder: Path) -> None:
    _text(folder / "in" / "a.txt", "abc" * 100)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(folder / "in" / "a.txt", "in/a.txt")
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "in" / "a.txt", "in/a.txt")


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    _picture(folder / "a.png")
    picture = (folder / "a.png").read_bytes()
    (folder / "a.png").unlink()
    columns = {
        "source": [picture] * 2,
        "target": [picture] * 2,
        "instruction": ["make it blue", "make it red"],
        "caption": ["a", "b"],
        "target_caption": ["c", None],
    }
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")


def _covariance(folder: Path) -> None:
    import torch

    from mmedit_cli.drawing.covariance import Covariance

    Covariance(torch.eye(3, dtype=torch.float64), 5, 9, {"encoder": "0"}).save(
        folder / "c.safetensors"
    )


def _networks(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    report = {
        "editor": "unike",
        "model": {"name": "tiny-blip2"},
        "data": {"name": "emojikb:train"},
        "steps": 20,
    }
    _text(folder / "run" / "report.json", json.dumps(report))
    save_file(
        {"w": torch.ones(2)},
        folder / "run" / "editor.safetensors",
        {"step": "10", "editor": "unike"},
    )


def _whole_model(folder: Path) -> None:
    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    backbone = load_backbone("tiny-blip2", device="cpu")
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)


# -- how it is read -----------------------------------------------------------------------------------------------


def _command(*words: str) -> Callable[[Path], int]:
    """Return a reader that gives a command in the folder."""

    def read(folder: Path) -> int:
        import contextlib

        from mmedit_cli.app import main

        with contextlib.chdir(folder):
            return main(list(words))

    return read


def _cases(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        from mmedit_cli.knowledge.data.base import fingerprint, load_cases

        fingerprint(load_cases(folder / name if name else folder))
        return 0

    return read


def _vlkeb(folder: Path) -> int:
    from mmedit_cli.knowledge.data.base import DataOptions, load_cases

    load_cases("vlkeb:multihop", options=DataOptions(folder, images=folder))
    return 0


def _read_subset(folder: Path) -> int:
    from mmedit_cli.knowledge.data.base import DataOptions, load_cases

    load_cases(folder, options=DataOptions(subset=str(folder / "list.json")))
    return 0


def _questions(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        from mmedit_cli.knowledge.workflow.asking import read_questions

        read_questions(folder / name, None)
        return 0

    return read


def _captions(folder: Path) -> int:
    from mmedit_cli.drawing.covariance import read_captions

    for _ in read_captions(folder / "c.txt"):
        pass
    return 0


def _read_subjects(folder: Path) -> int:
    from mmedit_cli.drawing.data.opening import open_subjects

    open_subjects(str(folder)).fingerprint()
    return 0


def _read_pairs(name: str) -> Callable[[Path], int]:
    def read(folder: Path) -> int:
        from mmedit_cli.picture_editing.data.base import fingerprint
        from mmedit_cli.picture_editing.data.opening import open_pairs

        _, pairs = open_pairs(folder / name if name else folder)
        fingerprint(pairs)
        for pair in pairs:
            pair.source()
        return 0

    return read


def _read_batch(folder: Path) -> int:
    from mmedit_cli.picture_editing.workflow.editing import read_requests

    read_requests(folder / "batch.jsonl", folder / "out", 0)
    return 0


def _hparams(folder: Path) -> int:
    from mmedit_cli.hparams import load_hparams
    from mmedit_cli.knowledge.methods.ft import Ft

    load_hparams(folder / "ft.yaml", Ft.Hparams, variant="tiny-blip2")
    return 0


def _model_configs(folder: Path) -> int:
    from mmedit_cli.catalog import find_model
    from mmedit_cli.model_folder import read_settings, weight_files

    read_settings(folder)
    weight_files(folder)
    find_model(str(folder))
    return 0


def _read_tensors(folder: Path) -> int:
    from mmedit_cli.storage import read_tensors

    read_tensors(folder / "model.safetensors")
    return 0


def _load_picture(folder: Path) -> int:
    from mmedit_cli.pictures import Picture, check_picture, load_picture, picture_size

    check_picture(folder / "a.png")
    picture_size(Picture(folder / "a.png"))
    load_picture(Picture(folder / "a.png"))
    return 0


def _unpack(folder: Path) -> int:
    from mmedit_cli.download.unpack import unpack

    for name in ("a.zip", "a.tar.gz"):
        unpack(folder / name, folder / "out" / name)
    return 0


def _read_covariance(folder: Path) -> int:
    from mmedit_cli.drawing.covariance import Covariance

    Covariance.load(folder / "c.safetensors").summary()
    return 0


def _read_networks(folder: Path) -> int:
    from mmedit_cli.knowledge.trained_networks import (
        chosen_networks,
        default_editor,
        described,
        networks_line,
    )

    networks_line(
        described(
            chosen_networks(folder / "run" / "editor.safetensors", folder)
        ).facts()
    )
    default_editor(folder, checkpoint=folder / "run" / "editor.safetensors")
    return 0


def _read_stdin(folder: Path) -> int:
    import sys
    from unittest.mock import patch

    from mmedit_cli.reading import open_regular, read_stdin

    with open_regular(folder / "stdin"):
        pass
    with (
        (folder / "stdin").open(encoding="utf-8") as file,
        patch.object(sys, "stdin", file),
    ):
        for _ in read_stdin():
            pass
    return 0


def _open_model(folder: Path) -> int:
    from mmedit_cli.knowledge.models.shared.loading import load_backbone
    from mmedit_cli.types import Query

    backbone = load_backbone(str(folder), device="cpu")
    backbone.encode(Query("What?", "a star"))
    return 0
