"""The stages of training a mini vision-language model: what is trained in each, and on what."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mini_training import BaseTrainee, Progress, read_progress, store
from mini_vlm_data import (
    HEADS,
    NONE,
    TYPES,
    EmojiKB,
    Pictures,
    Questions,
    composed,
)
from mini_vlm_model import Recipe, Stage, build, build_tokenizer, normalise
from mini_vlm_open import OpenPictures, OpenQuestions
from mini_vlm_teacher import WIDTH, read_lesson
from safetensors import safe_open
from torch import Generator, Tensor, nn
from transformers import AutoTokenizer

from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.models.base import VisionLanguageModel

HEAD_WEIGHTS = {"name": 1.0, "kind": 0.3, "category": 0.3, "background": 0.3}
COLUMNS = (*TYPES, "text")  # of the running accuracies
CHUNKS = 4
SHARPNESS = 24.0  # of the reader of names
TEMPERATURE = 0.1  # of the contrastive loss between artists


class Directions(nn.Module):
    """A classifier by direction: (B, D) -> (B, C), sharpened cosines with a learned prototype a class.

    The right class is handed a cosine that is `margin` too low (Wang et al. 2018, CosFace), so that pictures of one
    class move together beyond what telling them apart needs.
    """

    margin = 0.0  # of the stage that is trained

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) / width**0.5)

    def forward(self, x: Tensor, right: Tensor) -> Tensor:
        cosines = F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).T
        return SHARPNESS * (cosines - self.margin * F.one_hot(right, len(self.weight)))


def contrast_between(features: Tensor, concept: Tensor) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, eq. 2) of features (B, D) of concepts (B,)."""
    unit = F.normalize(features, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosines = (unit @ unit.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    same = (concept[:, None] == concept) & ~itself
    shares = cosines.log_softmax(dim=-1).masked_fill(~same, 0.0)
    return -(shares.sum(1) / same.sum(1).clamp(min=1)).mean()


def start_from(model: nn.Module, folder: Path) -> None:
    """Put the weights of a model folder into a model of the same shape; raise UserError where the shapes differ."""
    # the names in the file are not those of the modules for every family
    trained = type(model).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{folder}: a model of another shape than the recipe"
        ) from error


class Trainee(BaseTrainee):
    """The model, what helps to train it and is not shipped, and the data, all on one device.

    `heads` classify pictures by the tower's patch tokens, in the first stage; `readers` by the tokens the language
    model gets, in the others: without these a Q-Former takes many passes to let anything through. The reader of names
    compares directions alone, so that drawings of one thing come to lie together, as the contrastive loss of BLIP-2's
    and CLIP's own training has it (Li et al. 2023, 3.2): editors find a thing again by these tokens.
    """

    columns = COLUMNS

    questions: Questions | OpenQuestions
    pictures: Pictures

    def __init__(
        self,
        recipe: Recipe,
        kb: EmojiKB,
        device: torch.device,
        start: Path | None = None,
        teacher: Path | None = None,
    ) -> None:
        """Build the model, or take weights and tokenizer of a model folder to start from."""
        super().__init__(recipe, device)
        self.kb = kb
        tokenizer = (
            build_tokenizer(kb.texts(), recipe.vocabulary)
            if start is None
            else AutoTokenizer.from_pretrained(start, trust_remote_code=False)
        )
        self.adapter: VisionLanguageModel = build(recipe, tokenizer)
        if start is not None:
            start_from(self.adapter.model, start)
        if kb.open:
            self.questions = OpenQuestions(kb, self.adapter, device)
            self.pictures = OpenPictures(kb, device)
        else:
            self.questions = Questions(kb, self.adapter, device)
            self.pictures = Pictures(kb, device)
        # as it was, in a tuple: what is only imitated is no part of what is trained and kept
        self._first = (copy.deepcopy(self.adapter.model.requires_grad_(False)),)
        self._patterns: Tensor | None = None
        self.lesson = read_lesson(teacher, len(kb.drawings)) if teacher else None
        self.model = self.adapter.model
        anchors = self.adapter.anchors
        self.tower, self._stack, self._head = (
            anchors.path("vision"),
            anchors.stack,
            anchors.tail[-1],
        )
        parts = ("connector", "projector")
        paths = [f"model.{anchors.path(part)}." for part in parts]
        self._bridge = (*paths, "model.query_tokens")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            width = recipe.vision["hidden_size"]
            self.heads = nn.ModuleDict(
                {
                    head: nn.Linear(width, size)
                    for head, size in self.pictures.sizes.items()
                }
            )
            self.heads["norm"] = nn.LayerNorm(width)
            if kb.open:
                self.heads["name"] = Directions(width, self.pictures.sizes["name"])
            if self.lesson is not None:
                self.heads["teacher"] = nn.Linear(width, WIDTH)
            width = recipe.text["hidden_size"]
            self.readers = nn.ModuleDict(
                {
                    head: nn.Linear(width, size)
                    for head, size in self.pictures.sizes.items()
                }
            )
            self.readers["name"] = Directions(width, self.pictures.sizes["name"])
            self.readers["norm"] = nn.LayerNorm(width)
        self.to(device)

    def usable(self, stage: str) -> Tensor:
        """Return the pictures that are not held out; words are learned of those that the model knows."""
        if stage == "words":
            assert isinstance(self.pictures, OpenPictures)
            return self.pictures.plain
        return self.pictures.usable

    def select(self, stage: str) -> dict[str, nn.Parameter]:
        """Let exactly the parameters of a stage be trained and return them by name."""
        for part in (self.heads, self.readers):
            if isinstance(part["name"], Directions):
                part["name"].margin = self.recipe.stages[stage].margin
        chosen = {}
        for name, parameter in self.named_parameters():
            trained = self._is_trained(name, stage)
            parameter.requires_grad_(trained)
            if trained:
                chosen[name] = parameter
        return chosen

    def _is_trained(self, name: str, stage: str) -> bool:
        """Return whether a stage trains a parameter: the bridge's a part of the decoder's, all of the joint ones."""
        in_tower = name.startswith(("heads.", f"model.{self.tower}."))
        if stage == "words":
            seeing = ("heads.", "readers.", f"model.{self.tower}.", *self._bridge)
            return not name.startswith(seeing)
        if stage == "tower":
            return in_tower
        if stage == "bridge":
            with_tower = self.recipe.stages[stage].tower and in_tower
            return with_tower or name.startswith(("readers.", *self._bridge))
        if stage in ("joint", "settle"):
            return self.recipe.stages[stage].tower or not name.startswith("heads.")
        return not in_tower

    def loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the tower, or of answers, and what was right and asked."""
        if stage == "tower":
            return self.tower_loss(chosen, generator)
        if stage == "bridge":
            return self.bridge_loss(chosen, generator)
        if stage == "words":
            return self.words_loss(chosen, generator)
        return self.answer_loss(chosen, self.recipe.stages[stage], generator)

    def tower_loss(self, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Classify pictures by the mean of the tower's patch tokens: loss, and (2, 10) right and asked by column."""
        stage = self.recipe.stages["tower"]
        chosen = self._with_partners(chosen, stage, generator)
        pixels, colour = self.pictures.draw(chosen, generator)
        return self._seen_well(self.tower_tokens(pixels), chosen, colour, stage)

    def _seen_well(
        self, tokens: Tensor, chosen: Tensor, colour: Tensor, stage: Stage
    ) -> tuple[Tensor, Tensor]:
        """Return how badly the tower's tokens (B, T, D) tell what pictures show, and (2, 10) right and asked."""
        loss, counts = self._classify(self.heads, tokens, chosen, colour)
        pooled = self.heads["norm"](tokens.mean(1))
        if self.lesson is not None:
            said, seen = self.heads["teacher"](pooled), self.lesson[chosen]
            loss = loss + stage.teach * (1 - F.cosine_similarity(said, seen)).mean()
        if stage.alike:
            concept = self.pictures.concept[chosen]
            loss = loss + stage.alike * contrast_between(pooled, concept)
        return loss, counts

    def _with_partners(
        self, chosen: Tensor, stage: Stage, generator: Generator
    ) -> Tensor:
        """Return pictures, and behind them another artist's of each where the stage draws artists together."""
        if not stage.alike:
            return chosen
        assert isinstance(self.pictures, OpenPictures)
        return torch.cat((chosen, self.pictures.partners(chosen, generator)))

    def tower_tokens(self, pixels: Tensor) -> Tensor:
        """Return the tower's patch tokens of pictures in 0..255: (B, 3, 64, 64) -> (B, T, D)."""
        tower = self.model.get_submodule(self.tower)
        hidden: Tensor = tower(normalise(pixels)).last_hidden_state
        return hidden[:, 1:]

    def on_white(self, rgba: Tensor) -> Tensor:
        """Return what the heads get of drawings on white: (B, 4, 64, 64) in 0..255 -> (B, D)."""
        white = torch.full((len(rgba), 3), 255.0, device=self.device)
        tokens = self.tower_tokens(composed(rgba[:, :3], rgba[:, 3:], white))
        features: Tensor = self.heads["norm"](tokens.mean(1))
        return features

    @torch.no_grad()
    def prime(self) -> None:
        """Let the head of names begin at the mean of each thing's drawings on white, as the tower sees them."""
        head = self.heads["name"]
        assert isinstance(head, Directions)
        sums = torch.zeros_like(head.weight)
        for part in self.pictures.usable.split(256):
            names = self.pictures.labels[self.pictures.concept[part], 0]
            sums.index_add_(0, names, self.on_white(self.pictures.rgba[part]))
        seen = sums.norm(dim=-1, keepdim=True) > 0
        head.weight.copy_(torch.where(seen, F.normalize(sums, dim=-1), head.weight))

    def _classify(
        self, heads: nn.ModuleDict, tokens: Tensor, chosen: Tensor, colour: Tensor
    ) -> tuple[Tensor, Tensor]:
        pooled = heads["norm"](tokens.mean(1))
        wanted = torch.cat(
            (self.pictures.labels[self.pictures.concept[chosen]], colour[:, None]),
            dim=1,
        )
        loss, counts = (
            pooled.new_zeros(()),
            torch.zeros(2, len(COLUMNS), device=self.device),
        )
        for i, head in enumerate(HEADS):
            target = wanted[:, i]
            logits = (
                heads[head](pooled, target)
                if isinstance(heads[head], Directions)
                else heads[head](pooled)
            )
            loss = loss + HEAD_WEIGHTS[head] * F.cross_entropy(
                logits.float(), target, ignore_index=NONE
            )
            counts[0, i] = (logits.argmax(-1) == target).sum()
            counts[1, i] = (target != NONE).sum()
        return loss, counts

    def bridge_loss(
        self, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Classify pictures by what the language model gets of them, which nobody is asked about yet.

        As BLIP-2 trains its Q-Former before there is a language model behind it (Li et al. 2023, 3.2): an answer costs
        many times what a reading does.
        """
        _, _, loss, counts = self._read(chosen, self.recipe.stages["bridge"], generator)
        return loss, counts

    def _read(
        self, chosen: Tensor, stage: Stage, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw pictures (B,), with others if the stage has some, and tell what they show by what is got of them.

        Return what the language model gets of the B (B, N, D), their named backgrounds (B,), the loss of telling, and
        (2, 10) right and asked.
        """
        shown = self._with_partners(chosen, stage, generator)
        shown = torch.cat((shown, self.pictures.some(stage.contrast, generator)))
        pixels, colour = self._drawn(shown, stage, generator)
        with self.listening() as heard, self.blending(stage.blend, generator):
            visual = self.image_tokens(pixels)
        loss, counts = self._classify(self.readers, visual, shown, colour)
        if stage.tower:
            loss = loss + self._seen_well(heard[0], shown, colour, stage)[0]
        concept = self.pictures.concept[shown]
        if stage.alike:
            pooled = self.readers["norm"](visual.mean(1))
            loss = loss + stage.alike * contrast_between(pooled, concept)
        if stage.imitate:
            loss = loss + stage.imitate * self._unlikeness(visual, concept, pixels)
        return visual[: len(chosen)], colour[: len(chosen)], loss, counts

    def _drawn(
        self, shown: Tensor, stage: Stage, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return pictures (B, 3, 64, 64) in 0..255, some of them plain, and their named backgrounds (B,), or -1."""
        pixels, colour = self.pictures.draw(shown, generator)
        if not stage.plainly:
            return pixels, colour
        assert isinstance(self.pictures, OpenPictures)
        chance = torch.rand(len(shown), generator=generator, device=self.device)
        plain = chance < stage.plainly
        still, still_colour = self.pictures.draw_plainly(shown[plain], generator)
        pixels[plain] = still.to(pixels.dtype)
        colour[plain] = still_colour
        return pixels, colour

    def _unlikeness(self, visual: Tensor, concept: Tensor, pixels: Tensor) -> Tensor:
        """Return how far tokens (B, N, D) are from those of a plain drawing: its share of their variance."""
        assert isinstance(self.pictures, OpenPictures)
        wanted = self.patterns()[concept, self.pictures.ground_of(pixels)]
        return F.mse_loss(visual, wanted) / wanted.var()

    @torch.no_grad()
    def patterns(self) -> Tensor:
        """Return what the model that was started from makes of a plain drawing of each thing: (C, 8, N, D).

        Its language model knows what to say of these. Things without a usable plain drawing are all zeros.
        """
        if self._patterns is None:
            pictures = self.pictures
            assert isinstance(pictures, OpenPictures)
            plain = {
                int(pictures.concept[at]): int(at) for at in pictures.plain.flip(0)
            }
            drawings = pictures.rgba[list(plain.values())].float()
            rows = [self._on_all_grounds(part) for part in drawings.split(64)]
            shape = (len(self.kb.concepts), *rows[0].shape[1:])
            places = torch.tensor(list(plain), device=self.device)
            found = torch.cat(rows)
            self._patterns = found.new_zeros(shape).index_copy_(0, places, found)
        return self._patterns

    def _on_all_grounds(self, rgba: Tensor) -> Tensor:
        """Return the tokens of the first model for drawings (B, 4, H, W) on the named backgrounds: (B, 8, N, D)."""
        seen = [
            tokens_of(
                self._first[0],
                composed(rgba[:, :3], rgba[:, 3:], ground.expand(len(rgba), 3)),
            )
            for ground in self.pictures.grounds
        ]
        return torch.stack(seen, 1)

    def words_loss(self, chosen: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Answer in many wordings about pictures that the model that was started from sees well."""
        stage = self.recipe.stages["words"]
        assert isinstance(self.pictures, OpenPictures)
        pixels, colour = self.pictures.draw_plainly(chosen, generator)
        with torch.no_grad():
            visual = blended(self.image_tokens(pixels), stage.blend, generator)
        return self._answered(chosen, visual, colour, stage, generator)

    def answer_loss(
        self, chosen: Tensor, stage: Stage, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Answer questions about pictures, and some without: loss per answer token, and (2, 10) right and asked.

        All questions about a picture share its encoding. An answer is right if its every token, end included, is.
        """
        visual, colour, reading, _ = self._read(chosen, stage, generator)
        loss, counts = self._answered(chosen, visual, colour, stage, generator)
        if stage.reading:
            loss = loss + stage.reading * reading
        return loss, counts

    def _answered(
        self,
        chosen: Tensor,
        visual: Tensor,
        colour: Tensor,
        stage: Stage,
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        """Ask about pictures of which the language model gets (B, N, D), on backgrounds (B,), and some without."""
        about, kinds = self.questions.ask(
            self.pictures.concept[chosen], colour, stage.questions, generator
        )
        without = self.questions.ask_text(stage.texts, generator)
        rows = torch.cat((about.flatten(), without))
        picture_of = torch.arange(len(visual), device=self.device).repeat_interleave(
            stage.questions
        )
        picture_of = torch.cat((picture_of, torch.full_like(without, NONE)))
        columns = torch.cat(
            (kinds.flatten(), torch.full_like(without, COLUMNS.index("text")))
        )

        order = self.questions.length[rows].argsort(
            stable=True
        )  # rows of a like length together: less padding
        parts = [
            self._answers(rows[part], picture_of[part], visual, part)
            for part in order.chunk(CHUNKS)
        ]
        logits, answers, row_of = (
            torch.cat(values) for values in zip(*parts, strict=True)
        )
        with torch.no_grad():
            misses = torch.zeros(len(rows), device=self.device)
            misses.index_add_(0, row_of, (logits.argmax(-1) != answers).float())
            counts = torch.zeros(2, len(COLUMNS), device=self.device)
            counts[0].index_add_(0, columns, (misses == 0).float())
            counts[1].index_add_(0, columns, torch.ones_like(misses))
        return F.cross_entropy(logits.float(), answers), counts

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Return what the language model gets of pictures in 0..255: (B, 3, 64, 64) -> (B, N, D)."""
        return tokens_of(self.model, pixels)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Collect the tower's patch tokens (B, T, D) of each batch of pictures, before anything is blended."""
        heard: list[Tensor] = []

        def listen(module: nn.Module, given: Any, output: Any) -> None:
            heard.append(output.last_hidden_state[:, 1:])

        handle = self.model.get_submodule(self.tower).register_forward_hook(listen)
        try:
            yield heard
        finally:
            handle.remove()

    @contextmanager
    def blending(self, most: float, generator: Generator) -> Iterator[None]:
        """Mix into the tower's tokens of each picture up to `most` of another's, which is not asked about.

        An artist whom nobody has seen lies as far from a thing's other drawings: what reads the tokens learns to go by
        what they are nearest to.
        """

        def blend(module: nn.Module, given: Any, output: Any) -> None:
            mixed = blended(output.last_hidden_state, most, generator)
            output.last_hidden_state = mixed
            if output.hidden_states:  # where LLaVA reads it
                output.hidden_states = (*output.hidden_states[:-1], mixed)

        if not most:
            yield
            return
        handle = self.model.get_submodule(self.tower).register_forward_hook(blend)
        try:
            yield
        finally:
            handle.remove()

    def _answers(
        self, chosen: Tensor, picture_of: Tensor, visual: Tensor, names: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run some sequences: logits (N, V) that predict the answer tokens (N,), and whose these are (N,)."""
        rows = self.questions.rows(chosen)
        embeds = self.model.get_input_embeddings()(rows.ids)
        seeing = (picture_of != NONE).nonzero()[:, 0]
        start, count = self.questions.image_start, self.questions.n_image
        if len(
            seeing
        ):  # a chunk of short questions without a picture has no room for one
            embeds[seeing, start : start + count] = visual[picture_of[seeing]].to(
                embeds.dtype
            )
        stack, head = (
            self.model.get_submodule(self._stack),
            self.model.get_submodule(self._head),
        )
        hidden = stack(
            inputs_embeds=embeds, attention_mask=rows.mask, use_cache=False
        ).last_hidden_state
        return (
            head(hidden[rows.predicting]),
            rows.answers,
            names[rows.predicting.nonzero()[:, 0]],
        )


def tokens_of(model: Any, pixels: Tensor) -> Tensor:
    """Return what a model's language model gets of pictures in 0..255: (B, 3, 64, 64) -> (B, N, D)."""
    seen = model.get_image_features(normalise(pixels), return_dict=True)
    return torch.stack(list(seen.pooler_output))


def blended(tokens: Tensor, most: float, generator: Generator) -> Tensor:
    """Return tokens (B, T, D) of pictures with up to `most` of another picture's in each."""
    other = tokens[torch.randperm(len(tokens), generator=generator)]
    share = most * torch.rand(len(tokens), 1, 1, generator=generator)
    return tokens + share * (other - tokens)


@torch.no_grad()
def adopt_tower(trainee: Trainee, path: Path, out: Path) -> None:
    """Start from the trained tower of a BLIP-2 (its run's tower.safetensors, or its folder), primed, and store that.

    A run of the same model takes over how the tower was trained, one of another model its name alone.

    A CLIP tower differs in names, in a bias of the patches (added to their positions here), in one matrix for queries,
    keys and values (cut in three), and in a norm before the first layer, which is set to keep the usual scale.
    """
    theirs, origin = _blip2_tower(path, trainee.device)
    is_clip = trainee.recipe.family == "llava"
    taken = clip_names(theirs) if is_clip else theirs
    tower = trainee.model.get_submodule(trainee.tower)
    ours = dict(tower.named_parameters())
    for name, value in taken.items():
        if name not in ours or value.shape != ours[name].shape:
            raise UserError(
                f"{path}: a tower of another shape ({name})",
                "the `vision` sections must be the same",
            )
    for name, value in taken.items():
        ours[name].copy_(value)
    if is_clip:
        generator = Generator(trainee.device).manual_seed(trainee.recipe.seed)
        shown = trainee.pictures.order(generator)[:64]
        pixels, _ = trainee.pictures.draw(shown, generator)
        scale = tower.embeddings(normalise(pixels)).std(-1).mean()
        ours["pre_layrnorm.weight"].fill_(scale)
    if trainee.kb.open:
        trainee.prime()
    unused = torch.optim.AdamW(trainee.heads.parameters())
    before = None if is_clip else read_progress(path.parent, path.stem)
    progress = before or Progress("tower")
    store(trainee, {}, unused, replace(progress, origin=origin), out)


def _blip2_tower(path: Path, device: torch.device) -> tuple[dict[str, Tensor], str]:
    """Return the weights of the tower of a BLIP-2, as float32, and the name of its model."""
    is_model = path.is_dir()
    mark = "vision_model." if is_model else "model.vision_model."
    source = path / "model.safetensors" if is_model else path
    with safe_open(source, "pt", device=str(device)) as file:
        keys = [key for key in file.keys() if key.startswith(mark)]  # noqa: SIM118
        weights = {key.removeprefix(mark): file.get_tensor(key).float() for key in keys}
        if is_model:
            return weights, path.resolve().name
        return weights, json.loads(file.metadata()["shape"])["name"]


def clip_names(blip: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a BLIP-2 tower under the names and in the shapes of a CLIP tower."""
    blip = dict(blip)
    positions = blip.pop("embeddings.position_embedding")[0].clone()
    positions[1:] += blip.pop("embeddings.patch_embedding.bias")
    clip = {
        "embeddings.position_embedding.weight": positions,
        "embeddings.class_embedding": blip.pop("embeddings.class_embedding").flatten(),
    }
    for name, value in blip.items():
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                clip[name.replace("qkv", f"{part}_proj")] = piece
        else:
            clip[name.replace("self_attn.projection", "self_attn.out_proj")] = value
    return clip
