"""BLIP-2 with FLAN-T5: an encoder reads picture and question, a decoder of its own writes the answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmedit_cli.errors import ModelError
from mmedit_cli.knowledge.models.shared.batch import Batch, Encoded, Prefix
from mmedit_cli.knowledge.models.shared.generation import WithoutQuestion
from mmedit_cli.knowledge.models.shared.prefix import entering, run_to
from mmedit_cli.knowledge.models.shared.qformer import QFormerModel
from mmedit_cli.pictures import Picture

_LONGEST = 512  # tokens, where the config does not say it: T5 was trained on so many


class Blip2T5(QFormerModel):
    """Blip2ForConditionalGeneration around T5 (Li et al. 2023, 3.3); [query tokens | prompt </s>] is encoded.

    A sequence is [query tokens | prompt </s> | answer] as in all families. The decoder has the same positions: it
    reads the answer there, the token that begins one at the position before it, and sees nothing of what stands
    before. T5 knows distances alone, so this is what it computes by itself. Its `layers` are those of the decoder.
    """

    family = "blip2-t5"
    encoder_decoder = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config.get_text_config()
        if config.scale_decoder_outputs:
            raise ModelError(
                f"{self.name}: its T5 scales what enters the head",
                "supported are T5 1.1 and FLAN-T5 (tie_word_embeddings: false)",
            )
        self._start_id: int = config.decoder_start_token_id or 0

    @classmethod
    def longest(cls, config: Any) -> int:
        """The tokens that T5 was trained to read."""
        length: int = getattr(config, "n_positions", _LONGEST)
        return length

    def _prompt_ids(self, text: str, n_image: int) -> tuple[list[int], int]:
        # any id will do at the image positions: their embeddings are overwritten
        return [self.pad_id] * n_image + self.token_ids(text), 0

    def _sequence(
        self, prompt: str, target: str | None, picture: Picture | None
    ) -> Encoded:
        """Return a prompt as token ids, and the answer as the decoder writes it: no part of the same text."""
        n_image = 0
        if picture is not None:
            n_image = self.n_image_tokens(picture)
        ids, start = self._prompt_ids(prompt, n_image)
        answer: list[int] = []
        if target is not None:
            answer = self.token_ids(target, add_special_tokens=False)
        whole = [*ids, *answer]
        return Encoded(whole, start, n_image, len(answer))

    def decoder_ids(self, batch: Batch) -> Tensor:
        """Return what the decoder reads, (B, T): the answer at its positions, the start token before it, padding."""
        unread = ~batch.answer_mask
        ids = batch.input_ids.masked_fill(unread, self.pad_id)
        begins = self._begins(batch)
        return ids.masked_fill(begins, self._start_id)

    def _read(self, batch: Batch) -> Tensor:
        """(B, T): 1 where the encoder reads."""
        picture = batch.image_mask
        words = batch.prompt_mask
        return (picture | words).long().to(self.device)

    def _begins(self, batch: Batch) -> Tensor:
        """(B, T) bool: the last position of the question."""
        read = self._read(batch).bool()
        following = read.roll(-1, dims=1)
        following[:, -1] = False
        goes_on = read & following
        return read & ~goes_on

    def _run_stack(self, embeds: Tensor, batch: Batch) -> Tensor:
        read = self._read(batch)
        encoder: nn.Module = self.generator.get_encoder()
        encoded = encoder(inputs_embeds=embeds, attention_mask=read)
        written = self._begins(batch) | batch.answer_mask
        ids = self.decoder_ids(batch)
        output = self._stack(
            inputs_embeds=self.word_embeddings(ids),
            attention_mask=written.long(),
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=read,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _run_to(
        self, layer: int, embeds: Tensor, batch: Batch
    ) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        """As for all families; the first layer makes the bias of positions that all others receive."""
        if layer == self.n_layers:
            return super()._run_to(layer, embeds, batch)
        end = self.layers[max(layer, 1)]

        def run() -> Tensor:
            return self._run_stack(embeds, batch)

        with entering(self.layers[0]) as first:
            hidden, others = run_to(run, end)
        start: Tensor = first.pop("hidden_states")
        if layer == 0:
            hidden = start
        above = [others] * (self.n_layers - 1)
        return hidden, (first, *above)

    def prefix_of(self, hidden: Tensor, batch: Batch, layer: int) -> Prefix:
        """As for all families, but every layer also sees what was encoded: that depends on the question itself."""
        self._check_layer(layer)
        if layer == self.n_layers:
            return Prefix(layer, batch, hidden, ())
        embeds, _ = self._entering(batch)
        with self._pass(batch):
            _, contexts = self._run_to(0, embeds, batch)
        return Prefix(layer, batch, hidden, contexts)

    def _generated(self, embeds: Tensor, batch: Batch, **options: Any) -> Tensor:
        """As for all families; the decoder begins with its start token, which is no part of the answer."""
        streamer = options.pop("streamer")
        options["generation_config"].decoder_start_token_id = self._start_id
        tokens: Tensor = self.generator.generate(
            inputs_embeds=embeds,
            attention_mask=self._read(batch),
            streamer=streamer and WithoutQuestion(streamer),
            **options,
        )
        return tokens[:, 1:]


BACKBONE = Blip2T5
