"""How `mmedit list` looks: the methods by kind, the models, and the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mmedit_cli.catalog import bundled, family_of, named_models, own_image_editors
from mmedit_cli.output import Output

Row = Mapping[str, str]


def catalogue(
    out: Output, methods: Mapping[str, Sequence[Row]], data: Sequence[Row]
) -> None:
    """Print the methods, a table a kind, the models, and where data come from."""
    tables = {**methods, "models": list(_models()), "data": data}

    def show() -> None:
        for rows in tables.values():
            out.table(list(rows[0]), [list(row.values()) for row in rows])

    out.result(tables, show)


def _models() -> Iterator[Row]:
    families = {name: family_of(folder) for name, folder in bundled().items()}
    families |= dict.fromkeys(own_image_editors(), "changes pictures")
    for name, family in families.items():
        yield {
            "model": name,
            "family": family,
            "source": "comes along",
            "summary": "trained on EmojiKB",
        }
    for name, entry in named_models().items():
        yield {
            "model": name,
            "family": entry.family,
            "source": entry.origin,
            "summary": entry.summary,
        }
