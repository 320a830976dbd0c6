"""What a shell may complete: methods, models, data sets and finished runs (`mmedit --install-completion`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def editors(incomplete: str) -> list[str]:
    """Return the methods of all kinds that begin so."""
    from mmedit_cli import registry

    names = list(registry.editors.names())
    names += registry.personalizers.names()
    names += registry.image_editors.names()
    names += registry.concept_editors.names()
    return _beginning(names, incomplete)


def models(incomplete: str) -> list[str]:
    """Return the models that come along or have a name, and begin so."""
    from mmedit_cli.catalog import bundled, named_models, own_image_editors

    names = list(bundled())
    names += own_image_editors()
    names += named_models()
    return _beginning(names, incomplete)


def data(incomplete: str) -> list[str]:
    """Return the data sets that begin so."""
    from mmedit_cli import registry

    return _beginning(registry.datasets.names(), incomplete)


def runs(ctx: Any, incomplete: str) -> list[str]:
    """Return `latest` and the ids of the finished runs of the records that begin so."""
    from mmedit_cli.reports.finding import LATEST, finished_runs

    records = Path(ctx.params.get("records") or "records")
    ids = [folder.name for folder in finished_runs(records)]
    return _beginning([LATEST, *ids], incomplete)


def _beginning(names: Any, incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
