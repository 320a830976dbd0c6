"""The page itself: what stands on it, and which function answers each button."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.errors import UserError
from mmedit_cli.output import counted
from mmedit_cli.reports.finding import finished_runs
from mmedit_cli.reports.view import one_run
from mmedit_cli.ui.draw_tab import DrawTab
from mmedit_cli.ui.fields import (
    lines_of,
    number_fields,
    on,
    picture_field,
    shown_picture,
    shown_table,
    shown_text,
    whole,
)
from mmedit_cli.ui.knowledge import Knowledge, edits_of, question
from mmedit_cli.ui.making import Changing
from mmedit_cli.ui.tables import ASKED, EDITS, Row, asked_rows, edit_rows, summary
from mmedit_cli.ui.visitors import Visitors

_SHOWN = ("1f9ad", "1fa95", "1f34e", "1f981")  # of EmojiKB: a seal, a banjo, ...
_DAY = 86_400  # seconds
_DONE = {"undo": "undone", "redo": "redone"}
_CHOSEN = "as suits the fact"


class Page:
    """What the buttons of the page do. The place of a visitor's ledger, a text, is empty until something is taught."""

    def __init__(
        self,
        knowledge: Knowledge,
        drawing: DrawTab,
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
        given = lines_of(wordings)
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

    def change(
        self, picture: str | None, instruction: str, seed: float, steps: float
    ) -> tuple[Image.Image, str]:
        """Return a changed picture, and the expressive instruction."""
        whole_seed = whole(seed, "seed")
        whole_steps = whole(steps, "steps")
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
            own = gr.State("", time_to_live=_DAY, delete_callback=self.visitors.leave)
            with gr.Tab("Ask and teach"):
                self._ask_and_teach(ledger)
            with gr.Tab("Draw"):
                self.drawing.build(own)
            with gr.Tab("Change a picture"):
                self._change_pictures()
            with gr.Tab("Runs"):
                self._look_at_runs(blocks)
        return blocks

    def _ask_and_teach(self, ledger: Any) -> None:
        with gr.Row():
            with gr.Column():
                picture = picture_field()
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
                text = shown_text("Answer")
                base = shown_text("Answer of the untouched model")
                fired = shown_text("Edits that took part")
                effect = shown_text("What the edit did", lines=6)
        asked = shown_table(
            ASKED,
            "Asked before and after: the fact, the same otherwise, other things",
        )
        edits = self._ledger(ledger)
        asked_for = [picture, prompt, ledger]
        answers = [text, base, fired]
        on(ask.click, self.ask, asked_for, answers)
        on(
            prompt.submit,
            self.ask,
            asked_for,
            answers,
            named=False,
        )
        given = [picture, prompt, target, wordings, editor, ledger]
        on(teach.click, self.teach, given, [effect, asked, edits, ledger])

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
            show_label=False,
            columns=len(files),
            rows=1,
            height=140,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )

        def pick(event: gr.SelectData) -> str:
            chosen: str = files[event.index]
            return chosen

        gallery.select(pick, None, picture, api_visibility="private")

    def _ledger(self, ledger: Any) -> Any:
        """Put the ledger on the page; return the table of its edits."""
        edits = shown_table(EDITS, "Your edits")
        with gr.Row():
            with gr.Column():
                which = gr.Textbox("last", label="Edits: 3, 3-7, last or all")
                with gr.Row():
                    undo = gr.Button("Undo")
                    redo = gr.Button("Redo")
            with gr.Column():
                named = self.visitors.shared is not None
                label = "Ledger by name" if named else "Ledger"
                name = gr.Textbox(label=f"{label} (empty: a new one of your own)")
                begin = gr.Button("Open")
        said = shown_text("Done")
        on(undo.click, self.undo, [which, ledger], [said, edits])
        on(redo.click, self.redo, [which, ledger], [said, edits])
        on(begin.click, self.open, [name, ledger], [said, edits, ledger])
        return edits

    def _change_pictures(self) -> None:
        with gr.Row():
            with gr.Column():
                picture = picture_field()
                self._examples(picture)
                words = gr.Textbox("make the background blue", label="What to change")
                seed, steps = number_fields(20)
                change = gr.Button("Change", variant="primary")
            with gr.Column():
                done = shown_picture("Changed")
                expressive = shown_text("Expressive instruction of the model", lines=3)
        given = [picture, words, seed, steps]
        on(change.click, self.change, given, [done, expressive])

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
        on(names.change, self.run, [names], [shown])


def _edits_in(place: Path) -> list[Row]:
    """Return the rows of the edits in a ledger."""
    edits = edits_of(place)
    rows = edit_rows(edits)
    return rows
