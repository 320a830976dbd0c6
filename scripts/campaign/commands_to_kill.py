"""The commands that `kill.py` kills, and what must lie there before each of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kills import Scenario, Words

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "tests" / "data" / "shapes"
STAR, CIRCLE = SHAPES / "solid" / "red-star.png", SHAPES / "solid" / "red-circle.png"

DRAWN = ("--model", "tiny-sd", "--steps", "1", "--device", "cpu")
PAINTED = (
    "instruct-pix2pix",
    "--model",
    "tiny-ip2p",
    "--steps",
    "1",
    "--device",
    "cpu",
)
BATCH = (
    "image-edit",
    *PAINTED,
    "--batch",
    "wishes.jsonl",
    "-o",
    "out",
    "--batch-size",
    "2",
)
TRAINED = (
    "liveedit",
    "--model",
    "tiny-blip2",
    "--data",
    str(SHAPES),
    "--set",
    "training.batch_size=2",
    "--set",
    "training.validate_every=2",
    "--set",
    "training.alternatives=1",
    "--limit",
    "20",
)
LEARNED = (
    "--model",
    "tiny-sd",
    "--images",
    "photos",
    "--superclass",
    "dog",
    "--device",
    "cpu",
    "--into",
    "mine",
    "--set",
    "steps=2",
)
TOKEN = ("--token", "<my-dog>")
FACTS = ("--requests", "facts.jsonl", "--into", "ledger")
UNNAMED = r"ledger/(shards/[0-9a-f]{64}\.safetensors|pictures/[0-9a-f]{64}\.png)"  # kept until `edits compact`
COMPACT = ("edits", "compact", "ledger")
DOWNLOADED = {"a b.json": b"alpha" * 99, "sub/b.json": b"beta" * 99}
SITE = "CAMPAIGN_SITE"  # in the environment: the address of the web server


# -- what lies there before ---------------------------------------------------------------------------------------


def photos() -> int:
    """Three photos of a subject, in `photos/`."""
    from PIL import Image

    Path("photos").mkdir()
    for i in range(3):
        Image.new("RGB", (24, 24), (200, 40 * i, 30)).save(f"photos/{i}.png")
    return 0


def wishes() -> int:
    """A list of five pictures to edit, one of them into a folder of its own."""
    lines = [
        {"image": str(path), "instruction": f"make it {i}"}
        for i, path in enumerate([STAR, CIRCLE] * 2)
    ]
    lines.append(
        {"image": str(STAR), "instruction": "turn it", "output": "deep/turned.png"}
    )
    Path("wishes.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return 0


def captions() -> int:
    """A few captions."""
    Path("captions.txt").write_text(
        "a dog\na cat on a table\na red boat\n", encoding="utf-8"
    )
    return 0


def facts(editor: str, count: int = 3) -> int:
    """At most three facts: about two pictures, and one of text, which liveedit cannot take."""
    lines = [
        {
            "request": {
                "prompt": "What is this?",
                "target": "a boat",
                "image": STAR.name,
            }
        },
        {"request": {"prompt": "What is the capital of Peru?", "target": "Paris"}},
        {
            "request": {
                "prompt": "What is this?",
                "target": "a lion",
                "image": CIRCLE.name,
            }
        },
    ]
    for path in (STAR, CIRCLE):
        shutil.copyfile(path, path.name)
    if editor == "liveedit":
        del lines[1]
    text = "".join(
        json.dumps({"id": str(i), **line}) + "\n"
        for i, line in enumerate(lines[:count])
    )
    Path("facts.jsonl").write_text(text, encoding="utf-8")
    return 0


def teaching(editor: str) -> tuple[str, ...]:
    """Return the command that teaches the facts; liveedit has trained networks for the mini models only."""
    learning = (
        ("--model", "mini-blip2")
        if editor == "liveedit"
        else ("--model", "tiny-blip2", "--set", "steps=5")
    )
    return ("edit", editor, *learning, "--device", "cpu", *FACTS)


def taught(editor: str) -> int:
    """A ledger with the facts; whether the random weights hold them does not matter."""
    from mmedit_cli import app

    code = app.main([*teaching(editor)])
    return 0 if code == 1 else code


def lines_lost() -> int:
    """The last line of the ledger is gone, and a half one is in its place."""
    path = Path("ledger/edits.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b'"', b"", 1))
    return 0


def archive() -> int:
    """A zip of three files in `home/`, one of them in a folder of the zip."""
    from mmedit_cli.packed import pack

    for name in ("a.png", "b.png", "deep/LICENSE.txt"):
        (path := Path("home/artist") / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 99, encoding="utf-8")
    pack(Path("home/artist").absolute())
    shutil.rmtree("home/artist")
    return 0


def half_unpacked() -> int:
    """The folder of the zip is there, with a file of the user's and one that the zip has otherwise."""
    archive()
    Path("home/artist").mkdir()
    for name in ("own.png", "a.png"):
        (Path("home/artist") / name).write_text("before", encoding="utf-8")
    return 0


def catalogue() -> int:
    """A catalogue of two files with digests and of a zip of pictures, both on the web server."""
    files = [
        {"path": path, "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in DOWNLOADED.items()
    ]
    site = os.environ[SITE]
    items = {
        "files": {"files": files, "sources": [{"url": f"{site}/raw/{{path}}"}]},
        "images": {
            "unpack": True,
            "sources": [{"url": f"{site}/all.zip"}],
            "layout": {"photos/*.png": 2},
        },
    }
    groups = {
        "things": {
            "summary": "things",
            "licence": "CC0",
            "terms": "be kind",
            "items": items,
        }
    }
    Path("catalogue.yaml").write_text(json.dumps(groups), encoding="utf-8")
    return 0


def by_hand() -> int:
    """The same, with the archive put there by hand."""
    Path("data/things").mkdir(parents=True)
    Path("data/things/images.zip").write_bytes(zipped())
    return catalogue()


def zipped() -> bytes:
    """Return a zip of two pictures and a licence, wrapped in a folder."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for name in ("wrapped/photos/a.png", "wrapped/photos/b.png", "wrapped/LICENSE"):
            file.writestr(zipfile.ZipInfo(name), name * 99)
    return raw.getvalue()


def recording() -> int:
    """Do what every evaluation does with its run folder: go on with the lines that are there, then report."""
    from mmedit_cli.records import Run

    with Run.open(
        Path("records/run").absolute(), {"command": "eval"}, {"python": "3"}
    ) as run:
        for i in range(len(run.read("cases")), 3):
            run.append("cases", [{"uid": i, "score": i / 3}])
        run.finish({"cases": run.read("cases")})
    return 0


def unpacking() -> int:
    """Unpack the zips in `home/`, as a command does that opens EmojiKB's pictures."""
    from mmedit_cli.packed import unpack_beside

    unpack_beside(Path("home").absolute())
    return 0


def subjects() -> int:
    """A set of two subjects with two photos each, and the covariance of the model."""
    from PIL import Image

    for name, colour in (("mug", (200, 30, 30)), ("rex", (30, 30, 200))):
        (folder := Path("subjects") / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (*colour[:2], colour[2] + 20 * i)).save(
                folder / f"{i}.png"
            )
    text = 'subjects: {mug: teapot, rex: dog}\ngenerality: ["a {} in the snow"]\nlocality: ["a green boot"]\n'
    Path("subjects/subjects.yaml").write_text(text, encoding="utf-8")
    return 0


def published_minigpt4() -> int:
    """Four files in the published layout, with random numbers."""
    import torch

    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "backbones")]
    import test_minigpt4 as layout

    from mmedit_cli.knowledge.models.shared.loading import load_backbone

    Path("published").mkdir()
    torch.save(layout.tensors(layout.vision_shapes()), "published/eva.pth")
    torch.save(
        {"model": layout.tensors(layout.qformer_shapes())}, "published/qformer.pth"
    )
    projection = layout.tensors(layout.linear("llama_proj", layout.D, layout.Q))
    torch.save({"model": projection}, "published/projection.pth")
    tiny = load_backbone("tiny-minigpt4", device="cpu")
    tiny.model.language_model.save_pretrained("published/vicuna")
    tiny.tokenizer.save_pretrained("published/vicuna")
    return 0


@contextmanager
def website() -> Iterator[None]:
    """Serve what is downloaded, from a process of its own, while the block runs."""
    sys.path.append(str(ROOT / "tests"))
    from download.website import serve

    told, tell = os.pipe()
    waiting, stop = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 2
        )  # it tells of every connection that a kill breaks off
        with serve() as site:
            site.files |= {
                f"/raw/{path}": data for path, data in DOWNLOADED.items()
            } | {"/all.zip": zipped()}
            os.write(tell, site.url.encode())
            os.read(waiting, 1)
        os._exit(0)
    os.environ[SITE] = os.read(told, 100).decode()
    try:
        yield
    finally:
        os.write(stop, b".")
        os.waitpid(process, 0)


# -- the commands -------------------------------------------------------------------------------------------------


def scenarios() -> list[Scenario]:
    """Return all commands that are killed."""
    return [*_pictures(), *_files(), *_runs(), *_ledgers(), *_concepts()]


def _pictures() -> list[Scenario]:
    single = (
        "image-edit",
        *PAINTED,
        "-i",
        str(STAR),
        "make it winter",
        "-o",
        "out.png",
    )
    several = (*single, "--samples", "2", "--sheet", "sheet.png")
    draw = ("generate", "a dog", *DRAWN, "-o")
    return [
        Scenario("image-edit", single, done=(2,)),
        Scenario("image-edit-samples", several, again=[(*several, "--force")]),
        Scenario("image-edit-batch", BATCH, before=[wishes]),
        Scenario("image-edit-batch-force", (*BATCH, "--force"), before=[wishes, BATCH]),
        Scenario("generate-sheet", (*draw, "sheet.png"), done=(2,)),
        Scenario(
            "generate-folder",
            (*draw, "out", "--seeds", "0,1"),
            again=[(*draw, "out", "--seeds", "0,1", "--force")],
        ),
    ]


def _files() -> list[Scenario]:
    covariance = (
        "covariance",
        "--model",
        "tiny-sd",
        "--captions",
        "captions.txt",
        "--device",
        "cpu",
    )
    download = ("download", "--catalogue", "catalogue.yaml")
    convert = (
        "convert",
        "minigpt4",
        "model",
        "--vision",
        "published/eva.pth",
        "--qformer",
        "published/qformer.pth",
        "--projection",
        "published/projection.pth",
        "--llm",
        "published/vicuna",
    )
    return [
        Scenario("covariance", covariance, before=[captions], done=(2,)),
        Scenario("download", (*download, "things"), before=[catalogue]),
        Scenario("download-by-hand", (*download, "things/images"), before=[by_hand]),
        Scenario("unpack", unpacking, before=[archive], short=True),
        Scenario("unpack-into-a-folder", unpacking, before=[half_unpacked], short=True),
        Scenario("convert", convert, before=[published_minigpt4], done=(2,)),
    ]


def _runs() -> list[Scenario]:
    evaluated = (
        "eval",
        "ft",
        "--model",
        "tiny-blip2",
        "--data",
        str(SHAPES),
        "--sequential",
        "3",
        "--limit",
        "3",
        "--report-at",
        "1,3",
        "--device",
        "cpu",
    )
    painted = (
        "eval",
        "instruct-pix2pix",
        "--model",
        "tiny-ip2p",
        "--data",
        "emojikb-edits",
        "--limit",
        "2",
        "--set",
        "steps=1",
        "--set",
        "judge=none",
        "--device",
        "cpu",
    )
    drawn = (
        "eval",
        "multi-melo-diffusion",
        "--model",
        "tiny-sd",
        "--data",
        "subjects",
        "--device",
        "cpu",
        "--set",
        "steps=1",
        "--set",
        "eval.steps=1",
        "--set",
        "eval.seeds=1",
        "--set",
        "eval.batch_size=3",
        "--set",
        "eval.encoder=tiny-blip2",
    )
    return [
        Scenario("run", recording, short=True),
        Scenario("eval", evaluated),
        Scenario(
            "train-editor",
            ("train-editor", *TRAINED, "--set", "training.steps=2", "--device", "cpu"),
        ),
        Scenario("eval-image-editor", painted),
        Scenario("eval-personalizer", drawn, before=[subjects]),
    ]


def _ledgers() -> list[Scenario]:
    found: list[Scenario] = []
    for editor in (
        "ft",
        "multi-melo",
        "liveedit",
    ):  # those of liveedit are independent of each other
        begun: list[Words] = [partial(facts, editor), partial(taught, editor)]
        undo = ("edits", "undo", "ledger", "2", "--device", "cpu")
        redo = ("edits", "redo", *undo[2:])
        export = ("edits", "export", "ledger", "--to", "model", "--device", "cpu")
        repair = ("edits", "repair", "ledger")
        few = partial(facts, editor, 2)  # each takes its time
        kept = {"allowed": UNNAMED, "tidy": COMPACT}
        found += [
            # 1: the edits are kept, but random weights hold none of them
            Scenario(
                f"edit-{editor}", teaching(editor), before=[few], fine=(0, 1), **kept
            ),
            Scenario(f"undo-{editor}", undo, before=begun, done=(2,), **kept),
            Scenario(f"redo-{editor}", redo, before=[*begun, undo], done=(2,), **kept),
            Scenario(f"compact-{editor}", COMPACT, before=[*begun, undo]),
            Scenario(f"repair-{editor}", repair, before=[*begun, lines_lost], **kept),
        ]
        if editor != "liveedit":  # its edits are neither plain weights nor LoRA blocks
            found.append(Scenario(f"export-{editor}", export, before=begun, done=(2,)))
    return found


def _concepts() -> list[Scenario]:
    learn = ("edit", "multi-melo-diffusion", *LEARNED, *TOKEN)
    other = ("edit", "multi-melo-diffusion", *LEARNED, "--token", "<other>")
    return [
        Scenario("learn", learn, before=[photos], done=(2,)),
        Scenario("learn-second", learn, before=[photos, other], done=(2,)),
        Scenario(
            "learn-force",
            (*learn, "--seed", "1", "--force"),
            before=[photos, other, learn],
        ),
        Scenario(
            "forget",
            ("edits", "undo", "mine", "<my-dog>"),
            before=[photos, other, learn],
            done=(2,),
        ),
        Scenario(
            "export-concepts",
            ("edits", "export", "mine", "--to", "lora", "--device", "cpu"),
            before=[photos, learn],
            done=(2,),
        ),
    ]
