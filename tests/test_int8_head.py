"""An output embedding in int8 that the model ties: stored as it was rounded, beside the input embedding's own bits."""

import pytest
import torch
import transformers

import sparsekern as sk
from sparsekern import checkpoint, hf
from sparsekern.formats import Bitmap, BitmapInt8, Dense
from sparsekern.linear import SparseLinear
from tests import compressed, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(5)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tied model with its output embedding in int8, and where it was saved."""
    torch.manual_seed(0)
    model = compressed.halve(tiny_models.llama(tie_word_embeddings=True)).eval()
    sk.sparsify(model, plan=sk.Unmeasured(), lm_head="int8")
    directory = tmp_path_factory.mktemp("head") / "out"
    assert sk.save(model, directory).packed["lm_head"]["format"] == "bitmap_int8"
    return model, directory


def into_a_dense_model(directory):
    torch.manual_seed(1)
    return sk.load(directory, into=tiny_models.llama(tie_word_embeddings=True).eval())


@pytest.mark.parametrize(
    "load",
    [sk.load, into_a_dense_model, transformers.AutoModelForCausalLM.from_pretrained],
    ids=["load", "into", "from_pretrained"],
)
def test_what_is_loaded_has_the_same_integers_and_the_input_embeddings_own_bits(load, saved, tmp_path):
    model, directory = saved
    loaded = load(directory)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    for field in ("values", "scales", "bitmap", "row_offsets"):
        assert torch.equal(getattr(loaded.lm_head.packed, field), getattr(model.lm_head.packed, field)), field
    assert torch.equal(logits(loaded), logits(model))
    sk.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / compressed.SHARD).read_bytes() == (directory / compressed.SHARD).read_bytes()
    sk.densify(loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_verify_knows_the_output_embedding_as_a_packed_layer(saved):
    report = checkpoint.verify(saved[1])
    assert report.layers["lm_head"]["format"] == "bitmap_int8"
    assert report.model == "all that LlamaForCausalLM needs"


def test_a_base_model_is_loaded_without_the_output_embedding(saved):
    base = transformers.AutoModel.from_pretrained(saved[1])
    assert torch.equal(base.embed_tokens.weight, saved[0].model.embed_tokens.weight)


def test_converted_to_dense_the_model_ties_its_output_embedding_again(saved, tmp_path):
    model, directory = saved
    report = checkpoint.convert(directory, tmp_path / "dense", "dense")
    assert dict(report.left) == {"lm_head": "the model ties it to the input embedding, which keeps its bits"}
    dense = hf.load(tmp_path / "dense")
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    loaded = sk.load(directory)
    sk.densify(loaded)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_converted_to_another_format_it_stays_as_it_was_rounded(saved, tmp_path):
    model, directory = saved
    checkpoint.convert(directory, tmp_path / "bitmap", "bitmap")
    loaded = sk.load(tmp_path / "bitmap")
    assert {m.format for m in loaded.model.modules() if isinstance(m, SparseLinear)} == {Bitmap}
    assert loaded.lm_head.format is BitmapInt8
    assert torch.equal(logits(loaded), logits(model))


def test_what_has_the_input_embeddings_bits_is_stored_once(tmp_path):
    model = compressed.halve(tiny_models.llama(tie_word_embeddings=True))
    sk.sparsify(model, plan=sk.Unmeasured(Dense), lm_head="dense")
    assert "lm_head" not in sk.save(model, tmp_path / "out").packed
    assert not any("lm_head" in name for name in checkpoint.read_manifest(tmp_path / "out").tensors)


def test_a_tied_output_embedding_in_a_format_that_keeps_bits_is_refused(tmp_path):
    untied = compressed.halve(tiny_models.llama())
    with torch.no_grad():
        untied.lm_head.weight[:, ::2] = 0
    sk.sparsify(untied, plan=sk.Unmeasured(), skip=())
    sk.save(untied, tmp_path / "out")
    config = compressed.read(tmp_path / "out", "config.json")
    compressed.dump(tmp_path / "out", "config.json", config | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="lm_head: is packed, but LlamaForCausalLM ties its weight to another"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
