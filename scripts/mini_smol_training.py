"""The stages of training mini-smol: image tokens as words of the language model, then answers to questions.

Shapes: B pictures, S slots (one an image token), Q questions a picture, T tokens of a packed row, D widths, V words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_training import BaseRecipe, BaseTrainee, Schedule
from mini_vlm_data import NONE, TYPES, EmojiKB, Pictures
from mini_vlm_model import normalise
from mini_vlm_open import OpenQuestions
from peft import LoraConfig, inject_adapter_in_model
from torch import Generator, Tensor, nn

from mmedit_cli import assembled, registry
from mmedit_cli.errors import UserError
from mmedit_cli.knowledge.models.base import VisionLanguageModel
from mmedit_cli.knowledge.models.shared.batch import Encoded
from mmedit_cli.types import Query

STAGES = ("words", "answers", "joint")
# how many image tokens say what: the name, the kind, the category, the colour behind, and two words that never change
PARTS = {"name": 7, "kind": 3, "category": 3, "background": 1}
CLOSING, CLOSING_TOKENS = " background.", 2
FILLER = ","
UNNAMED = " plain"  # stands for a background of no name
COLUMNS = (*PARTS, *(f"answer {kind}" for kind in TYPES), "answer text")
SHARPNESS = 24.0  # of cosines with words
AWAY_WEIGHT = 4.0  # of how far image tokens are from the words themselves
NAME_WEIGHT = 3.0  # of the tokens of a name beside the others, of which there are few to tell apart
CHANGED = ("q_proj", "v_proj")  # of each layer of the language model
ADAPTER = "mini-smol"


@dataclass(frozen=True)
class Stage(Schedule):
    """How one stage is trained: batches of `pictures` with `questions` each, and `texts` questions without a picture.

    `told` is the share of pictures whose image tokens are replaced by the words themselves, so that reading them is
    learned from what is right; `reading` weighs the loss of the first stage where it goes on in a later one, in which
    `more` pictures take part that nothing is asked about.
    """

    questions: int = 0
    texts: int = 0
    told: float = 0.0
    reading: float = 0.0
    more: int = 0


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Everything a training run depends on but the data, the parts it starts from, and the machine.

    words: the projector and the last layers of the tower are trained; answers: the change of the language model;
    joint: all of it.
    """

    STAGES = STAGES
    STAGE = Stage

    language: str
    tower: str
    rank: int  # of the change of the language model
    layers: list[int]  # of the tower that are trained


def build(recipe: Recipe, language: Path, tower: Path) -> VisionLanguageModel:
    """Return the untrained model behind its adapter, in float32 on the CPU."""
    model, tokenizer, processor = assembled.build(language, tower)
    family = registry.backbones.get("llava")
    adapter: VisionLanguageModel = family(
        recipe.name, model, tokenizer, processor, "untrained"
    )
    return adapter


class Trainee(BaseTrainee):
    """The model with a low-rank change of its language model, and the data, all on one device.

    Trained are the projector, the last layers of the tower, which gather what each image token says, and that change.
    """

    columns = COLUMNS

    def __init__(
        self,
        recipe: Recipe,
        kb: EmojiKB,
        device: torch.device,
        language: Path,
        tower: Path,
    ) -> None:
        super().__init__(recipe, device)
        self.kb = kb
        self.adapter = build(recipe, language, tower)
        self.questions = OpenQuestions(kb, self.adapter, device)
        first = self.adapter.encode(Query("What is this?", "a", Path("any.png")))
        self.front = torch.tensor(first.ids[: first.image_start])  # of every text
        self.pictures = Pictures(kb, device)
        self.captions, words = captions(kb, self.adapter)
        self.model = self.adapter.model
        self.model.requires_grad_(False)
        table = self.adapter.word_embeddings(words).detach().clone()
        self._inject()
        self.to(device)
        self.words = words.to(device)
        self.table = table.to(device)
        self.captions = self.captions.to(device)
        self.colours = self.captions.new_tensor(
            _colours(kb, self.adapter, self.words.tolist())
        )

    def _inject(self) -> None:
        """Put the low-rank change, in float32, around layers of the language model, which is kept in bfloat16."""
        reader = self.model.model.language_model
        reader.to(torch.bfloat16)
        reader.set_attn_implementation("eager")  # faster for rows this short
        rank = self.recipe.rank
        config = LoraConfig(
            target_modules=list(CHANGED),
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            inject_adapter_in_model(config, reader, ADAPTER)
        for name, parameter in reader.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def usable(self, stage: str) -> Tensor:
        """Return the pictures that are not held out."""
        return self.pictures.usable

    def select(self, stage: str) -> dict[str, nn.Parameter]:
        """Let exactly the parameters of a stage be trained and return them by name."""
        marks = []
        if stage != "answers":
            marks.append("multi_modal_projector.")
            marks += [f"vision_tower.encoder.layers.{n}." for n in self.recipe.layers]
        if stage != "words":
            marks.append("lora_")
        chosen = {}
        for name, parameter in self.named_parameters():
            is_chosen = any(mark in name for mark in marks)
            parameter.requires_grad_(is_chosen)
            if is_chosen:
                chosen[name] = parameter
        return chosen

    def loss(
        self, stage: str, chosen: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch of pictures (B,), and (2, columns) right and asked."""
        options = self.recipe.stages[stage]
        count = len(chosen)
        shown = torch.cat((chosen, self.pictures.some(options.more, generator)))
        concept = self.pictures.concept[shown]
        with torch.autocast(self.device.type, torch.bfloat16):
            pixels, colour = self.pictures.draw(shown, generator)
            tokens = self.image_tokens(pixels)
            wanted = self.wanted(concept, colour)
            reading, counts = self.words_loss(tokens, wanted)
            if stage == "words":
                return reading, counts
            chance = torch.rand(count, generator=generator, device=self.device)
            is_told = (chance < options.told)[:, None, None]
            truth = self.table[wanted[:count]]
            loss, answered = self.answer_loss(
                torch.where(is_told, truth, tokens[:count]),
                concept[:count],
                colour[:count],
                options,
                generator,
            )
            return loss + options.reading * reading, counts + answered

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Return what the language model gets of pictures in 0..255: (B, 3, 64, 64) -> (B, S, D)."""
        features = self.model.get_image_features(normalise(pixels), return_dict=True)
        return torch.stack(list(features.pooler_output)).float()

    # -- image tokens as words ------------------------------------------------------------------------------------

    def wanted(self, concept: Tensor, colour: Tensor) -> Tensor:
        """Return what image tokens are to say, as places in the table of words: (B, S)."""
        words = self.captions[concept].clone()
        place = sum(PARTS.values()) - 1
        words[:, place] = self.colours[colour]  # -1: the last, of no name
        return words

    def words_loss(self, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Draw image tokens (B, S, D) to the embeddings of their words (B, S): loss, and right and asked."""
        # embeddings share a large mean, which tells no word from another
        mean = self.table.mean(0)
        table = self.table - mean
        with torch.autocast(self.device.type, enabled=False):
            centred = tokens - mean
            cosines = F.normalize(centred, dim=-1) @ F.normalize(table, dim=-1).T
            logits = SHARPNESS * cosines.transpose(1, 2)
            told = F.cross_entropy(logits, wanted, reduction="none")
            target = table[wanted]
            away = (centred - target).square().sum(-1) / target.square().sum(-1)
            weights = torch.ones_like(away)
            weights[:, : PARTS["name"]] = NAME_WEIGHT
            losses = told + AWAY_WEIGHT * away
            loss = (weights * losses).sum() / weights.sum()
        right = cosines.argmax(-1) == wanted
        counts = torch.zeros(2, len(COLUMNS), device=self.device)
        start = 0
        for index, count in enumerate(PARTS.values()):
            all_right = right[:, start : start + count].all(1)
            counts[0, index] = all_right.sum()
            counts[1, index] = len(all_right)
            start += count
        return loss, counts

    # -- answers --------------------------------------------------------------------------------------------------

    def answer_loss(
        self,
        tokens: Tensor,
        concept: Tensor,
        colour: Tensor,
        stage: Stage,
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        """Answer questions about pictures, and some without: loss an answer token, and right and asked.

        All questions about a picture lie behind it in one row and do not see each other.
        """
        rows, kinds = self.questions.ask(concept, colour, stage.questions, generator)
        without = self.questions.ask_text(stage.texts, generator)
        text = len(COLUMNS) - 1
        seen = PackedRows(
            [[self._question(row) for row in about] for about in rows.tolist()],
            (kinds + len(PARTS)).tolist(),
            len(self.front) + tokens.shape[1],
        )
        read = PackedRows(
            [[self._question(row)] for row in without.tolist()],
            [[text]] * len(without),
            0,
        )
        losses, counts = [], torch.zeros(2, len(COLUMNS), device=self.device)
        for packed, pictures in ((seen, tokens), (read, None)):
            loss, count = self._answered(packed, pictures)
            losses.append(loss)
            counts += count
        return torch.cat(losses).mean(), counts

    def _question(self, row: int) -> tuple[list[int], int]:
        """Return a question behind its picture with its answer and the end, and how long the answer is."""
        encoded: Encoded = self.questions.encoded(row)
        ids = encoded.ids[encoded.image_start + encoded.n_image :]
        return ids, encoded.n_answer

    def _answered(
        self, packed: PackedRows, pictures: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = self.device
        ids = packed.ids.to(device)
        if pictures is not None:
            ids[:, : len(self.front)] = self.front.to(device)
        embeds = self.adapter.word_embeddings(ids)
        if pictures is not None:
            start = len(self.front)
            behind = embeds[:, start + pictures.shape[1] :]
            front = embeds[:, :start]
            embeds = torch.cat((front, pictures.to(embeds.dtype), behind), 1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=packed.mask(embeds.dtype).to(device),
            position_ids=packed.positions.to(device),
            use_cache=False,
        ).last_hidden_state
        predicting = packed.predicting.to(device)
        logits = self.model.lm_head(hidden[predicting]).float()
        answers = packed.answers.to(device)
        losses = F.cross_entropy(logits, answers, reduction="none")
        misses = torch.zeros(len(packed.columns), device=device)
        wrong = (logits.argmax(-1) != answers).float()
        misses.index_add_(0, packed.question_of.to(device), wrong)
        counts = torch.zeros(2, len(COLUMNS), device=device)
        columns = torch.tensor(packed.columns, device=device)
        counts[0].index_add_(0, columns, (misses == 0).float())
        counts[1].index_add_(0, columns, torch.ones_like(misses))
        return losses, counts


class PackedRows:
    """Rows [image tokens | question answer end | question answer end | ...] whose questions see the picture alone.

    ids and positions (B, T); predicting (B, T) bool, whose logits give `answers` (N,) of the questions `question_of`
    (N,); columns: of the log, one a question.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[tuple[list[int], int]]],
        columns: Sequence[Sequence[int]],
        n_image: int,
    ) -> None:
        longest = n_image + max(sum(len(ids) for ids, _ in row) for row in rows)
        size = (len(rows), longest)
        self.ids = torch.zeros(size, dtype=torch.long)
        self.positions = torch.zeros(size, dtype=torch.long)
        self.positions[:, :n_image] = torch.arange(n_image)
        self.owner = torch.full(size, NONE)  # which question a token is of
        self.owner[:, :n_image] = -2
        self.predicting = torch.zeros(size, dtype=torch.bool)
        self.columns = [column for row in columns for column in row]
        answers, question_of, question = [], [], 0
        for place, row in enumerate(rows):
            start = n_image
            for ids, n_answer in row:
                end = start + len(ids)
                self.ids[place, start:end] = torch.tensor(ids)
                self.positions[place, start:end] = n_image + torch.arange(len(ids))
                self.owner[place, start:end] = question
                self.predicting[place, end - n_answer - 1 : end - 1] = True
                answers += ids[len(ids) - n_answer :]
                question_of += [question] * n_answer
                question += 1
                start = end
        self.answers = torch.tensor(answers)
        self.question_of = torch.tensor(question_of)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to attention scores: (B, 1, T, T), 0 where a token sees another."""
        same = self.owner[:, :, None] == self.owner[:, None, :]
        picture = (self.owner == -2)[:, None, :]
        size = self.ids.shape[1]
        past = torch.ones(size, size, dtype=torch.bool).tril()
        sees = (same | picture) & past
        lowest = torch.finfo(dtype).min
        return torch.where(sees, 0.0, lowest)[:, None].to(dtype)


# -- captions -----------------------------------------------------------------------------------------------------


def captions(kb: EmojiKB, adapter: VisionLanguageModel) -> tuple[Tensor, Tensor]:
    """Return the words of each concept's image tokens (C, S), as places in the list of all words' ids (V,)."""
    rows = []
    for concept in kb.concepts:
        row = []
        for part, count in PARTS.items():
            text = UNNAMED if part == "background" else " " + concept[part]
            row += _padded(adapter, text, count)
        rows.append(row + _padded(adapter, CLOSING, CLOSING_TOKENS))
    colours = [_ids(adapter, " " + name)[0] for name in kb.backgrounds]
    ids = torch.tensor(rows)
    words = torch.unique(torch.cat((ids.flatten(), torch.tensor(colours))))
    return torch.searchsorted(words, ids), words


def _ids(adapter: VisionLanguageModel, text: str) -> list[int]:
    ids: list[int] = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _padded(adapter: VisionLanguageModel, text: str, count: int) -> list[int]:
    ids = _ids(adapter, text)[:count]
    return ids + _ids(adapter, FILLER) * (count - len(ids))


def _colours(kb: EmojiKB, adapter: VisionLanguageModel, words: list[int]) -> list[int]:
    """Return the places of the colours' words, and last that of a background of no name."""
    names = [*(" " + name for name in kb.backgrounds), UNNAMED]
    return [words.index(_ids(adapter, name)[0]) for name in names]


@torch.no_grad()
def parts(trainee: Trainee) -> dict[str, Tensor]:
    """Return what is trained, as `mmedit_cli.assembled.packed` has it."""
    reader = "model.language_model."
    pairs = {}
    for name, module in trainee.model.named_modules():
        if name.startswith(reader) and ADAPTER in getattr(module, "lora_A", ()):
            second = module.lora_B[ADAPTER].weight * module.scaling[ADAPTER]
            pairs[name] = (module.lora_A[ADAPTER].weight, second)
    whole = {
        name.removeprefix("model."): value
        for name, value in trainee.select("joint").items()
        if "lora_" not in name
    }
    return assembled.packed(whole, pairs)


@torch.no_grad()
def start_from(trainee: Trainee, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Put earlier parts into a trainee; raise UserError where they are of another recipe."""
    try:
        for name, value in assembled.unpacked(tensors).items():
            path, _, part = name.rpartition(".")
            if part in ("lora_A", "lora_B"):
                layer = trainee.model.get_submodule(path)
                getattr(layer, part)[ADAPTER].weight.copy_(value)
            else:
                trainee.model.get_parameter(name).copy_(value)
    except (AttributeError, RuntimeError) as error:
        raise UserError(f"{origin}: parts of another recipe ({error})") from error
