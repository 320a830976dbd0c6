"""The sequential protocol: what is asked when, what is cached, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, fork, needs_fork

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge import loading
from mmedit_cli.knowledge.data.base import load_cases
from mmedit_cli.knowledge.evaluation import protocol as sequential
from mmedit_cli.knowledge.evaluation.answers import Answer, ask
from mmedit_cli.knowledge.evaluation.protocol import (
    Protocol,
    evaluate_edits,
    score_case,
)
from mmedit_cli.knowledge.evaluation.report import build_report
from mmedit_cli.knowledge.evaluation.sharing import Conditions
from mmedit_cli.knowledge.methods.base import Editor
from mmedit_cli.knowledge.methods.ft import Ft, FtHparams
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.knowledge.workflow import evaluation
from mmedit_cli.output import Output
from mmedit_cli.records import Run
from mmedit_cli.types import EditCase, Query

CASES = load_cases(SHAPES)


def evaluate(folder: Path, editor: Editor, protocol: Protocol, cases=CASES) -> dict:
    with Run.open(folder, {}, {}) as run:
        evaluate_edits(editor, cases, run, protocol)
        return build_report(
            {}, run.read("cases"), run.read("edits"), protocol.sequential
        )


class Perfect(Editor):
    """Says the target of everything it was told, and leaves the rest alone: what a perfect editor would score."""

    name, Hparams, first_layer = "perfect", FtHparams, None

    def _apply(self, requests, source):
        return {}

    def _reset(self):
        pass

    def _tensors(self):
        return {"nothing": torch.zeros(1)}

    def _load_tensors(self, tensors):
        pass


def test_milestones_are_unions_of_whole_chunks():
    protocol = Protocol(sequential=100, report_at=(1, 10, 70), chunk=32)
    assert protocol.milestones(100) == [1, 10, 70, 100]
    assert protocol.milestones(40) == [1, 10, 40]
    chunks = protocol.chunks(100)
    assert [i for chunk in chunks for i in chunk] == list(range(100))
    assert {1, 10, 70, 100} <= {chunk.stop for chunk in chunks}
    assert max(map(len, chunks)) <= 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequential": 0}, "--sequential 0: must be at least 1"),
        ({"sequential": 4, "report_at": (5,)}, "--report-at 5"),
        ({"protocols": ("ar", "x")}, "--protocols x"),
        ({"protocols": ()}, "--protocols is empty"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Protocol(**values)


def test_an_editor_that_does_nothing_keeps_every_locality(backbone, tmp_path):
    report = evaluate(
        tmp_path,
        Perfect(backbone, FtHparams()),
        Protocol(sequential=4, report_at=(1,), max_new_tokens=3),
        CASES[:4],
    )
    for milestone in report["milestones"]:
        for scores in milestone["scores"].values():
            for column, score in scores.items():
                if column.startswith("locality."):
                    assert score["mean"] == 1, column
                elif "before" in score:
                    assert score["mean"] == score["before"]
    assert report["retention"]["ar"]["backward_transfer"] == 0


def test_answers_that_are_all_right_score_one(backbone):
    case = CASES[0]
    queries = [q for _, qs in case.columns() for q in qs]
    before = ask(
        backbone,
        queries,
        layer=0,
        top=Protocol().top([case]),
        max_new_tokens=4,
        batch_size=8,
    )
    after = {
        q: type(a)(q.target, a.wanted, a.wanted, a.top)
        if q not in [x for xs in case.locality.values() for x in xs]
        else a
        for q, a in before.items()
    }
    scores = score_case(case, before, after, Protocol().protocols)["scores"]
    assert all(value == 1 for columns in scores.values() for value in columns.values())
    assert len(scores) == 6


def test_the_last_shorter_group_is_kept_and_marked(backbone, tmp_path):
    report = evaluate(
        tmp_path,
        Ft(backbone, FtHparams(steps=1)),
        Protocol(sequential=3, report_at=(1,), protocols=("tf_em",)),
        CASES[:4],
    )
    assert [
        (m["edits"], m["cases"], m["short_group"]) for m in report["milestones"]
    ] == [
        (1, 1, False),
        (1, 1, True),
        (3, 3, False),
    ]
    report = evaluate(
        tmp_path / "b",
        Ft(backbone, FtHparams(steps=1)),
        Protocol(sequential=3, protocols=("tf_em",)),
        CASES[:5],
    )
    assert [
        (m["edits"], m["cases"], m["short_group"]) for m in report["milestones"]
    ] == [(2, 2, True), (3, 3, False)]


def test_every_distinct_image_and_sequence_is_computed_once(backbone, monkeypatch):
    encoded, prefixed = [], []
    real_encode, real_prefix = backbone.image_features, backbone._compute_prefix
    monkeypatch.setattr(
        backbone, "image_features", lambda ps: encoded.extend(ps) or real_encode(ps)
    )
    monkeypatch.setattr(
        backbone,
        "_compute_prefix",
        lambda b, *a: prefixed.extend(b.queries) or real_prefix(b, *a),
    )
    queries = [q for case in CASES for _, qs in case.columns() for q in qs]
    with backbone.cached_activations(3, queries, group=8, budget=1 << 30):
        answers = ask(
            backbone, queries, layer=3, top={}, max_new_tokens=3, batch_size=8
        )
        assert len(encoded) == len(set(encoded)) == 72
        assert len(prefixed) == len(set(prefixed)) == len(set(queries)) == len(answers)
        ask(backbone, queries[::-1], layer=3, top={}, max_new_tokens=3, batch_size=5)
        assert len(prefixed) == len(set(queries))


def test_cached_equals_uncached_and_spilled_equals_kept(backbone):
    queries = [q for case in CASES[:6] for _, qs in case.columns() for q in qs]
    options = {"top": Protocol().top(CASES[:6]), "max_new_tokens": 4, "batch_size": 8}
    plain = ask(backbone, queries, layer=0, **options)
    for budget in (1 << 30, 1 << 14):
        with backbone.cached_activations(4, queries, group=8, budget=budget):
            for _ in range(2):
                cached = ask(backbone, queries, layer=4, **options)
                assert [(a.text, a.said, a.wanted) for a in cached.values()] == [
                    (a.text, a.said, a.wanted) for a in plain.values()
                ]
                assert all(
                    torch.equal(cached[q].top, plain[q].top)
                    for q in plain
                    if plain[q].top is not None
                )


def test_an_answer_that_the_forced_pass_proves_is_not_generated(backbone, monkeypatch):
    """After an edit that holds, the forced pass shows what greedy decoding says: the text is the same."""
    request = CASES[0].request
    length = backbone.encode(
        request
    ).n_answer  # a random model does not stop by itself: stop it there
    bare = Query(request.prompt, "", request.image, request.background)
    with Ft(backbone, FtHparams(learning_rate=1e-2)).edit([request]):
        (said,) = backbone.generate([bare], max_new_tokens=length)
        monkeypatch.setattr(backbone, "generate", None)
        (answer,) = ask(
            backbone, [request], layer=2, top={}, max_new_tokens=length, batch_size=4
        ).values()
        assert answer.text == said == request.target
        with pytest.raises(
            TypeError
        ):  # it does not stop after that, so with more room it is not proved
            ask(
                backbone,
                [request],
                layer=2,
                top={},
                max_new_tokens=length + 1,
                batch_size=4,
            )


def test_nothing_is_proved_where_question_and_answer_share_a_token(
    backbone, monkeypatch
):
    """The forced pass starts behind the question as it is read with its answer; free decoding behind it alone."""
    request = CASES[0].request
    encode, length = backbone.encode, backbone.encode(request).n_answer

    def merged(query, *, with_answer=True):
        encoded = encode(query, with_answer=with_answer)
        return encoded if with_answer else replace(encoded, ids=encoded.ids[:-1])

    options = {"top": {}, "max_new_tokens": length, "batch_size": 4}
    with Ft(backbone, FtHparams(learning_rate=1e-2)).edit([request]):
        monkeypatch.setattr(backbone, "encode", merged)
        monkeypatch.setattr(backbone, "generate", lambda *_, **__: ["generated"])
        (answer,) = ask(backbone, [request], layer=2, **options).values()
    assert answer.said == answer.wanted
    assert answer.text == "generated"


def test_base_answers_are_shared_and_taken_before_the_first_edit(tmp_path, backbone):
    protocol = Protocol(sequential=4, report_at=(2,), max_new_tokens=3)
    shared = tmp_path / "base"
    for name in "ab":
        editor = Ft(backbone, FtHparams(learning_rate=1e-2, steps=5))
        with Run.open(tmp_path / name, {}, {}) as run:
            evaluate_edits(editor, CASES[:4], run, protocol, Conditions(shared))
        times = {path.name: path.stat().st_mtime_ns for path in shared.iterdir()}
        if name == "a":
            first = times
    assert times == first
    assert sorted(first) == ["0-2.safetensors", "2-4.safetensors"]
    (shared / "0-2.safetensors").write_bytes(b"damaged")  # then they are asked again
    with Run.open(tmp_path / "c", {}, {}) as run:
        evaluate_edits(
            Ft(backbone, FtHparams(learning_rate=1e-2, steps=5)),
            CASES[:4],
            run,
            protocol,
            Conditions(shared),
        )
        again = run.read("cases")
    with Run.open(tmp_path / "a", {}, {}) as run:
        assert run.read("cases") == again


def test_batch_edits_stop_at_milestones(tmp_path, backbone):
    protocol = Protocol(
        sequential=6, report_at=(1,), edit_batch=4, protocols=("tf_em",)
    )
    editor, made = Ft(backbone, FtHparams(steps=1)), []
    real = editor.edit
    editor.edit = lambda requests: made.append(len(requests)) or real(requests)
    evaluate(tmp_path, editor, protocol, CASES[:6])
    assert made == [1, 4, 1]


# -- resuming ---------------------------------------------------------------------------------------------------


FORCED = ("tf_easyedit", "tf_em")


def options(
    records: Path, protocols: tuple[str, ...] = FORCED
) -> evaluation.EvalOptions:
    """Two groups of four edits, asked after the first and the last: 10 lines of cases, 1 or 2 of them at a time."""
    return evaluation.EvalOptions(
        "ft",
        loading.ModelOptions("tiny-blip2", device="cpu"),
        str(SHAPES),
        Protocol(sequential=4, report_at=(1,), chunk=2, protocols=protocols),
        limit=8,
        overrides=("steps=5",),
        records=records,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the report of an evaluation that nothing interrupts: `whole(protocols)`."""

    @cache
    def evaluated(protocols: tuple[str, ...]) -> tuple[Path, dict]:
        request = options(tmp_path_factory.mktemp("whole"), protocols)
        report = evaluation.evaluate(request, Output(as_json=True))
        return evaluation.plan_evaluation(request).folder, report

    return evaluated


def comparable(report: dict) -> str:
    return json.dumps({key: value for key, value in report.items() if key != "cost"})


def lines(folder: Path, name: str) -> int:
    path = folder / f"{name}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_and_kill(request: evaluation.EvalOptions, name: str, count: int) -> bool:
    """Run the evaluation in another process, which is killed for good; return whether that came in time.

    It dies when `name` was written: the plan, the state of the editor for the `count`-th time, or `count` lines.
    """
    folder = evaluation.plan_evaluation(request).folder
    method = {"run": "prepare", "editor": "save_tensors"}.get(name, "append")
    write, written = getattr(Run, method), []

    def write_and_die(run, *what, **options):
        found = write(run, *what, **options)
        written.append(name)
        done = lines(folder, name) if method == "append" else len(written)
        if done >= count:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def run():
        setattr(Run, method, write_and_die)
        evaluation.evaluate(request, Output(as_json=True))

    _, status = os.waitpid(fork(run), 0)
    return os.WIFSIGNALED(status)


MOMENTS = (
    [("run", 1)],
    [("edits", 1), ("edits", 3), ("edits", 4)],
    [("cases", 2), ("cases", 5), ("edits", 6), ("cases", 8)],
)
ALONE = ([("edits", 1)], [("cases", 1)])  # others have them among theirs
WAITS = (0.0, 30.0)


@needs_fork
@pytest.mark.parametrize(
    ("seconds", "protocols", "moments"),
    [
        *((wait, FORCED, moments) for wait in WAITS for moments in MOMENTS),
        *(
            pytest.param(wait, FORCED, moments, marks=pytest.mark.slow)
            for wait in WAITS
            for moments in ALONE
        ),
        (0.0, FORCED, [("editor", 1), ("editor", 2)]),
        (30.0, ("ar_em", *FORCED), [("cases", 3)]),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    whole, tmp_path, monkeypatch, seconds, protocols, moments
):
    """With the state of the editor saved after every edit, and with edits that are made again."""
    monkeypatch.setattr(sequential, "SAVE_SECONDS", seconds)
    request = options(tmp_path, protocols)
    folder = evaluation.plan_evaluation(request).folder
    for moment in moments:
        assert run_and_kill(request, *moment), "finished before it could be killed"
        assert not (folder / "report.json").exists()
    resumed = evaluation.evaluate(request, Output(as_json=True))
    uninterrupted, expected = whole(protocols)
    assert comparable(resumed) == comparable(expected)
    theirs = (uninterrupted / "cases.jsonl").read_bytes()
    assert (folder / "cases.jsonl").read_bytes() == theirs
    assert evaluation.evaluate(request, Output(as_json=True)) == resumed


@needs_fork
def test_the_report_counts_every_edit_and_question_after_resuming(whole, tmp_path):
    _, expected = whole(FORCED)
    request = options(tmp_path)
    assert run_and_kill(request, "cases", 8)
    cost = evaluation.evaluate(request, Output())["cost"]
    assert cost["edits"] == 8
    assert cost["asked"]["questions"] >= expected["cost"]["asked"]["questions"] > 0
    assert cost["asked"]["seconds"] > 0


def test_an_equal_evaluation_that_ends_meanwhile_keeps_its_report(
    tmp_path, monkeypatch, capsys
):
    request = options(tmp_path)
    load, reports = loading.load_model, []

    def slowly(*arguments):
        monkeypatch.setattr(evaluation, "load_model", load)
        reports.append(
            evaluation.evaluate(request, Output())
        )  # the other command, from beginning to end
        return load(*arguments)

    monkeypatch.setattr(evaluation, "load_model", slowly)
    reports.append(evaluation.evaluate(request, Output()))
    assert reports[0] == reports[1]
    assert reports[0]["cost"]["asked"]["questions"] > 0
    assert "already done" in capsys.readouterr().err


def test_a_plan_with_another_seed_or_value_is_another_run(tmp_path):
    usual = replace(options(tmp_path), overrides=(), limit=None)
    plans = [
        evaluation.plan_evaluation(replace(usual, **change)).folder
        for change in (
            {},
            {"seed": 1},
            {"overrides": ("steps=3",)},
            {"limit": 20},
            {"overrides": ("steps=50",)},
        )
    ]
    assert len(set(plans)) == 4
    assert plans[0] == plans[4], "the default said aloud is the same run"
    assert not tmp_path.joinpath("eval").exists(), "planning writes nothing"


def test_the_model_is_as_before_after_an_evaluation(backbone, tmp_path):
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    evaluate(
        tmp_path,
        Ft(backbone, FtHparams(steps=2)),
        Protocol(sequential=2, max_new_tokens=3),
        CASES[:3],
    )
    assert all(
        torch.equal(before[k], v) for k, v in backbone.model.state_dict().items()
    )


def test_the_published_teacher_forced_report(golden, tmp_path):
    """Base-model columns of tf_liveedit on the golden model: accuracy by hand from the recorded arg-max."""
    from safetensors.torch import load_file

    folder = golden / "liveedit_blip2"
    facts = json.loads((folder / "liveedit_blip2.json").read_text())
    tensors = load_file(folder / "liveedit_blip2.safetensors")
    backbone = load_backbone(str(folder / "model"), device="cpu")
    for query in facts["queries"]:
        key = f"record{query['record']}.{query['query']}"
        asked = Query(
            query["prompt"],
            query["target_as_given"],
            folder / query["image"] if query["image"] else None,
        )
        answer = ask(
            backbone, [asked], layer=0, top={}, max_new_tokens=0, batch_size=1
        )[asked]
        assert list(answer.said) == tensors[f"{key}.base_argmax"].tolist()
        scores = score_case(
            EditCase("x", asked), {asked: answer}, {asked: answer}, ["tf_liveedit"]
        )["scores"]
        expected = (
            (tensors[f"{key}.base_argmax"] == tensors[f"{key}.answer_ids"])
            .float()
            .mean()
            .item()
        )
        assert scores["tf_liveedit"]["reliability"] == pytest.approx(expected)


def test_a_hop_counts_as_known_where_the_untouched_model_knows_its_facts():
    hop, fact = Query("Its capital?", "Lima"), Query("The capital of Peru?", "Lima")
    case = EditCase(
        "x",
        Query("Whose flag?", "Peru"),
        portability={"1-hop": (hop,)},
        needs={"1-hop": (fact,)},
    )
    wrong, right = Answer(None, (1,), (2,)), Answer(None, (2,), (2,))
    for knows in (True, False):
        before = {case.request: wrong, hop: wrong, fact: right if knows else wrong}
        scored = score_case(case, before, {**before, hop: right}, ("tf_em",))
        columns = [
            "reliability",
            "portability.1-hop",
            *(["portability.1-hop known"] if knows else []),
        ]
        assert (
            list(scored["scores"]["tf_em"]) == list(scored["base"]["tf_em"]) == columns
        )
        assert {scored["scores"]["tf_em"][c] for c in columns[1:]} == {1.0}


def test_all_tokens_must_be_right_for_an_exact_match():
    request = Query("Which country?", "Peru")
    answer = Answer(None, (1, 2), (1, 3))
    case, answers = EditCase("x", request), {request: answer}
    scores = score_case(case, answers, answers, ("tf_em", "tf_liveedit"))["scores"]
    assert scores["tf_em"]["reliability"] == 0
    assert scores["tf_liveedit"]["reliability"] == 0.5


def test_a_hop_of_two_facts_is_known_where_both_are():
    hop = Query("Its capital?", "Lima")
    facts = (Query("Whose flag?", "Peru"), Query("The capital of Peru?", "Lima"))
    case = EditCase(
        "x",
        Query("Which country?", "Peru"),
        portability={"2-hop": (hop,)},
        needs={"2-hop": facts},
    )
    wrong, right = Answer(None, (1,), (2,)), Answer(None, (2,), (2,))
    before = {case.request: wrong, hop: wrong, facts[0]: right, facts[1]: wrong}
    scored = score_case(case, before, before, ("tf_em",))
    assert list(scored["scores"]["tf_em"]) == ["reliability", "portability.2-hop"]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # one may come within a destructor
def test_an_interrupt_is_never_taken_for_a_damaged_file(tmp_path):
    """Whenever Ctrl-C comes while stored answers are read, it arrives as what it is."""
    cases = [EditCase("a", Query("q", "t"), {"text": (Query("p", "t"),)}, {}, {})]
    answers = {
        query: Answer("t", (1, 2), (1, 2), torch.zeros(4, 10))
        for query in sequential.distinct_queries(cases)
    }
    path = tmp_path / "base.safetensors"
    sequential._write_answers(path, cases, answers)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before, came = signal.signal(signal.SIGALRM, stop), 0
    try:
        for turn in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + turn * 3e-7)
                found = sequential._read_answers(path, cases)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                came += 1
            else:
                assert found is not None
                assert found.keys() == answers.keys()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came > 20
