"""Commands whose options depend on the kind of the method, or of the folder of edits, that is named first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand
from typer.main import get_command

from mmedit_cli.errors import UserError
from mmedit_cli.kinds import kind_of_folder, kind_of_method, kinds_with, run_file
from mmedit_cli.kinds.base import Command, Kind, Noun

METHOD = "editor"  # the argument that names a method
FOLDER = "folder"  # the argument that names a folder of edits


class KindCommand(TyperCommand):
    """A command with a function for each kind. typer builds it from that of the first kind.

    Where the arguments name something of a kind, the function of that kind is called, and its help is shown. An option
    that only other kinds take is refused. Without a name, the help shows the options of all kinds.
    """

    task: ClassVar[str]  # the name of the command in `Kind.commands`

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Parse the arguments as the command of the kind that they name."""
        if extra.get("resilient_parsing"):  # a shell completes what is half written
            return super().make_context(info_name, args, parent, **extra)
        args = self._with_file(args)
        scan = self._scan(args)
        kind, named = self._named_kind(scan.params)
        self._refuse_others(kind, scan)
        if not named:
            return super().make_context(info_name, args, parent, **extra)
        return self._command(kind).make_context(info_name, args, parent, **extra)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of every kind, those that not all kinds take below a heading of their own."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        kinds = kinds_with(self.task)
        for param in self._every_param():
            takers = [kind for kind in kinds if _takes(self._command(kind), param)]
            names = " and ".join(self._noun(kind).many for kind in takers)
            heading = "Options" if len(takers) == len(kinds) else f"Options of {names}"
            if param.param_type_name == "argument":
                heading = "Arguments"
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(heading, []).append(record)
        self._format_kinds(kinds, formatter)
        help_option = self.get_help_option(ctx)
        record = help_option.get_help_record(ctx) if help_option else None
        if record is not None:
            sections["Options"].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def _format_kinds(self, kinds: Sequence[Kind], formatter: Any) -> None:
        """Write a line a kind, for the help of the command as a whole."""
        first_sentences = [
            (kind.commands[self.task].__doc__ or "").partition("\n")[0]
            for kind in kinds
        ]
        names = [self._noun(kind).many for kind in kinds]
        if len(kinds) > 1:
            with formatter.section("What it does"):
                formatter.write_dl(list(zip(names, first_sentences, strict=True)))

    def _with_file(self, args: list[str]) -> list[str]:
        """Return the arguments with the options of the file that `--config` names, where the command takes one."""
        params = self._every_param()
        known = {name for param in params for name in param.opts}
        if run_file.OPTION not in known:
            return args
        own, file = run_file.take_file(args)
        if file is None:
            return args
        scan = self._scan(own)
        given = {}
        for param in params:
            if _is_given(param, scan):
                for name in param.opts:
                    given[name.removeprefix("--")] = scan.params[param.name]
        found = run_file.read_options(file)
        words = run_file.as_words(file, found, given, known)
        return [*words, *own]

    def _scan(self, args: Sequence[str]) -> Any:
        """Read the arguments with the options of all kinds, and forgive whatever is wrong with them."""
        reader = TyperCommand(self.name, params=self._every_param())
        return reader.make_context(
            self.name,
            list(args),
            resilient_parsing=True,
            ignore_unknown_options=True,
            allow_extra_args=True,
            help_option_names=["-h", "--help"],
        )

    def _named_kind(self, values: dict[str, Any]) -> tuple[Kind, bool]:
        """Return the kind that the arguments name, or the first one, and whether they name any."""
        method = values.get(METHOD)
        folder = values.get(FOLDER)
        if folder is not None:
            return kind_of_folder(Path(folder), self.task), True
        if method is None or method.startswith("-"):  # an option that is unknown
            return kinds_with(self.task)[0], False
        return kind_of_method(method, self.task), True

    def _refuse_others(self, kind: Kind, scan: Any) -> None:
        """Raise UserError for options that were given and that this kind does not take."""
        given = [param for param in self._every_param() if _is_given(param, scan)]
        own = self._command(kind)
        wrong = [param.opts[0] for param in given if not _takes(own, param)]
        if not wrong:
            return
        named = scan.params.get(METHOD) or scan.params.get(FOLDER) or ""
        show_help = f"mmedit {self.task} {named}".rstrip() + " --help"
        raise UserError(
            f"{', '.join(wrong)}: means nothing to {self._noun(kind).one}",
            f"{show_help} lists what it takes",
        )

    def _every_param(self) -> list[Any]:
        """Return the parameters of all kinds, those with the same spelling once."""
        found: dict[str, Any] = {}
        for kind in kinds_with(self.task):
            command = _build(self.task, kind.commands[self.task])
            for param in command.params:
                found.setdefault(param.opts[0], param)
        return list(found.values())

    def _command(self, kind: Kind) -> Any:
        """Return what typer makes of the function of a kind."""
        return _build(self.task, kind.commands[self.task])

    def _noun(self, kind: Kind) -> Noun:
        return kind.folder if self.task.startswith("edits ") else kind.method


def by_kind(task: str) -> type[KindCommand]:
    """Return the class of the command that is called `task` in `Kind.commands`."""

    class OfTask(KindCommand):
        """A command of several kinds."""

    OfTask.task = task
    return OfTask


def function_of(task: str) -> Command:
    """Return the function of the first kind, from which typer builds the command."""
    return kinds_with(task)[0].commands[task]


@cache
def _build(name: str, function: Command) -> Any:
    """Return what typer makes of a function."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name.rpartition(" ")[2])(function)
    return get_command(single)


def _takes(command: Any, param: Any) -> bool:
    """Tell whether a command has an option or argument with that spelling."""
    spelled = set(param.opts) | set(param.secondary_opts)
    return any(spelled & set(own.opts) for own in command.params)


def _is_given(param: Any, scan: Any) -> bool:
    """Tell whether a parameter stands on the command line: not in the environment, and not its default."""
    source = scan.get_parameter_source(param.name)
    return source is not None and source.name == "COMMANDLINE"
