"""multi-melo: blocks that leave all else alone, routing once a request, saving, peft, and encoders of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUERIES, SHAPES
from safetensors.torch import load_file

from mmedit_cli import registry
from mmedit_cli.errors import HparamsError, MmeditError, StateError
from mmedit_cli.hparams import load_hparams
from mmedit_cli.knowledge.evaluation.protocol import Protocol, evaluate_edits
from mmedit_cli.knowledge.evaluation.report import build_report
from mmedit_cli.knowledge.methods.multi_melo.editor import MultiMelo
from mmedit_cli.knowledge.methods.shared.lora_blocks import add_blocks, fresh_blocks
from mmedit_cli.knowledge.models.shared.loading import load_backbone
from mmedit_cli.records import Run
from mmedit_cli.types import EditCase, Query

REQUESTS = (
    Query("What is this?", "a blue star", SHAPES / "solid/red-circle.png"),
    Query("Which colour is it?", "green", SHAPES / "outlined/blue-cross.png"),
    Query(
        "What can you see in the picture?",
        "a yellow house",
        SHAPES / "corner/green-ring.png",
    ),
    Query("What is drawn here?", "a boat", SHAPES / "solid/blue-star.png"),
    Query("What is that?", "a red tree", SHAPES / "outlined/yellow-cross.png"),
)
OTHER = (
    Query("Name the thing!", "a ring", SHAPES / "corner/red-ring.png"),
    Query("What is the capital of Peru?", "Lima"),
)
NARROW = 'reach={"question": 0.01, "image": 0.01, "state": 0.01}'  # random models see little difference


def editor_on(backbone, *overrides, seed=0):
    hparams = load_hparams(
        registry.hparams_file("multi-melo"),
        MultiMelo.Hparams,
        variant=backbone.name,
        overrides=(NARROW, *overrides),
    )
    return MultiMelo(backbone, hparams, seed=seed)


@pytest.fixture
def editor(backbone):
    """An editor whose edits reach hardly beyond their own request."""
    made = editor_on(backbone, "steps=60")
    yield made
    made.undo()


@pytest.fixture
def small():
    """One tiny model of its own."""
    return load_backbone("tiny-blip2", device="cpu")


@torch.no_grad()
def logits(backbone, queries):
    return backbone.logits(backbone.batch(queries))


def test_without_a_block_nothing_changes_and_rows_of_a_batch_do_not_mix(editor):
    """[none, edit 1, none, edit 3] in one batch: the first and third row bit for bit, the others as alone."""
    backbone = editor.backbone
    mixed = (OTHER[0], REQUESTS[0], OTHER[1], REQUESTS[2])
    base = logits(backbone, mixed)
    editor.edit(REQUESTS)
    assert editor.routes((*mixed, *OTHER)) == [None, 1, None, 3, None, None]
    assert editor.affects(mixed) == [False, True, False, True]
    edited = logits(backbone, mixed)
    assert torch.equal(edited[[0, 2]], base[[0, 2]])
    assert torch.equal(logits(backbone, OTHER), base_of(editor, OTHER))
    for row in (1, 3):
        assert not torch.allclose(edited[row], base[row], atol=1e-2)
        length = backbone.batch([mixed[row]]).input_ids.shape[1]
        assert torch.allclose(
            edited[row, :length], logits(backbone, mixed[row : row + 1])[0], atol=1e-5
        )


def base_of(editor, queries):
    """The logits of the untouched model."""
    tensors, metadata = editor.state()
    editor.undo()
    found = logits(editor.backbone, queries)
    editor.load_state(tensors, metadata)
    return found


def test_an_edit_is_generated_token_by_token(editor):
    backbone = editor.backbone
    before = backbone.generate(OTHER)
    editor.edit(REQUESTS[:3])
    assert backbone.generate((*REQUESTS[:3], *OTHER)) == [
        "a blue star",
        "green",
        "a yellow house",
        *before,
    ]


@pytest.mark.parametrize("router", ["router=backbone", "router=melo"])
def test_a_request_is_routed_once_however_long_the_answer(small, router):
    editor = editor_on(small, "steps=5", router, "cluster_radius=0.1")
    editor.edit(REQUESTS[:2])
    searches = []
    for length in (1, 20):
        before = editor._index.searches
        small.generate(REQUESTS[:2], max_new_tokens=length)
        searches.append(editor._index.searches - before)
    assert searches == [1, 1]


def test_the_answer_is_no_part_of_the_key(editor):
    editor.edit(REQUESTS[:1])
    other = [
        replace(REQUESTS[0], target=target)
        for target in ("a blue star", "something else entirely", "x")
    ]
    assert editor.routes(other) == [1, 1, 1]
    keys = editor._keys_of(other[:2])
    for part in keys.parts.values():
        assert torch.allclose(part[0], part[1], atol=1e-5)


def test_edits_share_blocks_in_order_and_the_bank_grows(small):
    editor = editor_on(small, "steps=2", "edits_per_block=2")
    editor.edit(REQUESTS)
    assert editor._blocks == [0, 0, 1, 1, 2]
    for i in range(40):
        editor.edit(
            [Query(f"What is number {i}?", "it", SHAPES / "solid/blue-star.png")]
        )
    assert editor._blocks[-1] == 42
    assert len(editor._bank) == 43


def test_a_new_block_changes_no_bit(backbone):
    editor = editor_on(backbone)
    prefix = backbone.prefix(backbone.batch(REQUESTS), editor.first_layer)
    base = backbone.resume(prefix)
    with editor._using(
        fresh_blocks(editor._bank.shapes, 8, [1]),
        torch.zeros(len(REQUESTS), dtype=torch.long),
    ):
        assert torch.equal(backbone.resume(prefix), base)
    x = torch.randn(2, 3, 4)
    assert (
        add_blocks(x, x, editor._bank.blocks, "any", torch.tensor([-1, -1]), 1.0)
        is None
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_a_block_leaves_every_other_bit_alone(small, decay):
    editor = editor_on(small, "steps=10", f"weight_decay={decay}")
    editor.edit(REQUESTS[:2])
    weights = {
        name: tensor.clone() for name, tensor in small.model.state_dict().items()
    }
    blocks = editor._bank.tensors()
    editor.edit(REQUESTS[2:])
    for name, tensor in editor._bank.tensors().items():
        assert torch.equal(tensor[:2], blocks[name]), name
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("more", [(), ("jitter=0.3",), ("stop_loss=1.0",)])
def test_blocks_trained_together_are_those_trained_alone(small, more):
    together, alone = (
        editor_on(small, "steps=10", "learning_rate=1e-3", *more) for _ in range(2)
    )
    made = together.edit(REQUESTS)
    tensors, steps = together._bank.tensors(), []
    together.undo()
    for request in REQUESTS:
        steps += alone.edit([request]).info["steps"]
    assert made.info["steps"] == steps
    for name, tensor in alone._bank.tensors().items():
        assert torch.allclose(tensor, tensors[name], atol=1e-5), name


def test_an_early_stop_keeps_the_block_as_it_was_then(small):
    editor = editor_on(small, "steps=60", "stop_loss=1.0")
    info = editor.edit(REQUESTS).info
    assert info["routed"]
    assert all(loss < 1 for loss in info["losses"])
    assert len(set(info["steps"])) > 1
    blocks = editor._bank.blocks.select(range(len(REQUESTS)))
    for i, request in enumerate(REQUESTS):
        batch = small.batch([request])
        at, right = batch.target_positions(small.end_id)
        with editor._using(blocks, torch.tensor([i])), torch.no_grad():
            loss = torch.nn.functional.cross_entropy(small.logits(batch)[at], right[at])
        assert float(loss) == pytest.approx(info["losses"][i], abs=1e-4)


def test_undo_in_a_shared_block_makes_it_again_without_the_edit(small):
    editor = editor_on(small, "steps=10", "edits_per_block=2")
    editor.edit(REQUESTS[:2])
    editor.edit(REQUESTS[2:4])
    untouched = {
        name: tensor[1].clone() for name, tensor in editor._bank.tensors().items()
    }
    editor.undo([1])
    left = editor._bank.tensors()
    assert editor.routes(REQUESTS[:4]) == [None, 2, 3, 4]
    radii = editor._index.radii.clone()
    editor.undo()
    fresh = editor_on(small, "steps=10", "edits_per_block=2")
    fresh.edit(REQUESTS[1:2])
    fresh.edit(REQUESTS[2:4])
    for name, tensor in fresh._bank.tensors().items():
        assert torch.equal(left[name], tensor)
        assert torch.equal(left[name][1], untouched[name])
    assert torch.allclose(radii, fresh._index.radii, atol=1e-5)


def test_a_newer_answer_takes_over_until_it_is_undone(editor):
    backbone = editor.backbone
    editor.edit(REQUESTS[:1])
    again = editor.edit([replace(REQUESTS[0], target="green")])
    assert backbone.generate(REQUESTS[:1]) == ["green"]
    editor.undo(again.ids)
    assert backbone.generate(REQUESTS[:1]) == ["a blue star"]


def test_a_fact_without_a_picture(editor):
    backbone = editor.backbone
    editor.edit([Query("What is the capital of Peru?", "green"), REQUESTS[0]])
    assert backbone.generate(OTHER[1:]) == ["green"]
    seeing = replace(OTHER[1], image=REQUESTS[0].image)
    assert editor.routes([OTHER[1], seeing, REQUESTS[0]]) == [1, None, 2]


def test_labels_are_words_but_in_the_published_code_sums_of_tokens(small):
    right, published = (
        editor_on(small, "router=melo"),
        editor_on(small, "router=melo", "mode=reference"),
    )
    requests = [
        replace(REQUESTS[0], target=target)
        for target in ("A  blue star", "a blue star", "green")
    ]
    labels = [right._label(request) for request in requests]
    assert labels[0] == labels[1] != labels[2]
    encoded = small.encode(requests[1])
    assert published._label(requests[1]) == sum(encoded.ids[-encoded.n_answer :])


def test_melo_replays_its_lossy_splits_without_the_edit_that_goes(small):
    radius = "cluster_radius=5"  # of random states: all in one cluster's reach
    editor, without = (
        editor_on(small, "steps=2", "router=melo", radius, "mode=reference")
        for _ in range(2)
    )
    for request in REQUESTS:
        editor.edit([request])
    editor.undo([2])
    clusters = list(editor._index.clusters)
    editor.undo()
    for request in (REQUESTS[0], *REQUESTS[2:]):
        without.edit([request])
    for ours, theirs in zip(clusters, without._index.clusters, strict=True):
        assert torch.allclose(ours.centre, theirs.centre, atol=1e-5)
        assert ours.radius == pytest.approx(theirs.radius, abs=1e-5)
        assert [row for _, row in ours.points] == [row for _, row in theirs.points]


def test_a_damaged_state_is_refused(editor):
    editor.edit(REQUESTS[:2])
    tensors, metadata = editor.state()
    first = next(name for name in tensors if name.startswith("a."))
    for broken in (
        {name: tensor for name, tensor in tensors.items() if name != first},
        {**tensors, first: tensors[first][..., :1]},
        {**tensors, "block": torch.tensor([0, 7])},
        {**tensors, "seen": tensors["seen"][:1]},
    ):
        with pytest.raises(StateError, match=r"does not hold|names a block"):
            editor.load_state(broken, metadata)


def test_a_block_is_a_lora_adapter_of_peft_and_comes_back_with_the_same_bytes(
    small, tmp_path
):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    editor = editor_on(small, "steps=20", "scale=0.5")
    editor.edit(REQUESTS[:2])
    editor.export_block(2, tmp_path / "block")
    wanted, blocks = logits(small, REQUESTS[1:2]), editor._bank.tensors()
    editor.undo([2])
    edited = editor.import_block(tmp_path / "block", REQUESTS[1])
    assert edited.ids == (3,)
    for name, tensor in editor._bank.tensors().items():
        assert torch.equal(tensor, blocks[name])
    assert torch.equal(logits(small, REQUESTS[1:2]), wanted)
    editor.undo()

    config = LoraConfig.from_pretrained(tmp_path / "block")
    assert (config.r, config.lora_alpha) == (8, 4)
    inject_adapter_in_model(config, small.model)
    tensors = load_file(tmp_path / "block" / "adapter_model.safetensors")
    result = set_peft_model_state_dict(
        small.model,
        {
            name.removeprefix("base_model.model."): tensor
            for name, tensor in tensors.items()
        },
    )
    assert not result.unexpected_keys
    assert torch.allclose(logits(small, REQUESTS[1:2]), wanted, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(small, tmp_path):
    editor = editor_on(small, "steps=1")
    editor.edit(REQUESTS[:1])
    with pytest.raises(StateError, match="no edit 9"):
        editor.export_block(9, tmp_path)
    editor.export_block(1, tmp_path / "block")
    for overrides, problem in ((("rank=4",), "r 8"), (("layers=[4]",), "does not fit")):
        with pytest.raises(StateError, match=problem):
            editor_on(small, *overrides).import_block(tmp_path / "block", REQUESTS[0])
    with pytest.raises(StateError, match=r"adapter_config\.json: no such file"):
        editor.import_block(tmp_path, REQUESTS[0])


def test_routing_is_part_of_the_report(small, tmp_path):
    cases = [
        EditCase(str(i), q, {"text": (q,)}, {"image": OTHER[:1]})
        for i, q in enumerate(REQUESTS[:3])
    ]
    editor = editor_on(small, "steps=3")
    protocol = Protocol(sequential=3, report_at=(1,), protocols=("tf_em",))
    with Run.open(tmp_path / "run", {}, {}) as run:
        evaluate_edits(editor, cases, run, protocol)
        report = build_report({}, run.read("cases"), run.read("edits"), 3)
    routing = [milestone["routing"] for milestone in report["milestones"]]
    right, nobody = (
        {"right": 1.0, "other": 0.0, "none": 0.0},
        {"right": 0.0, "other": 0.0, "none": 1.0},
    )
    assert (
        routing
        == [{"reliability": right, "generality.text": right, "locality.image": nobody}]
        * 2
    )


def test_the_model_cannot_be_called_past_the_backbone(small):
    editor = editor_on(small, "steps=1")
    editor.edit(REQUESTS[:1])
    batch = small.batch(QUERIES[1:2])
    with pytest.raises(MmeditError, match="ask the backbone"):
        small.generator(input_ids=batch.input_ids)
    editor.undo()
    small.generator(input_ids=batch.input_ids)


def test_hyper_parameters_that_cannot_work(small):
    for override, problem in (
        ("layers=[0]", "lowest edited layer"),
        ("layers=[9]", "has the layers 0 to 5"),
    ):
        with pytest.raises(HparamsError, match=problem):
            editor_on(small, override)
    for override in (
        "mode=reference",
        "leaky_keys=true",
        "rank=0",
        "layers=[]",
        "jitter=-1",
    ):
        with pytest.raises(HparamsError):
            editor_on(small, override)


@pytest.fixture
def encoders(tmp_path):
    """Random encoders of the kinds the hub has: a sentence encoder (BERT) and DINOv2 with a head of 10 classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        Dinov2Config,
        Dinov2ForImageClassification,
        PreTrainedTokenizerFast,
    )
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    words = sorted(
        {
            w
            for q in (*REQUESTS, *OTHER)
            for w in (q.prompt + " " + q.target).replace("?", "").split()
        }
    )
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "text")
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    BertModel(
        BertConfig(vocab_size=len(vocabulary), intermediate_size=32, **size)
    ).save_pretrained(tmp_path / "text")
    config = Dinov2Config(
        image_size=28, patch_size=14, mlp_ratio=2, num_labels=10, **size
    )
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "image")
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path / "image")
    return f"text_encoder={tmp_path / 'text'}", f"image_encoder={tmp_path / 'image'}"


def test_encoders_of_the_hub_tell_queries_apart(backbone, encoders):
    editor = editor_on(backbone, "router=hub", "steps=60", *encoders)
    before = backbone.generate(OTHER)
    editor.edit(REQUESTS)
    assert editor.routes((*REQUESTS, *OTHER)) == [1, 2, 3, 4, 5, None, None]
    assert backbone.generate((*REQUESTS[:1], *OTHER)) == ["a blue star", *before]
    editor.undo()


def test_the_published_router_and_its_leak(small, encoders):
    published = editor_on(small, "router=hub", "mode=reference", "steps=1", *encoders)
    published.edit(REQUESTS)
    assert published.routes(REQUESTS) == [1, 2, 3, 4, 5]
    assert published.routes(OTHER[1:]) == [None], "without a picture never"
    again = published.edit([replace(REQUESTS[0], target="another")])
    assert published.routes(REQUESTS[:1]) == [1], "the first wins for ever"
    published.undo(again.ids)
    published.undo()
    leaky = editor_on(
        small, "router=hub", "mode=reference", "leaky_keys=true", *encoders
    )
    texts = [
        leaky._keys_of([replace(REQUESTS[0], target=t)]).parts["question"]
        for t in ("a blue star", "green")
    ]
    assert not torch.allclose(*texts, atol=1e-3)


def clip_folder(folder: Path) -> Path:
    """A small CLIP with both of its halves, as published checkpoints have them."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    vision["projection_dim"] = 12
    text = {**sizes, "intermediate_size": 32, "vocab_size": 30}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


def vit_folder(folder: Path, kind: str = "vit") -> Path:
    """A small ViT that classifies; `kind` is what its config says it is."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = ViTConfig(
        **sizes, intermediate_size=32, image_size=28, patch_size=14, num_labels=10
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"vit"', f'"{kind}"'))
    return folder


@pytest.mark.parametrize(
    ("make", "smallest", "width"),
    [(clip_folder, -0.0115, 12), (vit_folder, -0.2437, 10)],
)
def test_each_published_encoder_has_its_own_constant(
    small, encoders, tmp_path, make, smallest, width
):
    text, _ = encoders
    image = f"image_encoder={make(tmp_path / 'other')}"
    options = ("router=hub", "mode=reference", "steps=1")
    editor = editor_on(small, *options, text, image)
    editor.edit(REQUESTS[:2])
    keys = editor._keys_of(REQUESTS[:2])
    assert keys.parts["image"].shape == (2, width)
    cosine = keys.parts["image"] @ keys.parts["image"].T
    text_score = (keys.parts["question"] @ keys.parts["question"].T - 0.1047) / 0.9081
    wanted = 2 - text_score - (cosine - smallest) / (1 - smallest)
    assert torch.allclose(editor._index.distance(keys, keys), wanted, atol=1e-5)


def test_an_encoder_without_a_published_constant_is_refused(small, encoders, tmp_path):
    text, _ = encoders
    image = f"image_encoder={vit_folder(tmp_path / 'other', kind='deit')}"
    editor = editor_on(small, "router=hub", "mode=reference", "steps=1", text, image)
    with pytest.raises(MmeditError, match="is a deit: mode: reference has no constant"):
        editor.edit(REQUESTS[:2])


def test_encoders_that_are_not_there(small):
    editor = editor_on(small, "router=hub", "text_encoder=nobody/nothing")
    with pytest.raises(MmeditError, match="nobody/nothing: not in the cache"):
        editor.edit(REQUESTS[:1])
