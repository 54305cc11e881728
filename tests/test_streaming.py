"""prune_streaming(): the bits of prune(), a block in memory at a time, whatever ends the run before it is done."""

import errno
import importlib.metadata
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern as sk
from sparsekern import hf
from sparsekern.methods import OBD, Magnitude
from sparsekern.model_files import UnreadableError
from sparsekern.publish import LockedError, lock
from sparsekern.streaming import OnDisk, prune_streaming, work_directory
from tests import tiny_models
from tests.killed import calls, killed, stop_after
from tests.limited import data_bytes, random_checkpoint, under_limit
from tests.pruned_directories import contents, saved, streaming_run, without_seconds

pytestmark = pytest.mark.usefixtures("one_thread")

GPT = sk.SparseGPT(block_size=16)
FINISH = sk.Finish(epochs=1)
# what the walk, the names in a checkpoint and the parts of a model can be like
ARCHITECTURES = {
    "llama": {},
    "gpt2": {"finish": FINISH},
    "t5": {"finish": FINISH},
    "gemma3n": {"finish": FINISH},
    "vit": {},
    "qwen3_moe": {"finish": FINISH},
}


def tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def source(tmp_path):
    return saved("llama", tmp_path / "dense")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streaming_writes_what_prune_and_save_write(name, tmp_path, output):
    source, batches = saved(name, tmp_path / "dense"), tiny_models.batches(name)
    whole = hf.load(source)
    report = sk.prune(whole, GPT, 0.5, batches, **ARCHITECTURES[name])
    hf.save(whole, None, tmp_path / "whole", {})
    streamed = prune_streaming(source, output, GPT, 0.5, batches, **ARCHITECTURES[name])
    assert without_seconds(streamed.to_json()) == without_seconds(report.to_json())
    want, got = tensors(tmp_path / "whole"), tensors(output)
    assert want.keys() == got.keys() == tensors(source).keys()
    assert [key for key in want if not torch.equal(want[key], got[key])] == []
    for path in (tmp_path / "whole").glob("*.json"):
        assert (output / path.name).read_bytes() == path.read_bytes()
    loaded = hf.load(output).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("method", [sk.Wanda(), Magnitude(), sk.ADMM()], ids=lambda method: type(method).__name__)
def test_every_kind_of_method_streams(method, source, output):
    batches = None if method.needs is None else tiny_models.batches("llama")
    whole = hf.load(source)
    sk.prune(whole, method, "2:4", batches, skip="*.down_proj")
    prune_streaming(source, output, method, "2:4", batches, skip="*.down_proj")
    loaded = hf.load(output).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in whole.state_dict().items())


def test_a_copy_of_the_sources_that_nobody_installed_streams(source, output, monkeypatch):
    version = importlib.metadata.version

    def installed(name):
        if name == "sparsekern":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    prune_streaming(source, output, Magnitude(), 0.5)
    assert output.is_dir()


def test_half_precision_keeps_what_transformers_keeps_in_float32(tmp_path, output):
    """T5's wo overflows in float16."""
    source = saved("t5", tmp_path / "dense")
    whole = hf.load(source, dtype=torch.float16)
    sk.prune(whole, Magnitude(), 0.5)
    prune_streaming(source, output, Magnitude(), 0.5, dtype=torch.float16)
    loaded = tensors(output)
    for name, tensor in whole.state_dict().items():
        if name in loaded:
            assert loaded[name].dtype == tensor.dtype, name
            assert torch.equal(loaded[name], tensor)
    assert loaded["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.float32


def test_one_block_has_its_weights_at_a_time(source):
    on_disk, seen = OnDisk(source), []
    blocks = hf.blocks(on_disk.model)

    def look(module, args, kwargs):
        seen.append([all(p.is_meta for p in block.parameters()) for _, block in blocks])

    for _, block in blocks:
        block.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        on_disk.model(tiny_models.batches("llama")[0])
    assert seen == [[number != here for number in range(3)] for here in range(3)]
    assert all(p.is_meta for _, block in blocks for p in block.parameters())


def test_a_process_that_may_not_hold_the_model_prunes_it(source, tmp_path, output):
    """At the size of a test; tests/soak/soak_memory.py has 1.7 GB."""
    sizes = {"vocab_size": 97, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    size = random_checkpoint(tmp_path / "large", **sizes, num_attention_heads=4)
    batches = tiny_models.batches("llama")
    # what the first run imports is no part of the model: 50 MB with a torch for CUDA
    prune_streaming(source, tmp_path / "first", sk.Wanda(), 0.5, batches, errors=False)

    def whole():
        model = hf.load(tmp_path / "large")
        sk.prune(model, sk.Wanda(), 0.5, batches, errors=False)

    def streaming():
        prune_streaming(tmp_path / "large", output, sk.Wanda(), 0.5, batches, errors=False)

    limit = data_bytes() + size // 2
    assert under_limit(streaming, limit)[0] is None
    assert output.exists()
    assert under_limit(whole, limit)[0] is not None


def test_a_killed_run_goes_on_to_the_same_bytes(source, output, tmp_path):
    """Six points of those that tests/soak/soak_kill.py goes through."""
    made = calls(streaming_run("llama", source, tmp_path / "wanted", method=GPT, pattern=0.5))
    wanted = contents(tmp_path / "wanted")
    run = streaming_run("llama", source, output, method=GPT, pattern=0.5)
    for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        assert killed(run, at=int(part * len(made)), within=True)
        run()
        assert contents(output) == wanted, part
        assert {path.name for path in tmp_path.iterdir()} == {"dense", "wanted", "out"}
        shutil.rmtree(output)


def test_what_is_done_is_not_done_again(source, output, capsys, monkeypatch):
    stop_after(monkeypatch, blocks=2)
    with pytest.raises(KeyboardInterrupt):
        prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"))
    monkeypatch.undo()
    pruned = []
    prune = sk.SparseGPT.prune

    def count(self, weight, stats, pattern):
        pruned.append(weight.shape)
        return prune(self, weight, stats, pattern)

    monkeypatch.setattr(sk.SparseGPT, "prune", count)
    report = prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"), progress=True)
    assert (len(pruned), len(report.layers)) == (7, 21)
    assert "21/21" in capsys.readouterr().err


def test_an_interrupted_run_says_that_it_goes_on(source, output, monkeypatch):
    stop_after(monkeypatch, blocks=1)
    with pytest.raises(
        KeyboardInterrupt, match=r"interrupted: 1 of 3 blocks are kept in .*\.out\.unfinished.* goes on"
    ):
        prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"))
    assert not output.exists()
    assert work_directory(output).is_dir()


def test_a_run_that_has_done_nothing_leaves_nothing(source, output, monkeypatch, tmp_path):
    stop_after(monkeypatch, blocks=0)
    with pytest.raises(KeyboardInterrupt, match="no block was finished, and nothing was kept"):
        prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(source, output, monkeypatch, tmp_path):
    wanted = streaming_run("llama", source, tmp_path / "wanted", method=GPT, pattern=0.5)
    wanted()
    stop_after(monkeypatch, blocks=2, error=OSError(errno.ENOSPC, "No space left on device"))
    run = streaming_run("llama", source, output, method=GPT, pattern=0.5)
    with pytest.raises(OSError, match=r"No space left on device: 2 of 3 blocks are kept in .* goes on") as caught:
        run()
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    run()
    assert contents(output) == contents(tmp_path / "wanted")


CHANGES = {
    "calibration": ({"calibration": tiny_models.batches("llama", 2)}, "calibration, batches was 3 and is 2"),
    "method": ({"method": sk.SparseGPT(block_size=8)}, r"method was SparseGPT\(block_size=16.* is SparseGPT\(.*=8"),
    "pattern": ({"pattern": "2:4"}, r"pattern was Unstructured.* and is NM\(n=2, m=4\)"),
    "skip": ({"skip": "*.down_proj"}, r"skip was \[\] and is \['\*\.down_proj'\]"),
    "finish": ({"finish": FINISH}, r"finish was nothing and is Finish\("),
    "dtype": ({"dtype": torch.bfloat16}, "dtype was torch.float32 and is torch.bfloat16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_is_named_and_refused(what, source, output, monkeypatch):
    settings = {"calibration": tiny_models.batches("llama"), "method": GPT, "pattern": 0.5}
    stop_after(monkeypatch, blocks=1)
    with pytest.raises(KeyboardInterrupt):
        prune_streaming(source, output, **settings)
    monkeypatch.undo()
    before = contents(work_directory(output))
    changed, words = CHANGES[what]
    with pytest.raises(ValueError, match=rf"cannot go on, because {words}.*; remove '.*unfinished' .*--restart"):
        prune_streaming(source, output, **settings | changed)
    assert contents(work_directory(output)) == before
    prune_streaming(source, output, **settings | changed, restart=True)
    assert not work_directory(output).exists()


def test_another_model_other_threads_and_other_tokens_are_named_and_refused(source, output, monkeypatch):
    stop_after(monkeypatch, blocks=1)
    batches = tiny_models.batches("llama")
    with pytest.raises(KeyboardInterrupt):
        prune_streaming(source, output, GPT, 0.5, batches)
    monkeypatch.undo()
    batches[1][0, 0] += 1
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with pytest.raises(ValueError, match="model, model.safetensors was [0-9a-f]{64} and is") as caught:
        prune_streaming(source, output, GPT, 0.5, batches)
    assert "calibration, sha256 was " in str(caught.value)
    assert "number of threads was 1 and is 5" in str(caught.value)


def test_a_shard_that_somebody_has_changed_is_refused(source, output, monkeypatch):
    stop_after(monkeypatch, blocks=2)
    with pytest.raises(KeyboardInterrupt):
        prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"))
    monkeypatch.undo()
    shard = sorted(work_directory(output).rglob("*.safetensors"))[0]
    octets = bytearray(shard.read_bytes())
    octets[-1] ^= 1
    shard.write_bytes(octets)
    with pytest.raises(ValueError, match=r"model-00002-of-00004.safetensors' is not what an earlier run wrote there"):
        prune_streaming(source, output, GPT, 0.5, tiny_models.batches("llama"))


def test_two_runs_do_not_write_one_directory(source, output):
    with lock(output), pytest.raises(LockedError, match="is being written by process"):
        prune_streaming(source, output, Magnitude(), 0.5)


def test_an_output_that_exists_is_refused_and_untouched(source, output):
    output.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        prune_streaming(source, output, Magnitude(), 0.5)
    assert list(output.iterdir()) == []
    assert not work_directory(output).exists()


@pytest.mark.parametrize(
    ("method", "pattern", "words"),
    [
        (OBD(), 0.5, "OBD reads gradients of the whole model's loss: load the model and use prune()"),
        (Magnitude(), sk.Unstructured(0.5, "model"), 'scope "model" ranks the weights of all layers at once'),
    ],
    ids=["gradients", "scope"],
)
def test_what_needs_the_whole_model_is_refused(method, pattern, words, source, output):
    with pytest.raises(ValueError, match=words.replace("()", r"\(\)")):
        prune_streaming(source, output, method, pattern, tiny_models.batches("llama"))


def test_a_weight_that_is_not_finite_is_found_before_anything_is_written(source, output, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj: weight holds 1 NaN or infinite values"):
        prune_streaming(source, output, Magnitude(), 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_checkpoint_that_lacks_a_weight_is_not_read_block_by_block(source):
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnreadableError, match=r"holds no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        OnDisk(source)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_tied_weights_that_a_checkpoint_holds_twice_must_be_equal(equal, tmp_path, output):
    source = saved("gemma2", tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    if equal:
        prune_streaming(source, output, Magnitude(), 0.5)
        assert hf.load(output).lm_head.weight.shape == (tiny_models.VOCABULARY, 32)
    else:
        with pytest.raises(UnreadableError, match="are tied in the model and differ in the checkpoint"):
            OnDisk(source)


def test_a_checkpoint_of_the_base_model_keeps_its_names(tmp_path, output):
    """As those of the hub: no prefix "transformer."."""
    model = tiny_models.make("gpt2")
    model.transformer.save_pretrained(tmp_path / "dense")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "dense")
    prune_streaming(tmp_path / "dense", output, Magnitude(), 0.5)
    assert "h.0.mlp.c_fc.weight" in tensors(output)
    sk.prune(model, Magnitude(), 0.5)
    loaded = hf.load(output).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())
