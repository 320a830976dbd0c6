"""Runs as records of every-eval-ever, the database of evaluations (evaleval/every_eval_ever, `eval.schema.json`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmedit_cli.output import Output

Json = Mapping[str, Any]
EVERY_EVAL_EVER = "every-eval-ever"
_SCHEMA = "0.2.1"


def print_records(records: Iterable[Json]) -> None:
    """Print records as one JSON list."""
    found = list(records)
    Output(as_json=True).result(found, lambda: None)


def record(
    folder: Path,
    report: Json,
    edits: int,
    scores: Mapping[tuple[str, str], Json],
    **details: str,
) -> dict[str, Any]:
    """Return a run as a record, with its scores after so many edits by protocol and column.

    `details`: what else is said of the edited model.
    """
    model = report["model"]["name"]
    made = str(int((folder / "report.json").stat().st_mtime))
    editor = report["editor"]
    hparams = json.dumps(report["hparams"], sort_keys=True)
    about = {"editor": editor, "edits": str(edits), **details, "hparams": hparams}
    data = report["data"]["name"]
    return {
        "schema_version": _SCHEMA,
        "evaluation_id": f"{data}/{editor}+{model}/{made}",
        "retrieved_timestamp": made,
        "source_metadata": {
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "mmedit", "version": report["versions"]["mmedit"]},
        "model_info": {
            "name": f"{model} edited by {editor}",
            "id": f"{model}+{editor}",
            "additional_details": about,
        },
        "evaluation_results": list(_results(data, scores)),
    }


def _results(
    data: str, scores: Mapping[tuple[str, str], Json]
) -> Iterator[dict[str, Any]]:
    """Yield a result for each score that was measured."""
    source = {"dataset_name": data, "source_type": "other"}
    for (protocol, column), score in scores.items():
        if score["mean"] is None:
            continue
        uncertainty = _uncertainty(score)
        yield {
            "evaluation_name": f"{protocol} {column}",
            "source_data": source,
            "metric_config": {
                "lower_is_better": False,
                "score_type": "continuous",
                "min_score": 0,
                "max_score": 1,
            },
            "score_details": {"score": score["mean"], "uncertainty": uncertainty},
        }


def _uncertainty(score: Json) -> dict[str, Any]:
    known: dict[str, Any] = {"num_samples": score["n"]}
    if score["ci95"] is not None:
        low, high = score["ci95"]
        ends = {"lower": low, "upper": high, "confidence_level": 0.95}
        known["confidence_interval"] = ends
    return known
