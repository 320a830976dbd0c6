"""EmojiKB's further artists: open sets in iconify's form, joined by code point; some are only ever evaluated on.

    python scripts/emojikb_artists.py          # how far the artists are from each other: the table of the README

The first four artists, whose drawings the cases show, are decided in build_emojikb.py. These came later and change
no case: `artists.json` says what each may be used for, `drawings.jsonl.gz` what each of them draws.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class Package:
    """An npm package, pinned by version and by the digest of its tarball."""

    spec: str
    sha256: str

    @property
    def file(self) -> str:
        """Return the name that `npm pack` gives the tarball."""
        name, _, version = self.spec.rpartition("@")
        return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


@dataclass(frozen=True)
class Artist:
    """A set of drawings: where it comes from, its licence (as its package says), and what it may be used for."""

    package: Package
    licence: str
    use: str
    look: str

    @property
    def colours(self) -> int:
        """Return the size of a picture's palette: flat colours need fewer."""
        return 32 if self.use == TRAINING else 64


FURTHER = {
    "emojione": Artist(
        Package(
            "@iconify-json/emojione@1.2.3",
            "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        ),
        "CC-BY-4.0",
        EVALUATION,
        "flat colours with highlights",
    ),
    "emojione-v1": Artist(
        Package(
            "@iconify-json/emojione-v1@1.2.3",
            "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        ),
        "CC-BY-SA-4.0",
        TRAINING,
        "flat, muted colours; other drawings than emojione's",
    ),
    "fluent-flat": Artist(
        Package(
            "@iconify-json/fluent-emoji-flat@1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "MIT",
        TRAINING,
        "fluent in flat colours",
    ),
    "fluent-line": Artist(
        Package(
            "@iconify-json/fluent-emoji-high-contrast@1.2.6",
            "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        ),
        "MIT",
        TRAINING,
        "fluent in black, without colours",
    ),
    "fxemoji": Artist(
        Package(
            "@iconify-json/fxemoji@1.2.2",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        ),
        "Apache-2.0",
        TRAINING,
        "flat shapes in few colours",
    ),
    "noto-v1": Artist(
        Package(
            "@iconify-json/noto-v1@1.2.5",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        ),
        "Apache-2.0",
        TRAINING,
        "round blobs for faces and people, soft shading, no outlines",
    ),
    "streamline": Artist(
        Package(
            "@iconify-json/streamline-emojis@1.2.4",
            "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        ),
        "CC-BY-4.0",
        EVALUATION,
        "dark outlines with gaps, glossy colours, a shadow below",
    ),
}
FAR_ANYWAY = ("openmoji", "fluent-line")  # far from all, and trained on all the same
BY_SHORTCODE = ("fxemoji",)  # its names are short ones, run together

# Names that mean something else in a set: a ribbon called bow, a sea called wave, the flag of Turkey called turkey.
MISTAKEN = {
    "fxemoji": ("1f3f9", "1f44b", "1f6a7", "1f68b", "2328", "1f621", "1fa9f", "1f3ab"),
    "streamline": ("1f983",),
}

# Names that stand in neither emojibase nor Unicode: those of earlier versions of Unicode's own list.
EARLIER_NAMES = {
    "laptop-computer": "1f4bb",
    "school-backpack": "1f392",
    "hourglass-with-flowing-sand": "23f3",
    "smiling-cat-face-with-heart-eyes": "1f63b",
    "grinning-cat-face-with-smiling-eyes": "1f638",
    "grinning-cat-face": "1f63a",
    "kissing-cat-face": "1f63d",
    "face-with-stuck-out-tongue-and-winking-eye": "1f61c",
    "man-in-suit-levitating": "1f574",
    "flag-turkey": "1f1f9-1f1f7",
    "flag-macedonia": "1f1f2-1f1f0",
    "flag-myanmar": "1f1f2-1f1f2",
    "flag-swaziland": "1f1f8-1f1ff",
    "flag-black-flag": "1f3f4",
    "flag-chequered-flag": "1f3c1",
    "flag-crossed-flags": "1f38c",
    "flag-rainbow-flag": "1f3f3-200d-1f308",
    "flag-triangular-flag": "1f6a9",
    "flag-white-flag": "1f3f3",
}


def code_point(text: str) -> str:
    """Write 1F3F3-FE0F-200D-1F308 as 1f3f3-200d-1f308: all sets agree once the variation selector is gone."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def is_country(code: str) -> bool:
    """Return whether a code point is the flag of a country or territory: two letters of its code."""
    return bool(re.fullmatch("1f1[ef][0-9a-f]-1f1[ef][0-9a-f]", code))


def slug(text: str) -> str:
    """Write a name as iconify does: `Mother's Day & co.` -> `mothers-day-and-co`."""
    text = re.sub("[’'“”.]", "", text.lower()).replace("&", "and")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def _json(package: tarfile.TarFile, name: str) -> Any:
    member = package.extractfile(f"package/{name}")
    assert member is not None, name
    return json.load(member)


def _unicode_names(concepts: Iterable[str]) -> dict[str, str]:
    single = (concept for concept in concepts if "-" not in concept)
    names = ((unicodedata.name(chr(int(c, 16)), ""), c) for c in single)
    return {slug(name): concept for name, concept in names if name}


def code_points_by_name(
    names: tarfile.TarFile, concepts: Iterable[str], *, shortcodes: bool
) -> dict[str, str]:
    """Map the names a set may use to code points; emojibase's label comes before Unicode's and these before others."""
    tables = []
    if shortcodes:
        found: dict[str, str] = {}
        listed = sorted(
            name
            for name in names.getnames()
            if re.fullmatch(r"package/en/shortcodes/\w[\w.-]*\.json", name)
        )
        for name in listed:
            for code, short in _json(names, name.removeprefix("package/")).items():
                for text in [short] if isinstance(short, str) else short:
                    found.setdefault(slug(text), code_point(code))
        tables.append(found)
    tables.append(EARLIER_NAMES)
    tables.append(_unicode_names(concepts))
    labels = _json(names, "en/data.json")
    tables.append({slug(e["label"]): code_point(e["hexcode"]) for e in labels})
    merged: dict[str, str] = {}
    for table in tables:
        merged |= table
    return merged


def drawn_by(
    artist: str, package: tarfile.TarFile, names: tarfile.TarFile, concepts: set[str]
) -> dict[str, str]:
    """Return what an artist draws of our concepts, by code point, as SVG; of a thing with several names the first."""
    icons = _json(package, "icons.json")
    listed = [*icons["icons"], *icons.get("aliases", {})]
    codes = _json(package, "chars.json")
    if codes:
        named = {icon: code_point(code) for code, icon in sorted(codes.items())}
    else:
        short = artist in BY_SHORTCODE
        known = code_points_by_name(names, concepts, shortcodes=short)
        if short:
            known = {name.replace("-", ""): code for name, code in known.items()}
        named = {icon: known.get(_plain(icon), "") for icon in listed}
    found: dict[str, str] = {}
    for icon in listed:
        code = named.get(icon, "")
        mistaken = code in MISTAKEN.get(artist, ())
        if code in concepts and code not in found and not mistaken:
            found[code] = _svg(icons, icon)
    return found


def _plain(icon: str) -> str:
    """Strip what iconify adds: `flag-for-flag-peru` -> `flag-peru`, `baby-1` (the first of several) -> `baby`."""
    return re.sub("^flag-for-(flag-)?", "flag-", icon).removesuffix("-1")


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = dict(icons["icons"].get(name) or {})
    if not icon:
        alias = icons["aliases"][name]
        icon = icons["icons"][alias["parent"]] | alias
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    size = f'width="{width}" height="{height}"'
    return f'<svg {spaces} viewBox="{box}" {size}>{icon["body"]}</svg>'


def records(
    licences: dict[str, str], packages: dict[str, Package]
) -> dict[str, dict[str, str]]:
    """Return what `artists.json` holds: the first four artists, then the further ones."""
    first = {
        name: {"use": TRAINING, "licence": licence, "package": packages[name].spec}
        for name, licence in licences.items()
    }
    further = {
        name: {
            "use": artist.use,
            "licence": artist.licence,
            "package": artist.package.spec,
            "look": artist.look,
        }
        for name, artist in FURTHER.items()
    }
    return first | further


# ---------------------------------------------------------------------------------------------- how far apart they are


def nearest(folder: Path, flags: set[str]) -> dict[str, dict[str, float | None]]:
    """Return, by artist and other artist, of how many drawings in % the most similar one is of the same thing.

    Drawings are cut to what is drawn, put on white, and compared as 16x16 pixels with alpha. Flags are left out.
    """
    import numpy as np
    from PIL import Image

    def seen(path: Path) -> np.ndarray:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
        alpha = picture.getchannel("A")
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        white.putalpha(alpha)
        box = alpha.point(lambda value: 255 * (value > 25)).getbbox()
        small = white.crop(box).resize((16, 16), Image.Resampling.BOX)
        return np.asarray(small).reshape(-1).astype(np.float64) / 255

    artists = json.loads((folder / "artists.json").read_text(encoding="utf-8"))
    drawn = {
        artist: {
            path.stem: seen(path)
            for path in sorted((folder / artist).glob("*.png"))
            if path.stem not in flags
        }
        for artist in artists
    }
    shares: dict[str, dict[str, float | None]] = {}
    for artist, mine in drawn.items():
        shares[artist] = {}
        for other, theirs in drawn.items():
            both = [concept for concept in mine if concept in theirs]
            if artist == other or not both:
                shares[artist][other] = None
                continue
            gallery, names = np.stack(list(theirs.values())), list(theirs)
            asked = np.stack([mine[concept] for concept in both])
            distance = (gallery**2).sum(1) - 2 * asked @ gallery.T
            found = [names[place] for place in distance.argmin(1)]
            right = sum(a == b for a, b in zip(found, both, strict=True))
            shares[artist][other] = 100 * right / len(both)
    return shares


def table(shares: dict[str, dict[str, float | None]]) -> str:
    """Return the shares as a Markdown table."""
    lines = [
        "| | " + " | ".join(shares) + " |",
        "|---|" + "---:|" * len(shares),
    ]
    for artist, row in shares.items():
        cells = ("" if share is None else f"{share:.0f}" for share in row.values())
        lines.append(f"| {artist} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def most(shares: dict[str, dict[str, float | None]], artist: str) -> float:
    """Return the largest share that an artist has with one that may be trained on."""
    trained = (
        share
        for other, share in shares[artist].items()
        if share is not None
        and (other not in FURTHER or FURTHER[other].use == TRAINING)
    )
    return max(trained)


def most_of_others(shares: dict[str, dict[str, float | None]]) -> tuple[float, float]:
    """Return the smallest and the largest of the shares of those that may be trained on, without the two far ones."""
    trained = {
        artist: most(shares, artist)
        for artist in shares
        if artist not in FURTHER or FURTHER[artist].use == TRAINING
    }
    near = [trained[artist] for artist in trained if artist not in FAR_ANYWAY]
    return min(near), max(near)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from mmedit_cli.knowledge.data.emojikb import concepts_in
    from mmedit_cli.registry import emojikb_dir

    folder = emojikb_dir()
    flags = {c["id"] for c in concepts_in(folder) if "country" in c}
    print(table(nearest(folder, flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
