"""Batches that models other than decoders take: read, freed of padding, and pruned with from end to end."""

from collections import UserDict

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import sparsekern as sk
from sparsekern import hf
from sparsekern.allocation import CANDIDATES
from sparsekern.batches import Padding, map_tensors, read_batches
from sparsekern.calibrate import Walk
from tests import tiny_models
from tests.plain_statistics import EveryToken

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, tiny_models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
# two tokens of the second row are padding
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def masked(name):
    """Keyword batches as a processor makes them, masks and floats included."""
    batches = tiny_models.batches(name)
    for number, batch in enumerate(batches):
        batch = batches[number] = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
        if "input_ids" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1, -2:] = 0
        if name == "t5":
            batch["labels"] = batch.pop("decoder_input_ids")
    return batches


@pytest.mark.parametrize("name", ["vit", "clip", "blip", "llava", "whisper", "wav2vec2", "bert", "t5"])
@pytest.mark.parametrize("kind", [dict, UserDict], ids=["dict", "like a dict"])
def test_a_model_is_pruned_with_keyword_batches_and_still_runs(name, kind):
    model, batches = tiny_models.make(name), masked(name)
    before = [model(**batch)[0] for batch in batches]
    report = sk.prune(model, sk.SparseGPT(), "2:4", (kind(batch) for batch in batches))
    assert report.calibration == "replay"
    assert len(report.layers) == len(hf.layers(model)) >= 12
    for layer, (_, module) in zip(report.layers, hf.layers(model), strict=True):
        assert layer.sparsity == 0.5
        assert layer.held_out_error is not None
        groups = hf.weight(module).unflatten(1, (-1, 4))
        assert ((groups == 0).sum(dim=2) == 2).all()
    for batch, was in zip(batches, before, strict=True):
        now = model(**batch)[0]
        assert now.isfinite().all()
        assert not torch.equal(now, was)


def tokens_read(model, batch):
    return {name: stats.tokens for name, _, stats in Walk(model, [batch], EveryToken)}


def test_a_texts_mask_says_nothing_of_as_many_tokens_of_an_image():
    model = tiny_models.make("clip")
    read = tokens_read(model, {"input_ids": IDS, "pixel_values": IMAGES, "attention_mask": MASK})
    assert {count for name, count in read.items() if name.startswith("text")} == {8}
    assert {count for name, count in read.items() if name.startswith("vision")} == {10}


def test_a_decoder_beside_an_image_counts_its_text_and_all_of_the_image():
    model = tiny_models.make("blip")
    read = tokens_read(model, {"input_ids": IDS, "pixel_values": IMAGES, "attention_mask": MASK})
    image = ("vision", "crossattention.self.key", "crossattention.self.value")
    for name, count in read.items():
        assert count == (10 if name.startswith(image[0]) or name.endswith(image[1:]) else 8), name


def test_a_language_model_counts_an_images_tokens_among_its_own():
    model = tiny_models.make("llava")
    (batch,) = masked("llava")[:1]
    read = tokens_read(model, batch)
    assert {count for name, count in read.items() if "language_model" in name} == {2 * 15 - 2}
    assert {count for name, count in read.items() if "vision_tower" in name} == {2 * 5}


def test_a_block_of_a_plain_module_that_is_told_of_no_mask_leaves_padding_out():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(tiny_models.VOCABULARY, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    assert set(tokens_read(Plain(), {"input_ids": IDS, "attention_mask": MASK}).values()) == {8}


def test_a_mask_that_fits_nothing_removes_nothing():
    padding = Padding({"input_values": torch.randn(2, 40), "attention_mask": torch.zeros(2, 40, dtype=torch.long)})
    padding.enter({"hidden_states": torch.randn(2, 7, 4)})
    assert padding.removed(torch.randn(2, 7, 4)).shape == (14, 4)


def test_a_structured_value_keeps_its_kind():
    encoded = BaseModelOutput(last_hidden_state=torch.ones(1, 2), hidden_states=(torch.ones(1), None))
    (batch,) = read_batches([{"encoder_outputs": encoded, "input_ids": IDS, "return_dict": True}])
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert type(doubled["encoder_outputs"]) is BaseModelOutput
    assert doubled["encoder_outputs"].last_hidden_state.tolist() == [[2, 2]]
    assert doubled["encoder_outputs"].hidden_states[1:] == (None,)
    assert doubled["return_dict"] is True


def test_an_encoders_output_may_be_given_instead_of_its_input():
    model = tiny_models.make("t5")
    encoded = BaseModelOutput(last_hidden_state=torch.randn(2, 5, 32))
    report = sk.prune(model, sk.Wanda(), "2:4", [{"encoder_outputs": encoded, "decoder_input_ids": IDS}])
    assert {layer.name.partition(".")[0] for layer in report.layers} == {"decoder"}
    never = [name for name, reason in report.skipped if reason.startswith("never called")]
    assert {name.partition(".")[0] for name in never} == {"encoder"}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES, torch.zeros(2)), r"or a dict of what forward takes by keyword, .*, got tuple$"),
        (IMAGES, r"like {\"pixel_values\": images}, got torch.float32 \[2, 3, 16, 16\]$"),
        ("a text", r"got str; read_calibration\(texts, tokenizer\) makes batches of text$"),
        (["a text", "two"], r"got list; read_calibration\(texts, tokenizer\) makes batches of text$"),
        ({"input_ids": [[1, 2]]}, r'batch 1 holds lists and no tensor; call .* with return_tensors="pt"$'),
        ({"pixel_values": torch.zeros(0, 3, 16, 16)}, "batch 1 holds no tokens$"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_remedy(batch, message):
    with pytest.raises(ValueError, match=message):
        read_batches([{"pixel_values": IMAGES}, batch])


@pytest.mark.parametrize(
    "use",
    [
        lambda model, batches: sk.prune(model, sk.SparseGPT(), "2:4", batches, refine=2),
        lambda model, batches: sk.prune(model, sk.OBD(), "2:4", batches),
        lambda model, batches: sk.prune(model, sk.Wanda(), "2:4", batches, finish=sk.Finish(1)),
        lambda model, batches: sk.permute(model, "2:4", batches),
        lambda model, batches: sk.allocate(model, sk.Wanda(), 0.5, batches, candidates=CANDIDATES["owl"]),
    ],
    ids=["prune", "prune by gradients", "finish", "permute", "allocate"],
)
def test_a_generator_is_read_once_and_one_that_is_used_up_is_refused(use):
    model = tiny_models.make("llama")
    generator = (batch for batch in tiny_models.batches("llama"))
    use(model, generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch, got none; a generator gives its batches only once"):
        use(model, generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1)], ids=str)
def test_a_batch_of_one_token_serves(shape):
    model = tiny_models.make("llama")
    report = sk.prune(model, sk.SparseGPT(), "2:4", [torch.ones(shape, dtype=torch.long)])
    assert len(report.layers) == len(hf.layers(model))
    assert report.sparsity == 0.5


def test_dropout_does_not_reach_the_statistics_of_any_method():
    """Twice the same, in training mode; gradients are taken without it as well."""
    for method in (sk.Wanda(), sk.OBD()):
        models = [tiny_models.make("bert").train() for _ in range(2)]
        batches = [{"input_ids": IDS, "labels": IDS}]
        for model in models:
            sk.prune(model, method, 0.5, batches)
            assert model.training
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("tried to allocate 99 TB")


@pytest.mark.parametrize(
    "place",
    ["sparsekern.stats.Gram.add", "sparsekern.stats.Gram.inverse_cholesky", "sparsekern.methods.SparseGPT.prune"],
)
def test_without_memory_for_the_first_layer_no_weight_has_changed(place, monkeypatch):
    model = tiny_models.make("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(place, out_of_memory)
    with pytest.raises(RuntimeError, match="tried to allocate 99 TB"):
        sk.prune(model, sk.SparseGPT(), "2:4", tiny_models.batches("llama"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
