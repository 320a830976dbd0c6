"""The page itself: what stands on it, and which function answers each button."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.errors import MmeditError, UserError
from mmedit_cli.output import counted
from mmedit_cli.pictures import check_picture
from mmedit_cli.reports.finding import finished_runs
from mmedit_cli.reports.view import one_run
from mmedit_cli.ui.knowledge import Knowledge, edits_of, question
from mmedit_cli.ui.making import MOST_STEPS, Changing, Drawing
from mmedit_cli.ui.tables import ASKED, EDITS, Row, asked_rows, edit_rows, summary
from mmedit_cli.ui.visitors import Visitors

_SHOWN = ("1f9ad", "1fa95", "1f34e", "1f981")  # of EmojiKB: a seal, a banjo, ...
_DAY = 86_400  # seconds
_MOST = 2**63  # no seed is that large
_DONE = {"undo": "undone", "redo": "redone"}
_WIDTHS: list[str | int] = [
    "14%",
    "25%",
    "17%",
    "15%",
    "16%",
    "13%",
]  # of the columns of a table
_CHOSEN = "as suits the fact"


class Page:
    """What the buttons of the page do. The place of a visitor's ledger, a text, is empty until something is taught."""

    def __init__(
        self,
        knowledge: Knowledge,
        drawing: Drawing,
        changing: Changing,
        visitors: Visitors,
        records: Path,
    ) -> None:
        self.knowledge = knowledge
        self.drawing = drawing
        self.changing = changing
        self.visitors = visitors
        self.records = records

    # -- what buttons do ------------------------------------------------------------------------------------------

    def ask(
        self, picture: str | None, prompt: str, ledger: str
    ) -> tuple[str, str, str]:
        """Return the answer, that of the untouched model, and the edits that took part."""
        query = question(prompt, picture)
        place = self._place(ledger)
        answer = self.knowledge.ask(place, query)
        return (
            answer.text,
            answer.base,
            answer.fired,
        )

    def teach(
        self,
        picture: str | None,
        prompt: str,
        target: str,
        wordings: str,
        editor: str,
        ledger: str,
    ) -> tuple[str, list[Row], list[Row], str]:
        """Teach a new answer; return what it did, what was asked, the edits, and where they are kept."""
        request = question(prompt, picture, target)
        place = Path(ledger) if ledger else self.visitors.begin()
        given = _lines_of(wordings)
        named = "" if editor == _CHOSEN else editor
        report = self.knowledge.teach(
            place,
            request,
            given,
            named,
        )
        return (
            summary(report),
            asked_rows(report),
            _edits_in(place),
            str(place),
        )

    def undo(self, which: str, ledger: str) -> tuple[str, list[Row]]:
        """Take edits back; return what was done, and the edits."""
        return self._change("undo", which, ledger)

    def redo(self, which: str, ledger: str) -> tuple[str, list[Row]]:
        """Bring edits back; return what was done, and the edits."""
        return self._change("redo", which, ledger)

    def open(self, name: str, ledger: str) -> tuple[str, list[Row], str]:
        """Go on with the ledger of a name; without one, with a new ledger of the visitor's own."""
        if not name.strip():
            self.visitors.leave(ledger)
            return "a new ledger of your own", [], ""
        place = self.visitors.open(name)
        rows = _edits_in(place)
        edits = counted(len(rows), "edit")
        said = f"{place.name}: {edits}"
        return said, rows, str(place)

    def draw(self, prompt: str, seed: float, steps: float) -> Image.Image:
        """Return a picture of a prompt."""
        whole_seed = _whole(seed, "seed")
        whole_steps = _whole(steps, "steps")
        return self.drawing.draw(
            prompt,
            whole_seed,
            whole_steps,
        )

    def change(
        self, picture: str | None, instruction: str, seed: float, steps: float
    ) -> tuple[Image.Image, str]:
        """Return a changed picture, and the expressive instruction."""
        whole_seed = _whole(seed, "seed")
        whole_steps = _whole(steps, "steps")
        done = self.changing.change(
            picture,
            instruction,
            whole_seed,
            whole_steps,
        )
        return done.picture, done.expressive

    def run(self, name: str | None) -> str:
        """Return a finished run as HTML."""
        if not name:
            return "no finished runs yet: those of mmedit eval are shown here"
        for folder in finished_runs(self.records):
            own_name = self._name(folder)
            if own_name == name:
                return one_run(folder)
        raise UserError("no such finished run", "look again")

    def runs(self) -> list[str]:
        """Return the names of the finished runs, the newest first."""
        return [self._name(folder) for folder in finished_runs(self.records)]

    def _change(self, do: str, which: str, ledger: str) -> tuple[str, list[Row]]:
        place = self._place(ledger)
        wanted = which.strip() or "last"
        ids = self.knowledge.change(
            place,
            do,
            wanted,
        )
        named = ", ".join(map(str, ids))
        said = f"{_DONE[do]}: {named}"
        rows = _edits_in(place)
        return said, rows

    def _place(self, ledger: str) -> Path:
        """Return where a visitor's ledger lies, or would lie."""
        return Path(ledger) if ledger else self.visitors.begin()

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.records).as_posix()

    # -- what stands on it ----------------------------------------------------------------------------------------

    def build(self) -> Any:
        """Return the page as Blocks of gradio."""
        with gr.Blocks(
            title="mmedit", analytics_enabled=False, delete_cache=(_DAY, _DAY)
        ) as blocks:
            ledger = gr.State(
                "", time_to_live=_DAY, delete_callback=self.visitors.leave
            )
            with gr.Tab("Ask and teach"):
                self._ask_and_teach(ledger)
            with gr.Tab("Draw"):
                self._draw()
            with gr.Tab("Change a picture"):
                self._change_pictures()
            with gr.Tab("Runs"):
                self._look_at_runs(blocks)
        return blocks

    def _ask_and_teach(self, ledger: Any) -> None:
        with gr.Row():
            with gr.Column():
                picture = _picture()
                self._examples(picture)
                prompt = gr.Textbox("What is this?", label="Question")
                ask = gr.Button("Ask")
                target = gr.Textbox(label="New answer")
                wordings = gr.Textbox(
                    label="The same question in other words, a line each (optional)",
                    lines=2,
                )
                editors = [_CHOSEN, *registry.editors.names()]
                editor = gr.Dropdown(editors, value=_CHOSEN, label="Editor")
                teach = gr.Button("Teach", variant="primary")
            with gr.Column():
                text = _said("Answer")
                base = _said("Answer of the untouched model")
                fired = _said("Edits that took part")
                effect = _said("What the edit did", lines=5)
                asked = _table(
                    ASKED,
                    "Asked before and after: the fact, the same otherwise, other things",
                )
                edits = self._ledger(ledger)
        asked_for = [picture, prompt, ledger]
        answers = [text, base, fired]
        _on(ask.click, self.ask, asked_for, answers)
        _on(
            prompt.submit,
            self.ask,
            asked_for,
            answers,
            named=False,
        )
        given = [picture, prompt, target, wordings, editor, ledger]
        _on(teach.click, self.teach, given, [effect, asked, edits, ledger])

    def _examples(self, picture: Any) -> None:
        """Put drawings of EmojiKB on the page; a click takes one of them for a picture."""
        drawings = registry.emojikb_dir() / "noto"
        folder = self.visitors.home / "drawings"  # gradio shows none from elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for code in _SHOWN:
            name = f"{code}.png"
            copy = shutil.copy(drawings / name, folder / name)
            files.append(str(copy))
        gallery = gr.Gallery(
            files,
            label="Drawings to try",
            columns=len(files),
            height=190,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
        )

        def pick(event: gr.SelectData) -> str:
            chosen: str = files[event.index]
            return chosen

        gallery.select(pick, None, picture, api_visibility="private")

    def _ledger(self, ledger: Any) -> Any:
        """Put the ledger on the page; return the table of its edits."""
        edits = _table(EDITS, "Your edits")
        which = gr.Textbox("last", label="Edits: 3, 3-7, last or all")
        with gr.Row():
            undo = gr.Button("Undo")
            redo = gr.Button("Redo")
        said = _said("Done")
        _on(undo.click, self.undo, [which, ledger], [said, edits])
        _on(redo.click, self.redo, [which, ledger], [said, edits])
        shared = self.visitors.shared is not None
        label = "Ledger by name" if shared else "Ledger"
        name = gr.Textbox(label=f"{label} (empty: a new one of your own)")
        begin = gr.Button("Open")
        _on(begin.click, self.open, [name, ledger], [said, edits, ledger])
        return edits

    def _draw(self) -> None:
        with gr.Row():
            with gr.Column():
                tokens = self.drawing.tokens
                hint = f"Learned: {', '.join(tokens)}" if tokens else "a red apple"
                first = f"a {tokens[0]}" if tokens else "a red apple"
                prompt = gr.Textbox(first, label="What to draw", info=hint)
                seed, steps = _numbers(20)
                draw = gr.Button("Draw", variant="primary")
            drawn = gr.Image(label="Drawn", format="png", interactive=False)
        _on(draw.click, self.draw, [prompt, seed, steps], [drawn])

    def _change_pictures(self) -> None:
        with gr.Row():
            with gr.Column():
                picture = _picture()
                self._examples(picture)
                words = gr.Textbox("make the background blue", label="What to change")
                seed, steps = _numbers(20)
                change = gr.Button("Change", variant="primary")
            with gr.Column():
                done = gr.Image(label="Changed", format="png", interactive=False)
                expressive = _said("Expressive instruction of the model", lines=3)
        given = [picture, words, seed, steps]
        _on(change.click, self.change, given, [done, expressive])

    def _look_at_runs(self, blocks: Any) -> None:
        names = gr.Dropdown(
            label="Finished runs, the newest first", allow_custom_value=True
        )
        again = gr.Button("Look again")
        shown = gr.HTML()

        def look() -> Any:
            found = self.runs()
            newest = found[0] if found else None
            return gr.Dropdown(
                choices=found,
                value=newest,
            )

        for event in (blocks.load, again.click):
            event(
                look,
                None,
                names,
                api_visibility="private",
            )
        _on(names.change, self.run, [names], [shown])


def _on(
    event: Any,
    do: Callable[..., Any],
    given: list[Any],
    shown: list[Any],
    *,
    named: bool = True,
) -> None:
    """Let a function answer an event, one call at a time; clients know it by its own name."""
    event(
        _told(do),
        given,
        shown,
        api_name=do.__name__,
        api_visibility="public" if named else "private",
        concurrency_limit=1,
        concurrency_id="model",
    )


def _told(do: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose errors are told to the visitor."""

    @wraps(do)
    def run(*given: Any) -> Any:
        try:
            return do(*given)
        except MmeditError as error:
            said = "; ".join(error.problems)
            hint = f" ({error.hint})" if error.hint else ""
            raise gr.Error(said + hint, print_exception=False) from error

    return run


def _picture() -> Any:
    """Return a field for a picture, which is checked as on the command line before anything decodes it."""
    picture = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=260,
    )

    def checked(upload: Any) -> str | None:
        if upload is None or upload.path is None:
            return None
        try:
            check_picture(Path(upload.path))
        except MmeditError as error:
            said = "; ".join(error.problems)
            folder = Path(upload.path).parent
            told = said.replace(f"{folder}/", "")
            raise gr.Error(told, print_exception=False) from error
        return str(upload.path)

    # the field's own way would decode whatever Pillow knows
    vars(picture)["preprocess"] = checked
    return picture


def _numbers(steps: int) -> tuple[Any, Any]:
    """Return the fields for a seed and for denoising steps."""
    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    number = gr.Slider(1, MOST_STEPS, value=steps, step=1, label="Steps")
    return seed, number


def _said(label: str, *, lines: int = 1) -> Any:
    return gr.Textbox(label=label, lines=lines, interactive=False)


def _table(header: list[str], label: str) -> Any:
    return gr.Dataframe(
        headers=header,
        datatype="str",
        label=label,
        interactive=False,
        wrap=True,
        max_height=320,
        column_widths=_WIDTHS,
    )


def _whole(number: float | None, what: str) -> int:
    """Return a number of a field; raise UserError unless it is a whole one that a seed may be."""
    if number is not None and 0 <= number < _MOST:
        whole = int(number)
        if whole == number:
            return whole
    raise UserError(f"{what}: not a whole number from 0 on")


def _lines_of(text: str) -> list[str]:
    """Return the lines of a text that are not empty."""
    found = []
    for line in text.splitlines():
        if stripped := line.strip():
            found.append(stripped)
    return found


def _edits_in(place: Path) -> list[Row]:
    """Return the rows of the edits in a ledger."""
    edits = edits_of(place)
    rows = edit_rows(edits)
    return rows
