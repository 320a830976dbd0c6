"""The tab that draws: a prompt, and things of one's own that are learned from pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmedit_cli import registry
from mmedit_cli.output import counted
from mmedit_cli.ui.fields import (
    number_fields,
    on,
    shown_picture,
    shown_text,
    whole,
)
from mmedit_cli.ui.learning import (
    MOST_TRAINING,
    Learning,
    concept_of,
    methods,
    tokens_in,
)
from mmedit_cli.ui.making import Drawing
from mmedit_cli.ui.visitors import Visitors

_GOOSE = "1fabf"  # of EmojiKB, which mini-sd was not shown
_ARTISTS = ("noto", "twemoji", "fluent", "openmoji")
_FIRST_STEPS = 300
_PROGRESS = gr.Progress()


class DrawTab:
    """What the buttons of the tab do. The place of a visitor's concepts, a text, is empty until one is learned."""

    def __init__(
        self, drawing: Drawing, learning: Learning, visitors: Visitors
    ) -> None:
        self.drawing = drawing
        self.learning = learning
        self.visitors = visitors

    def draw(self, prompt: str, seed: float, steps: float, own: str) -> Image.Image:
        """Return a picture of a prompt; with something learned in it, beside what the base model draws."""
        whole_seed = whole(seed, "seed")
        whole_steps = whole(steps, "steps")
        named = any(token in prompt for token in tokens_in(own))
        folder = Path(own) if named else None
        return self.drawing.draw(
            prompt,
            whole_seed,
            whole_steps,
            folder,
        )

    def learn(
        self,
        pictures: list[str] | None,
        token: str,
        superclass: str,
        method: str,
        steps: float,
        own: str,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[str, str, str]:
        """Learn a thing from pictures; return what was done, a prompt to draw it, and where concepts are kept."""
        concept = concept_of(pictures or [], token, superclass)
        whole_steps = whole(steps, "steps")
        place = Path(own) if own else self.visitors.begin()

        def tell(share: float, what: str) -> None:
            progress(share, desc=what)

        entry = self.learning.learn(
            concept,
            method,
            whole_steps,
            place,
            tell,
        )
        name = entry["token"]
        from_pictures = counted(len(concept.images), "picture")
        kept = ", ".join(tokens_in(str(place)))
        text = f"learned {name} from {from_pictures} in {entry['seconds']:.0f} s; yours: {kept}"
        return text, f"a drawing of a {name}", str(place)

    def forget(self, own: str) -> tuple[str, str]:
        """Forget all that the visitor has taught; return what was done, and that there is no place."""
        names = ", ".join(tokens_in(own)) or "nothing"
        self.visitors.leave(own)
        return f"forgotten: {names}", ""

    def build(self, own: Any) -> None:
        """Put the tab on the page; `own` is the state that holds the place of the visitor's concepts."""
        with gr.Row():
            with gr.Column():
                tokens = self.drawing.tokens
                hint = f"Learned: {', '.join(tokens)}" if tokens else None
                first = f"a {tokens[0]}" if tokens else "a red apple"
                prompt = gr.Textbox(first, label="What to draw", info=hint)
                seed, steps = number_fields(20)
                draw = gr.Button("Draw", variant="primary")
            picture = shown_picture("Drawn")
        drawn_from = [prompt, seed, steps, own]
        on(draw.click, self.draw, drawn_from, [picture])
        with gr.Accordion("Teach it a thing of your own", open=False):
            learned = self._learn(prompt, own)
        on(
            learned.success,
            self.draw,
            drawn_from,
            [picture],
            named=False,
        )

    def _learn(self, prompt: Any, own: Any) -> Any:
        """Put the fields for what is to be learned on the page; return the event of its button."""
        pictures = gr.File(
            label="Three to six pictures of one thing",
            file_count="multiple",
            file_types=["image"],
            height=140,
        )
        goose = gr.Button("Take four drawings of a goose")
        with gr.Row():
            token = gr.Textbox("<goose>", label="Its name in prompts")
            superclass = gr.Textbox("bird", label="The plain word for what it is")
        with gr.Row():
            names = methods()
            method = gr.Dropdown(names, value=names[0], label="Method")
            steps = gr.Slider(
                1,
                MOST_TRAINING,
                value=_FIRST_STEPS,
                step=1,
                label="Training steps",
            )
        with gr.Row():
            learn = gr.Button("Learn", variant="primary")
            forget = gr.Button("Forget all of mine")
        done = shown_text("Learned")
        goose.click(self._goose, None, pictures, api_visibility="private")
        given = [pictures, token, superclass, method, steps, own]
        on(forget.click, self.forget, [own], [done, own])
        return on(
            learn.click,
            self.learn,
            given,
            [done, prompt, own],
            queue="training",
        )

    def _goose(self) -> list[str]:
        """Return drawings of a thing that the model which comes along has never seen, where gradio may show them."""
        data = registry.emojikb_dir()
        folder = self.visitors.home / "goose"
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for artist in _ARTISTS:
            drawing = data / artist / f"{_GOOSE}.png"
            copy = shutil.copy(drawing, folder / f"{artist}.png")
            files.append(str(copy))
        return files
