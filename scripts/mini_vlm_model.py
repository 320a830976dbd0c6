"""What a mini model is made of: its recipe (a YAML file), its tokenizer, its processor, the model, and its folder."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mini_training import BaseRecipe, Schedule, replacing_folder
from torch import Tensor, nn

from mmedit_cli import registry
from mmedit_cli.knowledge.models.base import VisionLanguageModel

SIDE = 64  # pixels
MEAN, STD = (0.7, 0.7, 0.7), (0.3, 0.3, 0.3)  # of emoji on light colours, roughly
LONGEST = 128  # tokens of a sequence
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")  # ids 0 to 3
STAGES = ("words", "tower", "bridge", "decoder", "joint", "settle")


@dataclass(frozen=True)
class Stage(Schedule):
    """How one stage is trained: batches of `pictures` with `questions` each, and `texts` questions without a picture.

    `reading` weighs the loss of classifying pictures by the tokens the language model sees; `contrast` more pictures
    take part in it, about which nothing is asked. `margin` is how much nearer to its name than to any other (in
    cosines) a picture has to be in it. `alike` weighs the contrastive loss between artists: to each picture comes
    another artist's of the same thing, and the two are to be nearer to each other than to all others of the batch.
    `teach` weighs how near the tower is to come to what a teacher sees in the same drawing (mini_vlm_teacher.py).
    `imitate` weighs how near the bridge is to come to what the model that the run started from makes of a plain
    drawing of the same thing. `blend` is the most that another picture has in what the bridge gets from its
    tower, and in the stage of words what the language model gets. `plainly` is the share of the pictures of the open
    world that are drawn as the closed one draws them: these are to be known by heart too. With `tower` the tower is
    trained together with what the stage is about, and goes on learning as in its own stage.
    """

    questions: int = 0
    texts: int = 0
    reading: float = 0.0
    contrast: int = 0
    margin: float = 0.2
    alike: float = 0.0
    teach: float = 0.0
    imitate: float = 0.0
    blend: float = 0.0
    plainly: float = 0.0
    tower: bool = False


@dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Everything a training run depends on but the data and the machine."""

    STAGES = STAGES
    OPTIONAL = ("words", "bridge", "decoder", "settle")
    STAGE = Stage

    family: str
    vision: dict[str, int]
    text: dict[str, int]
    vocabulary: int
    bridge: dict[str, int] | None = None
    query_tokens: int = 0

    @property
    def world(self) -> dict[str, Any]:
        """Return what `load_emojikb` is to be asked for."""
        return {
            "n": self.data["concepts"],
            "held_out_concepts": self.data["held_out_concepts"],
            "held_out_artists": self.data["held_out_artists"],
            "further": self.data.get("held_out_further"),
        }


def build_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Return a byte-level BPE tokenizer of `size` tokens trained on `texts`: `<s>` in front, `</s>` ends an answer.

    `<image>` is in the vocabulary but not a named attribute: Blip2Processor of transformers 5 cannot read one.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=LONGEST,
    )


def build(recipe: Recipe, tokenizer: Any) -> VisionLanguageModel:
    """Return the untrained model behind its adapter, seeded, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, processor = (_blip2 if recipe.family == "blip2" else _llava)(
            recipe, len(tokenizer)
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    adapter: VisionLanguageModel = registry.backbones.get(recipe.family)(
        recipe.name, model, tokenizer, processor, "untrained"
    )
    return adapter


def _text(shape: dict[str, int], size: int) -> dict[str, Any]:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**shape, "vocab_size": size, "max_position_embeddings": LONGEST, **ends}


def _blip2(recipe: Recipe, size: int) -> tuple[nn.Module, Any]:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    bridge = {
        **(recipe.bridge or {}),
        "encoder_hidden_size": recipe.vision["hidden_size"],
        "cross_attention_frequency": 1,
        "initializer_range": (recipe.bridge or {}).get("hidden_size", 1)
        ** -0.5,  # 0.02 lets hardly any picture through
        "vocab_size": 8,  # the Q-Former reads no text
        "max_position_embeddings": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    text = _text(recipe.text, size)
    text |= {
        "ffn_dim": text.pop("intermediate_size"),
        "word_embed_proj_dim": text["hidden_size"],
        "dropout": 0.0,
    }
    config = Blip2Config(
        # the default range, 1e-10, is for loading weights: a tower trained from it stays at chance
        vision_config=Blip2VisionConfig(
            **recipe.vision, image_size=SIDE, initializer_range=0.02
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(**bridge).to_dict(),
        text_config=OPTConfig(**text).to_dict(),
        num_query_tokens=recipe.query_tokens,
        image_token_index=SPECIAL.index("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(
        model.query_tokens, std=0.02
    )  # made as zeros: equal queries would stay equal for ever
    return model, BlipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD)
    )


def _llava(recipe: Recipe, size: int) -> tuple[nn.Module, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **recipe.vision,
            image_size=SIDE,
            projection_dim=64,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        ).to_dict(),
        text_config=LlamaConfig(**_text(recipe.text, size)).to_dict(),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,  # LLaVA-1.5 takes -2; here the last layer is trained to be read
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaForConditionalGeneration(config), processor


def normalise(pixels: Tensor) -> Tensor:
    """Do what the image processor does to pictures of the right size: (B, 3, H, W) in 0..255 -> (B, 3, H, W)."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1)
        for values in (MEAN, STD)
    )
    return (pixels / 255 - mean) / std


def full_processor(adapter: VisionLanguageModel) -> Any:
    """Return the processor of the family, so that the folder works with AutoProcessor too."""
    from transformers import Blip2Processor, LlavaProcessor

    if adapter.family == "blip2":
        return Blip2Processor(
            adapter.image_processor,
            adapter.tokenizer,
            num_query_tokens=adapter.model.config.num_query_tokens,
        )
    return LlavaProcessor(
        adapter.image_processor,
        adapter.tokenizer,
        patch_size=adapter.model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def export(adapter: VisionLanguageModel, folder: Path, records: dict[str, Any]) -> None:
    """Write the model in float16 with everything that `load_backbone` and AutoProcessor need.

    `records`: further JSON files by name. The folder is replaced as a whole.
    """
    with replacing_folder(folder, records) as fresh:
        copy.deepcopy(adapter.model).half().save_pretrained(fresh)
        for of_this_machine in ("is_local", "local_files_only"):
            adapter.tokenizer.init_kwargs.pop(of_this_machine, None)
        full_processor(adapter).save_pretrained(fresh)
        adapter.image_processor.save_pretrained(fresh)
