"""The shipped model is what its training.json says it is, and the script that trained it still runs."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "sparsekern" / "demo_model"
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def facts():
    return json.loads((DEMO / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True, dtype=torch.float32).eval()


def read(name):
    return (DEMO / name).read_text(encoding="utf-8")


def runs_of_lines(text, lines_in_a_run=5):
    """Every run of that many non-blank lines, as tuples."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {tuple(lines[i : i + lines_in_a_run]) for i in range(len(lines) - lines_in_a_run + 1)}


def windows_perplexity(model, windows):
    """exp of the mean loss of ids [windows, window], each window on its own."""
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1]).logits
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_the_files_are_the_ones_that_training_wrote(facts):
    for name, expected in facts["sha256"].items():
        if name != "corpus_list":
            assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == expected, name


def test_the_directory_is_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 10e6


def test_the_model_is_a_bfloat16_llama_whose_layers_have_whole_groups_of_64(model):
    shipped = AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True)
    assert shipped.config.model_type == "llama"
    assert {p.dtype for p in shipped.parameters()} == {torch.bfloat16}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.in_features % 64 == 0, name


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x  # née, 日本\r\n", "", " \n\n    ", "a  b\x00\x0c", SEPARATOR])
def test_text_survives_the_vocabulary(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_held_out_text_survives_the_vocabulary(tokenizer):
    text = read("heldout.txt")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 3  # characters per token


def test_files_are_separated_by_one_token(tokenizer, facts):
    assert tokenizer(SEPARATOR)["input_ids"] == [tokenizer.eos_token_id]
    for text, files in (("heldout.txt", "heldout_files"), ("calibration.txt", "calibration_files")):
        assert read(text).count(SEPARATOR) == len(facts[files])


def test_held_out_perplexity_is_near_the_recorded_one(model, tokenizer, facts):
    ids = torch.tensor(tokenizer(read("heldout.txt"))["input_ids"])
    windows = ids[: len(ids) // facts["window"] * facts["window"]].view(-1, facts["window"])
    assert len(windows) == facts["heldout_windows"]
    # every eighth window: files differ, so the tolerance is wide
    measured = windows_perplexity(model, windows[::8])
    assert 0.75 <= measured / facts["heldout_perplexity"] <= 1.33


def test_held_out_perplexity_is_flat_where_the_learning_rate_falls_and_at_the_end(facts):
    curve = {row["step"]: row["heldout_perplexity"] for row in facts["curve"]}
    steps = facts["steps"]
    decay = steps - round(steps * facts["recipe"]["decay_fraction"])
    # at the constant rate, a tenth of all steps lowered it by less than a tenth; the decay is what ends it
    assert curve[decay - 600] < 1.10 * curve[decay]
    assert curve[steps] == min(curve.values())
    assert curve[steps - 100] < 1.01 * curve[steps]
    assert facts["heldout_perplexity"] == pytest.approx(curve[steps], rel=0.02)


def test_no_held_out_file_is_a_calibration_file(facts):
    assert not set(facts["heldout_files"]) & set(facts["calibration_files"])


def test_no_five_lines_of_the_held_out_text_occur_in_the_calibration_text():
    heldout, calibration = (read(name).split(SEPARATOR) for name in ("heldout.txt", "calibration.txt"))
    held = set().union(*map(runs_of_lines, heldout))
    assert len(held) > 1000
    assert not held & set().union(*map(runs_of_lines, calibration))


def test_no_path_of_the_machine_that_trained_it_is_in_the_card_or_the_configuration(facts):
    names = facts["heldout_files"] + facts["calibration_files"]
    assert not [name for name in names if Path(name).is_absolute()]
    for name in ("README.md", "training.json", "config.json", "tokenizer_config.json", "generation_config.json"):
        assert not any(root in read(name) for root in ("/home/", "/root/", "/Users/", "/tmp/")), name


def test_the_training_script_runs_at_a_tiny_size_and_its_directory_loads(tmp_path):
    script = ROOT / "bench" / "train_demo_model.py"
    subprocess.run(
        [sys.executable, script, "--out", tmp_path, "--tiny", "--threads", "1"], check=True, timeout=120, cwd=tmp_path
    )
    tiny_facts = json.loads((tmp_path / "training.json").read_text())
    tiny_tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tiny_model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32)
    text = (tmp_path / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tiny_tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // tiny_facts["window"] * tiny_facts["window"]].view(-1, tiny_facts["window"])
    assert windows_perplexity(tiny_model, windows) == pytest.approx(tiny_facts["heldout_perplexity"], rel=1e-3)
    assert tiny_facts["curve"][-1]["heldout_perplexity"] < tiny_facts["curve"][0]["heldout_perplexity"]
