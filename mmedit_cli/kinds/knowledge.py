"""Editors of knowledge on the command line: what `eval`, `edit`, `train-editor` and `edits` do with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmedit_cli import options, registry
from mmedit_cli.commands import completion
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.kinds.base import Kind, Noun
from mmedit_cli.output import Output

if TYPE_CHECKING:
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.data.shared.audit import Finding
    from mmedit_cli.types import EditCase


def evaluate(
    context: typer.Context,
    editor: Annotated[
        str | None,
        typer.Argument(
            metavar="[EDITOR]",
            autocompletion=completion.editors,
            help="A method of `mmedit list`; without one, the editor that comes trained.",
        ),
    ] = None,
    config: options.RunFile = None,
    edited: Annotated[
        Path | None,
        typer.Option(
            help="Instead of an editor: the folder of a model that was edited elsewhere. All cases are its edits.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    data: options.Data = "emojikb",
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    subset: options.Subset = "",
    skip_missing: options.SkipMissing = False,
    skip_long: options.SkipLong = False,
    sequential: Annotated[
        int,
        typer.Option(
            "--sequential", "-n", help="Edits in a row before asking about all."
        ),
    ] = 1,
    report_at: Annotated[
        str | None,
        typer.Option(
            help="Also ask after so many edits. [default: 1, 10, 100, ... below --sequential]",
            show_default=False,
        ),
    ] = None,
    edit_batch: Annotated[int, typer.Option(help="Edits made in one operation.")] = 1,
    protocols: Annotated[
        str, typer.Option(help="Of ar, ar_em, ar_f1, tf_liveedit, tf_easyedit, tf_em.")
    ] = "ar,tf_liveedit,tf_easyedit,tf_em",
    limit: options.Limit = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Longest generated answer, or more where a target needs it."),
    ] = 16,
    batch_size: Annotated[int, typer.Option(help="Queries in one forward pass.")] = 32,
    cache_gib: options.CacheGib = 2.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    seed: options.Seed = 0,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Several seeds, a run each: 0,1,2. The report has the spread over runs.",
            show_default=False,
        ),
    ] = None,
    orders: Annotated[
        int,
        typer.Option(help="Orders of the cases, a run each: that of the data first."),
    ] = 1,
    intervals_by: Annotated[
        str | None,
        typer.Option(
            help="What is independent: concept or case. [default: concept where the data name them]",
            show_default=False,
        ),
    ] = None,
    ability: Annotated[
        bool,
        typer.Option(
            "--ability",
            help="Also measure what no edit is about: the perplexity of a text, and facts about the world.",
        ),
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Edit, ask, and report: after 1 edit or after 1,000. The same command again continues, or shows the report.

    Under `accelerate launch` or `torchrun` several processes share the questions.

    Examples:

      mmedit eval --sequential 1000

      mmedit eval ft --model tiny-blip2 --data tests/data/shapes --sequential 8 --report-at 1,8

      mmedit eval ft --data evqa --root easy-edit-mm --images coco --subset clean --limit 1000 --sequential 1000

      mmedit eval liveedit --sequential 100 --limit 200 --seeds 0,1,2 --orders 3

      mmedit eval --edited edited-model --model mini-blip2 --data my_facts.csv

      mmedit eval --config records/eval/ft/mini-blip2/emojikb/0123456789ab/run.yaml --records again
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.evaluation.protocol import Protocol, milestones
    from mmedit_cli.knowledge.trained_networks import default_editor
    from mmedit_cli.knowledge.workflow import evaluation, repeated
    from mmedit_cli.reports import show

    out = options.output_of_process(as_json)
    if edited is not None:
        _refuse_of_an_editor(context)
        editor = evaluation.ELSEWHERE
    if report_at is None:
        asked_after = milestones(sequential)
    else:
        asked_after = tuple(sorted(options.numbers(report_at, "--report-at")))
    names = [name.strip() for name in protocols.split(",")]
    protocol = Protocol(
        sequential,
        asked_after,
        edit_batch,
        tuple(dict.fromkeys(name for name in names if name)),
        max_new_tokens,
        batch_size,
        cache_bytes=options.cache_bytes(cache_gib),
    )
    if editor is None:
        editor, model = default_editor(records, model, checkpoint)
        out.note(f"no EDITOR: {editor} on {model}")
    request = evaluation.EvalOptions(
        editor,
        loading.ModelOptions(
            options.named(model, out), device, dtype, device_map, revision
        ),
        data,
        protocol,
        DataOptions(root, images, template, subset, skip_missing, skip_long),
        hparams,
        overrides=tuple(overrides or ()),
        checkpoint=checkpoint,
        limit=limit,
        seed=seed,
        records=records,
        force=force,
        intervals_by=intervals_by,
        ability=ability,
        edited=edited,
    )
    repetitions = repeated.Repetitions(_seeds(seed, seeds), orders)
    if dry_run:
        show.plan(out, repeated.described(request, repetitions))
    else:
        show.report(out, repeated.evaluate_repeatedly(request, repetitions, out))


def _refuse_of_an_editor(context: typer.Context) -> None:
    """Raise UserError for what was given beside --edited and means something for editors alone."""
    from mmedit_cli.knowledge.workflow.run_file import OF_AN_EDITOR

    given = []
    for param in context.command.params:
        spelled = param.opts[0].removeprefix("--").replace("-", "_")
        source = context.get_parameter_source(str(param.name))
        on_the_line = source is not None and source.name == "COMMANDLINE"
        if on_the_line and spelled in (*OF_AN_EDITOR, "seeds", "orders"):
            given.append(param.opts[0])
    if given:
        raise UserError(
            f"--edited and {', '.join(given)}: the edits are made already",
            "leave the latter out",
        )


def _seeds(seed: int, several: str | None) -> tuple[int, ...]:
    """Return the seeds of the runs; raise UserError for --seeds that cannot be read, or beside --seed."""
    if several is None:
        return (seed,)
    if seed:
        raise UserError(f"--seed {seed} and --seeds {several}: give one of the two")
    return options.numbers(several, "--seeds", example="0,1,2", once=False)


def train(
    editor: options.Editor,
    model: options.Model = None,
    data: options.Data = "emojikb",
    validation: options.Validation = None,
    root: options.Root = None,
    images: options.Images = None,
    template: options.Template = "",
    skip_missing: options.SkipMissing = False,
    limit: options.Limit = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Queries in one frozen forward pass.")
    ] = 32,
    cache_gib: options.CacheGib = 4.0,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    force: options.Force = False,
    tensorboard: options.Tensorboard = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train the networks of an editor for a model. The same command again continues where it stopped.

    A named data set is trained on its train split; its val split chooses the checkpoint. `--checkpoint latest`, or the
    id of the run, lets `mmedit eval` and `edit` answer with what was trained. Under `accelerate launch` or `torchrun`
    several processes train together.

    Examples:

      mmedit train-editor liveedit --model mini-blip2

      mmedit train-editor liveedit --model mini-llava --set training.steps=1000 --records my-records
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.workflow import training
    from mmedit_cli.reports.knowledge import print_training

    out = options.output_of_process(as_json)
    request = training.EditorTrainingOptions(
        editor,
        loading.ModelOptions(
            options.named(model, out), device, dtype, device_map, revision
        ),
        data,
        validation=validation,
        data_options=DataOptions(root, images, template, skip_missing=skip_missing),
        hparams=hparams,
        overrides=tuple(overrides or ()),
        limit=limit,
        batch_size=batch_size,
        cache_bytes=options.cache_bytes(cache_gib),
        seed=seed,
        records=records,
        force=force,
        tensorboard=tensorboard,
    )
    print_training(out, training.train(request, out))


def edit(
    editor: Annotated[
        str | None,
        typer.Argument(
            metavar="[EDITOR]",
            autocompletion=completion.editors,
            help="A method of `mmedit list`; without one, what suits the facts and the model.",
        ),
    ] = None,
    into: Annotated[
        Path,
        typer.Option(
            "--into",
            "--edits",
            help="The folder to keep it in: it is begun, or added to.",
        ),
    ] = Path("my-edits"),
    image: options.Image = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The answer to be given from now on.", show_default=False),
    ] = None,
    rephrase: Annotated[
        list[str] | None,
        typer.Option(
            help="The question in other words, asked before and after; repeatable.",
            show_default=False,
        ),
    ] = None,
    background: Annotated[
        str, typer.Option(help="Colour behind transparent parts of the picture.")
    ] = "#ffffff",
    requests: Annotated[
        Path | None,
        typer.Option(
            help="Many facts: .csv, .tsv, .json or .jsonl; see docs/data.md.",
            show_default=False,
        ),
    ] = None,
    images: options.Images = None,
    skip_missing: options.SkipMissing = False,
    edit_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Edits an operation. [default: 1, or 32 where independent]",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    hparams: options.HparamsFile = None,
    overrides: options.Overrides = None,
    checkpoint: options.Checkpoint = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of everything random. [default: 0]", show_default=False
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    records: options.Records = Path("records"),
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Teach a model new answers; show what that did, and keep the edits in a ledger. Again: adds to it.

    Without EDITOR one is chosen by the facts and the model, and a single fact is also asked in other words and with
    its picture changed, before and after. Where none of the new answers is given the exit code is 1.

    Examples:

      mmedit edit --image cat.png --prompt "What is this?" --target "a lynx" --rephrase "Which animal is it?"

      mmedit edit liveedit --image cat.png --prompt "What is this?" --target "a lynx" --into my-edits

      mmedit edit multi-melo --model llava-1.5-7b --requests my_facts.csv --into my-facts

      mmedit ask --edits my-edits --image cat.png "What is this?"

      mmedit edits undo my-edits last
    """
    from mmedit_cli.knowledge import loading
    from mmedit_cli.knowledge.data.base import DataOptions
    from mmedit_cli.knowledge.ledger.edited_model import EditOptions
    from mmedit_cli.knowledge.ledger.ledger import Ledger
    from mmedit_cli.knowledge.workflow import (
        asking_otherwise,
        choosing,
        editing,
        evaluation,
    )
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    if requests is not None:
        _refuse_beside_a_file(image, prompt, target, rephrase)
        where = DataOptions(images=images, skip_missing=skip_missing)
        facts = editing.read_facts(requests, where)
    else:
        if images is not None:
            raise UserError("--images: is for the pictures of --requests")
        facts = [_one_fact(image, prompt, target, background, rephrase)]
    named = (model or "") if Ledger.exists(into) else options.named(model, out)
    chosen_model = loading.ModelOptions(named, device, dtype, device_map, revision)
    choice = None
    if editor is None:
        choice = choosing.choose_editor(into, facts, chosen_model, records, checkpoint)
        editor, checkpoint = choice.editor, choice.checkpoint
        out.note(f"no EDITOR: {choice.editor}, as {choice.why}")
    evaluation.check_facts(registry.editors.get(editor), facts)
    request = EditOptions(
        editor,
        chosen_model,
        hparams=hparams,
        overrides=tuple(overrides or ()),
        checkpoint=checkpoint,
        seed=seed,
        records=records,
    )
    ways = asking_otherwise.given_ways(facts)
    if requests is None and (choice is not None or rephrase):
        ways += asking_otherwise.own_ways(facts[0].request)
    queries = [fact.request for fact in facts]
    report = editing.make_edits(into, request, queries, edit_batch, out, ways)
    report["chosen"] = None if choice is None else choice.why
    report["advice"] = edit_tables.way_out(report)
    edit_tables.made(out, report)
    if not any(made["holds"] for made in report["edits"]):
        raise MmeditError(*edit_tables.advice(report))


def _refuse_beside_a_file(
    image: Path | None,
    prompt: str | None,
    target: str | None,
    rephrase: Sequence[str] | None,
) -> None:
    """Raise UserError for parts of a fact that were given beside --requests."""
    one = {
        "--image": image,
        "--prompt": prompt,
        "--target": target,
        "--rephrase": rephrase,
    }
    given = [name for name, value in one.items() if value]
    if given:
        raise UserError(
            f"--requests and {given[0]}: one fact, or a file of them",
            "leave one of the two out",
        )


def _one_fact(
    image: Path | None,
    prompt: str | None,
    target: str | None,
    background: str,
    rephrase: Sequence[str] | None,
) -> EditCase:
    """Return the fact that the options say; raise UserError if they do not say one."""
    from mmedit_cli.types import EditCase, Query

    if prompt is None or target is None:
        needed = {"--prompt": prompt, "--target": target}
        missing = [name for name, value in needed.items() if value is None]
        raise UserError(
            f"nothing to teach: {' and '.join(missing)} missing",
            'e.g. --image cat.png --prompt "What is this?" --target "a lynx", or --requests FILE',
        )
    request = Query(prompt, target, image, background)
    worded = tuple(replace(request, prompt=text) for text in rephrase or ())
    generality = {"text": worded} if worded else {}
    return EditCase("fact", request, generality)


def list_edits(
    folder: options.Ledger,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are undone.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the active edits."""
    from mmedit_cli.knowledge.ledger.edited_model import described, head
    from mmedit_cli.knowledge.ledger.ledger import Ledger
    from mmedit_cli.reports import edit_tables

    with Ledger.open(folder) as ledger:
        shown = [edit for edit in ledger.edits.values() if edit.active or everything]
        edits = [described(edit) for edit in shown]
        edit_tables.listed(Output(as_json=as_json), edits, head(ledger))


def undo(
    folder: options.Ledger,
    which: options.WhichEdits,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Take edits back; without any, the model is the base model bit for bit.

    Examples:

      mmedit edits undo my-edits 3-7

      mmedit edits undo my-edits all
    """
    _change("undo", folder, which, (model, device), as_json)


def redo(
    folder: options.Ledger,
    which: options.WhichEdits,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Bring back edits that were undone, each in its old place."""
    _change("redo", folder, which, (model, device), as_json)


def _change(
    do: str, folder: Path, which: str, where: tuple[str | None, str], as_json: bool
) -> None:
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import editing

    out = Output(as_json=as_json)
    model, device = where
    chosen = ModelOptions(model or "", device)
    done = editing.change_edits(folder, do, which, chosen, out)
    word = {"undo": "undone", "redo": "redone"}[do]
    edits = ", ".join(map(str, done[do]))
    out.result(done, lambda: out.line(f"{word}: {edits}; {done['active']:,} active"))


def export(
    folder: options.Ledger,
    to: options.NewFolder,
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters",
            help="PEFT adapters of a routed LoRA method, without what routes.",
        ),
    ] = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write the edited model as a folder that loads without this program, and check that it answers the same.

    Plain weights where the method allows it, PEFT adapters of LoRA methods, else the base model with one small file
    that routes.

    Examples:

      mmedit edits export my-edits --to edited-model

      mmedit edits export my-edits --to edited-model --push-to-hub me/edited-model

      mmedit edits export my-edits --to blocks --adapters
    """
    from mmedit_cli.knowledge.loading import ModelOptions
    from mmedit_cli.knowledge.workflow import exporting, pushing
    from mmedit_cli.reports import edit_tables

    out = Output(as_json=as_json)
    how = {"adapters": adapters, "model": model}
    asked = pushing.Export(folder, to, how, push_to_hub, private)
    chosen = ModelOptions(model or "", device)
    done = pushing.export_and_push(
        asked,
        lambda: exporting.export(folder, to, chosen, out, adapters=adapters),
        out,
    )
    edit_tables.exported_model(out, done)


def _list_row(name: str) -> dict[str, str]:
    editors = registry.editors
    return {
        "editor": name,
        "summary": editors.summary(name),
        "trained first": "yes" if editors.fact(name, "trains") else "no",
        "batch edits": "yes" if editors.fact(name, "batch_edits") else "no",
        "models": ", ".join(registry.backbones.names()),
    }


def _list_data() -> list[dict[str, str]]:
    named = [
        {"data": name, "summary": registry.datasets.summary(name)}
        for name in registry.datasets.names()
    ]
    own = "your own facts: cases.jsonl, or .csv, .tsv, .json, .jsonl; see docs/data.md"
    return [*named, {"data": "a folder or file", "summary": own}]


def _has_edits(folder: Path) -> bool:
    return (folder / "run.yaml").is_file()


def _check_data(data: str, options: DataOptions) -> Iterator[Finding]:
    from mmedit_cli.doctor import check_cases

    return check_cases(data, options)


KNOWLEDGE = Kind(
    method=Noun("an editor", "editors"),
    folder=Noun("a ledger", "ledgers"),
    registry=registry.editors,
    commands={
        "eval": evaluate,
        "train-editor": train,
        "edit": edit,
        "edits list": list_edits,
        "edits undo": undo,
        "edits redo": redo,
        "edits export": export,
    },
    list_row=_list_row,
    list_data=_list_data,
    has_edits=_has_edits,
    has_data=lambda data: False,  # whatever is for no other kind
    check_data=_check_data,
)
