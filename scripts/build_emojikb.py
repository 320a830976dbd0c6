"""Build data/emojikb from pinned npm packages: concepts, pictures, facts, case files, licences, manifest.

    python scripts/build_emojikb.py --cache ~/.cache/emojikb            # fetch what is missing, build
    python scripts/build_emojikb.py --cache ~/.cache/emojikb --check    # build elsewhere, compare every digest
    python scripts/build_emojikb.py --sheet docs/emojikb.png            # contact sheet of what is in data/emojikb

Needs npm, pillow, numpy and resvg_py; the data set itself needs none of them. A rerun gives identical bytes under the
same versions of pillow and resvg_py (they are written into the manifest). What is kept, and what it is called, is
decided in emojikb_choices.py; how cases are made of it, in emojikb_cases.py.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import emojikb_artists
import emojikb_cases
import emojikb_choices as choices
import numpy as np
import resvg_py
from emojikb_artists import FURTHER, Package, code_point
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmedit_cli.knowledge.data.emojikb import concepts_in  # noqa: E402
from mmedit_cli.packed import loose, pack, unpack_beside  # noqa: E402
from mmedit_cli.reading import read_text  # noqa: E402

DATA = ROOT / "data" / "emojikb"
SIDE = 64  # pixels
ERRORS = "model_errors.jsonl.gz"
COLOURS = 64  # palette entries of a picture, alpha included
STATIC = (
    "LICENSES/Apache-2.0.txt",
    "LICENSES/CC-BY-4.0.txt",
    "LICENSES/MIT-fluent-emoji.txt",
    "wordings.json",
)


PACKAGES = {
    "noto": Package(
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": Package(
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "openmoji": Package(
        "openmoji@17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    ),
    "names": Package(
        "emojibase-data@17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "countries": Package(
        "world-countries@5.1.0",
        "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
    ),
}
PICTURES = {  # artist: folder inside the package, suffix
    "noto": ("package/img/google/64/", ".png"),
    "twemoji": ("package/img/twitter/64/", ".png"),
    "fluent": ("package/assets/", ".webp"),
    "openmoji": ("package/color/svg/", ".svg"),
}
ARTISTS = tuple(PICTURES)
FLAG_ARTISTS = (
    "noto",
    "twemoji",
    "openmoji",
)  # the country flags of the fluent package are Noto's drawings
LICENCES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "fluent": "MIT",
    "openmoji": "CC-BY-SA-4.0",
    "names": "MIT",
    "countries": "ODbL-1.0",
}


# ---------------------------------------------------------------------------------------------- sources


def fetch(cache: Path) -> dict[str, tarfile.TarFile]:
    """Open the pinned packages, fetching the missing ones with `npm pack`; members are only ever read by name."""
    cache.mkdir(parents=True, exist_ok=True)
    opened = {}
    further = {name: artist.package for name, artist in FURTHER.items()}
    for key, package in {**PACKAGES, **further}.items():
        path = cache / package.file
        if not path.exists():
            print(f"fetching {package.spec}", file=sys.stderr)
            subprocess.run(
                ["npm", "pack", package.spec, "--silent"],
                cwd=cache,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            sys.exit(f"error: {path}: sha256 {found}, expected {package.sha256}")
        opened[key] = tarfile.open(path)  # noqa: SIM115 - read from until the end of the run
    return opened


def read(package: tarfile.TarFile, name: str) -> bytes:
    member = package.extractfile(name)
    assert member is not None, name
    return member.read()


def index(package: tarfile.TarFile, folder: str, suffix: str) -> dict[str, str]:
    """Map code points to members, the plainest file name first where a set has two."""
    members: dict[str, str] = {}
    for name in sorted(package.getnames(), key=lambda n: (len(n), n)):
        stem = name.removeprefix(folder).removesuffix(suffix)
        if name.startswith(folder) and name.endswith(suffix) and "/" not in stem:
            members.setdefault(code_point(stem), name)
    return members


# ---------------------------------------------------------------------------------------------- concepts


def plain(text: str) -> str:
    """Strip accents and typographic marks: `Yaoundé` -> `Yaounde`."""
    text = text.replace("’", "'").replace("ʻ", "'").replace("ł", "l").replace("đ", "d")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def with_article(name: str) -> str:
    first = name.lower()
    an = first[0] in "aeiou" and not first.startswith(
        ("uni", "euro", "one", "u-", "us")
    )
    an = an or first.startswith(("x-", "hour", "suv", "atm", "mp3"))
    return f"{'an' if an else 'a'} {name}"


def things(labels: dict[str, str]) -> list[dict]:
    """Concepts that are not country flags, in the order of emojikb_choices."""
    found = []
    for (kind, category), listing in choices.KINDS.items():
        for entry in listing.split(";"):
            label, _, name = (
                part.strip() for part in " ".join(entry.split()).partition(" = ")
            )
            if label not in labels:
                sys.exit(f"error: emojikb_choices: no label {label!r}")
            name = plain(name or label)
            it = name[1:] if name.startswith("~") else with_article(name)
            name = name.removeprefix("~").removeprefix("the ")
            found.append(
                {
                    "id": labels[label],
                    "name": name,
                    "it": it,
                    "kind": kind,
                    "category": category,
                }
            )
    return found


def one(overrides: dict[str, str | None], code: str, values: list[str]) -> str | None:
    """The single value of a fact; more than one must have been decided by hand."""
    if code in overrides:
        return overrides[code]
    if len(values) > 1:
        sys.exit(f"error: {code}: {values} needs a decision in emojikb_choices")
    return plain(values[0]) if values else None


def flags(countries: list[dict], labels: dict[str, str]) -> list[dict]:
    ids = set(labels.values())
    found = []
    for entry in sorted(countries, key=lambda c: c["cca2"]):
        code = entry["cca2"]
        wanted = entry["unMember"] or code in choices.TERRITORIES.split()
        concept = "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):x}" for letter in code)
        if not wanted or code in choices.LEFT_OUT_FLAGS.split() or concept not in ids:
            continue
        country = choices.COUNTRY_NAMES.get(code) or plain(entry["name"]["common"])
        it = f"the {country}" if code in choices.THE.split() else country
        continent = entry["region"]
        if continent == "Americas":
            continent = (
                "South America"
                if entry["subregion"] == "South America"
                else "North America"
            )
        currency = one(
            choices.CURRENCIES,
            code,
            [money["name"] for money in (entry["currencies"] or {}).values()],
        )
        if currency:
            currency = currency.replace("United States dollar", "US dollar").replace(
                "Pound sterling", "British pound"
            )
            currency = "euro" if currency == "Euro" else currency
        found.append(
            {
                "id": concept,
                "name": f"flag of {it}",
                "it": f"the flag of {it}",
                "kind": "country flag",
                "category": "flags",
                "country": country,
                "country_it": it,
                "capital": one(choices.CAPITALS, code, entry["capital"]),
                "continent": one(choices.CONTINENTS, code, [continent]),
                "currency": currency,
                "language": one(
                    choices.LANGUAGES, code, list(entry["languages"].values())
                ),
            }
        )
    return found


def check_concepts(concepts: list[dict]) -> None:
    for field in ("id", "name", "it", "capital"):
        for value, count in Counter(
            c[field].lower() for c in concepts if c.get(field)
        ).items():
            if count > 1:
                sys.exit(f"error: {field} {value!r} is used {count} times")
    for concept in concepts:
        for field, value in concept.items():
            if isinstance(value, str) and not (
                value.isascii() and value == value.strip() and value
            ):
                sys.exit(f"error: {concept['id']}: {field} {value!r}")


# ---------------------------------------------------------------------------------------------- pictures


def drawing(data: bytes, suffix: str) -> Image.Image:
    """A picture of any source as 64x64 RGBA; scaled with premultiplied alpha, so that edges take no foreign colour."""
    if suffix == ".svg":
        data = bytes(
            resvg_py.svg_to_bytes(
                svg_string=data.decode(), width=4 * SIDE, height=4 * SIDE
            )
        )
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if picture.size != (SIDE, SIDE):
        picture = (
            picture.convert("RGBa")
            .resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            .convert("RGBA")
        )
    return picture


def palette_png(picture: Image.Image, colours: int = COLOURS) -> bytes:
    """A PNG with a palette of so many RGBA colours, found by k-means in premultiplied space.

    Every sum below is over whole numbers that a float holds exactly, so the result doesn't depend on the machine.
    """
    rgba = np.asarray(picture).reshape(-1, 4).astype(np.int64)
    alpha = rgba[:, 3:]
    pixels = np.concatenate([rgba[:, :3] * alpha // 255, alpha], axis=1)  # (4096, 4)
    unique, where, weight = np.unique(
        pixels, axis=0, return_inverse=True, return_counts=True
    )
    where = where.reshape(-1)
    if len(unique) <= colours:
        centres, label = unique, np.arange(len(unique))
    else:
        start = Image.fromarray(
            pixels.reshape(SIDE, SIDE, 4).astype(np.uint8), "RGBA"
        ).quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        centres = np.array(start.getpalette("RGBA"), dtype=np.int64).reshape(-1, 4)[
            :colours
        ]
        points = unique.astype(np.float32)
        for step in range(9):
            seeds = centres.astype(np.float32)
            distance = (
                (points**2).sum(1)[:, None]
                - 2 * points @ seeds.T
                + (seeds**2).sum(1)[None]
            )
            label = distance.argmin(1)
            if step == 8:
                break
            count = np.bincount(label, weights=weight, minlength=len(centres))
            for channel in range(4):
                total = np.bincount(
                    label, weights=weight * unique[:, channel], minlength=len(centres)
                )
                mean = np.rint(total / np.maximum(count, 1)).astype(np.int64)
                centres[:, channel] = np.where(count > 0, mean, centres[:, channel])
    alpha = centres[:, 3:]
    colour = np.where(
        alpha > 0,
        np.minimum(255, (centres[:, :3] * 255 + alpha // 2) // np.maximum(alpha, 1)),
        0,
    )
    order = np.lexsort((*colour.T, alpha[:, 0]))  # opaque entries last: a short tRNS
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    image = Image.fromarray(
        rank[label][where].astype(np.uint8).reshape(SIDE, SIDE), "P"
    )
    image.putpalette(colour[order].astype(np.uint8).tobytes())
    transparency = alpha[order, 0].astype(np.uint8)
    transparency = transparency[: np.count_nonzero(transparency < 255)]
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, transparency=transparency.tobytes())
    return buffer.getvalue()


def draw_all(
    sources: dict[str, tarfile.TarFile], concepts: list[dict], out: Path
) -> None:
    """Write the picture of every concept by every artist; two concepts must never share a picture."""
    for artist, (folder, suffix) in PICTURES.items():
        members = index(sources[artist], folder, suffix)
        wanted = {members[c["id"]]: c["id"] for c in concepts if artist in c["artists"]}
        (out / artist).mkdir(parents=True)
        seen: dict[bytes, str] = {}
        for member in sources[
            artist
        ]:  # in archive order: seeking in a gzip stream is slow
            if member.name not in wanted:
                continue
            concept = wanted[member.name]
            data = palette_png(drawing(read(sources[artist], member.name), suffix))
            if data in seen:
                sys.exit(f"error: {artist} draws {concept} and {seen[data]} alike")
            seen[data] = concept
            (out / artist / f"{concept}.png").write_bytes(data)


def opaque(data: bytes) -> bool:
    """Return whether a picture has no transparent part."""
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGBA").getchannel("A").getextrema()[0] == 255


def draw_further(
    sources: dict[str, tarfile.TarFile], concepts: list[dict], out: Path
) -> list[dict]:
    """Write what the further artists draw of the concepts; return, by concept, who does.

    A drawing that one artist uses for two things is of neither, and one that fills its square has no background.
    """
    known = {concept["id"] for concept in concepts}
    drawers: dict[str, list[str]] = {concept["id"]: [] for concept in concepts}
    for artist, about in FURTHER.items():
        drawn = emojikb_artists.drawn_by(
            artist, sources[artist], sources["names"], known
        )
        pictures = {
            concept: palette_png(drawing(svg.encode(), ".svg"), about.colours)
            for concept, svg in drawn.items()
        }
        uses = Counter(pictures.values())
        (out / artist).mkdir()
        for concept, data in pictures.items():
            if uses[data] == 1 and not opaque(data):
                (out / artist / f"{concept}.png").write_bytes(data)
                drawers[concept].append(artist)
    return [
        {"id": concept, "artists": artists}
        for concept, artists in drawers.items()
        if artists
    ]


# ---------------------------------------------------------------------------------------------- writing


def dump(path: Path, records: list[dict]) -> None:
    lines = (
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        for record in records
    )
    text = "".join(lines).encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(
            "", "wb", 9, packed, mtime=0
        ) as stream:  # neither name nor time: the same bytes each time
            stream.write(text)
        text = packed.getvalue()
    path.write_bytes(text)


def write_json(path: Path, value: object) -> None:
    path.write_text(
        json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def build(sources: dict[str, tarfile.TarFile], out: Path, errors: Path | None) -> None:
    names = json.loads(read(sources["names"], "package/en/data.json"))
    drawn = [index(sources[artist], *PICTURES[artist]) for artist in ARTISTS]
    labels = {
        e["label"]: code_point(e["hexcode"])
        for e in names
        if all(code_point(e["hexcode"]) in members for members in drawn)
    }
    concepts = things(labels) + flags(
        json.loads(read(sources["countries"], "package/countries.json")), labels
    )
    check_concepts(concepts)
    emojikb_cases.assign(concepts)
    for concept in concepts:
        concept["artists"] = list(FLAG_ARTISTS if "country" in concept else ARTISTS)
    draw_all(sources, concepts, out)
    further = draw_further(sources, concepts, out)
    dump(out / "drawings.jsonl.gz", further)
    first = {artist: LICENCES[artist] for artist in ARTISTS}
    write_json(out / "artists.json", emojikb_artists.records(first, PACKAGES))
    dump(out / "concepts.jsonl.gz", concepts)
    dump(out / "facts.jsonl.gz", emojikb_cases.facts(concepts))
    write_json(out / "templates.json", choices.TEMPLATES)
    write_json(out / "backgrounds.json", choices.BACKGROUNDS)
    splits = {
        split: emojikb_cases.Maker(concepts, split).cases()
        for split in emojikb_cases.SPLITS
    }
    if errors is not None:
        wrong = [json.loads(line) for line in read_text(errors).splitlines()]
        splits["corrections"] = emojikb_cases.Maker(concepts, "eval").corrections(wrong)
        dump(out / ERRORS, wrong)
    for split, cases in splits.items():
        dump(out / f"{split}.jsonl.gz", cases)
    licences(sources, out)
    counts = {
        "concepts": len(concepts),
        "flags": sum("country" in c for c in concepts),
        "pictures": sum(len(c["artists"]) for c in concepts),
        "further pictures": sum(len(c["artists"]) for c in further),
    }
    counts |= {
        split: dict(Counter(case["type"] for case in cases))
        for split, cases in splits.items()
    }
    countries = {concept["id"] for concept in concepts if "country" in concept}
    shares = emojikb_artists.nearest(out, countries)
    text = readme(concepts, splits, further, shares)
    (out / "README.md").write_text(text, encoding="utf-8")
    for artist in (*ARTISTS, *FURTHER):
        pack(out / artist)
        shutil.rmtree(out / artist)
    manifest(out, counts)


def licences(sources: dict[str, tarfile.TarFile], out: Path) -> None:
    (out / "LICENSES").mkdir()
    for name in STATIC:
        shutil.copyfile(DATA / name, out / name)
    (out / "LICENSES" / "ODbL-1.0.txt").write_bytes(
        read(sources["countries"], "package/LICENSE")
    )
    (out / "LICENSES" / "MIT-emojibase.txt").write_bytes(
        read(sources["names"], "package/LICENSE")
    )
    (out / "LICENSES" / "MIT-emoji-data.txt").write_bytes(
        read(sources["noto"], "package/LICENSE")
    )
    share_alike = read(sources["openmoji"], "package/LICENSE.txt")
    for artist in ("openmoji", "emojione-v1"):
        (out / artist / "LICENSE.txt").write_bytes(share_alike)


def further_table(further: list[dict]) -> str:
    """Return the further artists as a Markdown table."""
    counts = Counter(artist for drawn in further for artist in drawn["artists"])
    flags = Counter(
        artist
        for drawn in further
        for artist in drawn["artists"]
        if emojikb_artists.is_country(drawn["id"])
    )
    rows = ["| artist | use | look | pictures | flags |", "|---|---|---|---:|---:|"]
    for name, artist in FURTHER.items():
        cells = (name, artist.use, artist.look, str(counts[name]), str(flags[name]))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def readme(
    concepts: list[dict],
    splits: dict[str, list[dict]],
    further: list[dict],
    shares: dict[str, dict[str, float | None]],
) -> str:
    """Fill the counts into emojikb_readme.md."""
    kinds = Counter(c["category"] for c in concepts)
    types = list(choices.TEMPLATES)
    per = {
        split: Counter(case["type"] for case in cases)
        for split, cases in splits.items()
    }
    rows = [
        f"| {t} | " + " | ".join(str(per[s][t]) for s in splits) + " |" for t in types
    ]
    rows.append(
        "| all | " + " | ".join(f"**{len(cases)}**" for cases in splits.values()) + " |"
    )
    table = "\n".join(
        [
            "| type | " + " | ".join(splits) + " |",
            "|---|" + "---:|" * len(splits),
            *rows,
        ]
    )
    sides = Counter(c["split"] for c in concepts)
    country = [c for c in concepts if "country" in c]
    values = {
        "concepts": f"{len(concepts):,}",
        "flags": len(country),
        "pictures": f"{sum(len(c['artists']) for c in concepts):,}",
        "kinds": len({c["kind"] for c in concepts}),
        "categories": len(kinds),
        "category_counts": ", ".join(
            f"{name} {count}" for name, count in kinds.most_common()
        ),
        "sides": ", ".join(f"{name} {sides[name]}" for name in emojikb_cases.SPLITS),
        "cases": table,
        "known": ", ".join(
            f"{field} {sum(c[field] is not None for c in country)}"
            for field in ("capital", "continent", "currency", "language")
        ),
        "checksums": "\n".join(
            f"| {package.spec} | {licence} | `{package.sha256}` |"
            for package, licence in [
                *((package, LICENCES[key]) for key, package in PACKAGES.items()),
                *((artist.package, artist.licence) for artist in FURTHER.values()),
            ]
        ),
        "further": further_table(further),
        "distances": emojikb_artists.table(shares),
        "nearest_others": "{:.0f} to {:.0f}".format(
            *emojikb_artists.most_of_others(shares)
        ),
        **{
            f"near_{artist}": f"{emojikb_artists.most(shares, artist):.0f}"
            for artist in FURTHER
        },
        "further_pictures": f"{sum(len(c['artists']) for c in further):,}",
    }
    text = (Path(__file__).parent / "emojikb_readme.md").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest and what is unpacked from a zip."""
    found = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in loose(folder)
    }
    found.pop("manifest.json", None)
    return found


def manifest(out: Path, counts: dict) -> None:
    write_json(
        out / "manifest.json",
        {
            "name": "emojikb",
            "sources": {
                key: {
                    "package": package.spec,
                    "licence": LICENCES[key],
                    "sha256": package.sha256,
                }
                for key, package in PACKAGES.items()
            }
            | {
                name: {
                    "package": artist.package.spec,
                    "licence": artist.licence,
                    "sha256": artist.package.sha256,
                }
                for name, artist in FURTHER.items()
            },
            "tools": {
                name: importlib.metadata.version(name)
                for name in ("pillow", "resvg_py", "numpy")
            },
            "counts": counts,
            "files": digests(out),
        },
    )


# ---------------------------------------------------------------------------------------------- contact sheet

SHEET = """red apple; croissant; carrot; fox; owl; octopus; butterfly; sunflower; volcano; castle; bullet train;
    helicopter; rainbow; snowman; teddy bear; guitar; backpack; light bulb; hammer; astronaut; wizard; flag of Peru;
    flag of Japan; flag of Kenya"""


def sheet(path: Path) -> None:
    """Draw 24 concepts by the four artists, each on a background colour, with its name."""
    unpack_beside(DATA)
    by_name = {record["name"]: record for record in concepts_in(DATA)}
    tints = list(choices.BACKGROUNDS.values())
    columns, gap, head, foot = 3, 14, 26, 20
    block = (len(ARTISTS) * SIDE, SIDE + foot)
    names = [" ".join(name.split()) for name in SHEET.split(";")]
    rows = -(-len(names) // columns)
    page = Image.new(
        "RGB",
        (columns * (block[0] + gap) + gap, head + rows * (block[1] + 6) + 6),
        "white",
    )
    pen = ImageDraw.Draw(page)
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    for number, name in enumerate(names):
        left = gap + number % columns * (block[0] + gap)
        top = head + number // columns * (block[1] + 6)
        for place, artist in enumerate(ARTISTS):
            if number < columns:
                pen.text(
                    (left + place * SIDE + SIDE // 2, 13),
                    artist,
                    fill="#666666",
                    font=small,
                    anchor="mm",
                )
            if artist not in by_name[name]["artists"]:
                continue
            picture = Image.open(DATA / artist / f"{by_name[name]['id']}.png").convert(
                "RGBA"
            )
            tile = Image.new(
                "RGBA", picture.size, tints[(number + 3 * place) % len(tints)]
            )
            page.paste(
                Image.alpha_composite(tile, picture).convert("RGB"),
                (left + place * SIDE, top),
            )
        pen.text((left, top + SIDE + 2), name, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help="folder for the npm packages")
    parser.add_argument(
        "--check", action="store_true", help="build into a temporary folder and compare"
    )
    parser.add_argument(
        "--errors",
        type=Path,
        help="JSONL of what a model gets wrong: {picture, type, answer}",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="only draw the contact sheet"
    )
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet)
        return 0
    if args.cache is None:
        parser.error("--cache is needed to build")
    errors = args.errors or (DATA / ERRORS if (DATA / ERRORS).exists() else None)
    sources = fetch(args.cache)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "emojikb"
        out.mkdir()
        build(sources, out, errors)
        new = digests(out) | {
            "manifest.json": hashlib.sha256(
                (out / "manifest.json").read_bytes()
            ).hexdigest()
        }
        old = digests(DATA)
        if (DATA / "manifest.json").exists():
            old["manifest.json"] = hashlib.sha256(
                (DATA / "manifest.json").read_bytes()
            ).hexdigest()
        different = sorted(
            name for name in old.keys() | new.keys() if old.get(name) != new.get(name)
        )
        print(f"{len(new)} files, {len(different)} different", file=sys.stderr)
        if args.check:
            print("\n".join(different[:20]))
            return bool(different)
        for name in different:
            target = DATA / name
            if name in new:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / name, target)
            else:
                target.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
