"""The commands: the main job from end to end, JSON that parses, and one clear line for every bad input."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsekern import grid
from sparsekern.cli import app
from sparsekern.demo import MODEL
from sparsekern.inspect import inspect
from sparsekern.methods import METHODS
from sparsekern.ops import compiled
from tests import tiny_models

CALIBRATION, HELDOUT = str(MODEL / "calibration.txt"), str(MODEL / "heldout.txt")
SMALL = ("--samples", "4", "--seqlen", "64")
ONE_BLOCK = ("--skip", "model.layers.[123].*")


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """A short held-out text, so that perplexity takes no time."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text((MODEL / "heldout.txt").read_text()[:4000])
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, heldout):
    """The shipped model, pruned 2:4 on the command line."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    run("prune", MODEL, "--pattern", "2:4", "--calibration", CALIBRATION, "--heldout", heldout, *SMALL, "-o", out)
    return out


@pytest.mark.parametrize("command", ["prune", "bench", "eval", "inspect", "verify", "convert", "doctor", "demo"])
def test_help_shows_an_example(command):
    assert f"sparsekern {command}" in run(command, "--help").output


def test_the_help_of_all_says_where_to_begin_and_what_exit_codes_mean():
    said = " ".join(run("--help").output.split())
    assert "Begin with: sparsekern demo. Exit codes: 0 done, 2 bad input" in said


def test_prune_writes_a_checkpoint_that_plain_transformers_loads(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) <= 2).all()
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


def test_prune_leaves_its_report_and_a_card_with_the_command_and_the_figures(pruned):
    report = json.loads((pruned / "sparsekern.json").read_text())
    assert report["report"]["sparsity"] == 0.5
    assert report["perplexity"]["after"]["value"] > report["perplexity"]["before"]["value"] * 0.9
    card = (pruned / "README.md").read_text()
    assert f"pruned {report['perplexity']['after']['value']:.3f}" in card
    assert "sha256 of the dense model.safetensors" in card
    assert max(report["report"]["layers"], key=lambda layer: layer["held_out_error"])["name"] in card


def test_prune_permutes_first_when_asked_and_reports_it(tmp_path):
    args = ("prune", MODEL, "--method", "wanda", "--pattern", "2:4", "--permute", "--calibration", CALIBRATION, *SMALL)
    args = (*args, "-o", tmp_path / "out")
    permuted = json.loads(run(*args, "--json").stdout)["permuted"]
    assert permuted == json.loads((tmp_path / "out" / "sparsekern.json").read_text())["permuted"]
    assert len(permuted["sites"]) == 8
    assert all(site["kept"] and site["permuted"] > site["retained"] for site in permuted["sites"])


def test_prune_allocates_when_asked_and_reports_what_it_compared(tmp_path):
    args = ("prune", MODEL, "--method", "wanda", "--pattern", "0.6", "--allocation", "loss", *SMALL)
    args = (*args, "--calibration", CALIBRATION, *ONE_BLOCK)
    result = json.loads(run(*args, "-o", tmp_path / "out", "--json").stdout)
    allocated = result["allocated"]
    assert [row["candidate"].partition("(")[0] for row in allocated["proposals"]] == ["Uniform", "LossAware"]
    chosen = next(row for row in allocated["proposals"] if row["candidate"] == allocated["chosen"])
    assert chosen["loss"] == min(row["loss"] for row in allocated["proposals"])
    assert result["report"]["sparsity"] == pytest.approx(0.6, abs=1e-6)
    for layer in result["report"]["layers"]:
        assert layer["sparsity"] == pytest.approx(chosen["sparsities"][layer["name"]], abs=1e-6)


def test_prune_refines_finishes_and_quantises_when_asked_and_the_card_names_it(tmp_path):
    common = ("--calibration", CALIBRATION, *SMALL, *ONE_BLOCK, "--json")
    args = ("prune", MODEL, "--method", "wanda", "--pattern", "0.5", "--scope", "layer", *common)
    finished = json.loads(run(*args, "--refine", "3", "--finish", "1", "-o", tmp_path / "fitted").stdout)["report"]
    assert finished["method"] == "Refine(method=Wanda, steps=3)"
    assert finished["finish"] == "Finish(epochs=1, learning_rate=0.01)"
    assert [block["name"] for block in finished["blocks"]] == ["model.layers.0"]
    # Wanda itself would take half of every row
    rows = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted").model.layers[0].mlp.up_proj.weight == 0
    assert rows.float().mean() == 0.5
    assert rows.sum(dim=1).unique().numel() > 1
    card = (tmp_path / "fitted" / "README.md").read_text()
    assert "- method: `Refine(method=Wanda, steps=3)`, pattern 50%" in card
    assert "- finished: `Finish(epochs=1, learning_rate=0.01)`" in card
    gridded = json.loads(run(*args, "--refine", "3", "--bits", "8", "-o", tmp_path / "gridded").stdout)["report"]
    assert gridded["method"] == "GPTQ(bits=8, first=Refine(method=Wanda, steps=3))"
    assert gridded["grid"] == "8 bits with a scale for a row, stored dequantised in bfloat16"
    assert f"- weights: {gridded['grid']}" in (tmp_path / "gridded" / "README.md").read_text()


def test_with_bits_sparsegpt_rounds_in_its_one_sweep(tmp_path):
    args = ("prune", MODEL, "--method", "sparsegpt", "--bits", "4", "--group-size", "128", "--dtype", "float32")
    args = (*args, "--calibration", CALIBRATION, *SMALL, *ONE_BLOCK, "-o", tmp_path / "out", "--json")
    report = json.loads(run(*args).stdout)["report"]
    assert report["method"] == "SparseGPT(bits=4, group_size=128)"
    assert report["grid"] == "4 bits with a scale for every 128 inputs, stored dequantised in float32"
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight.detach()
    integers, _ = grid.recover(weight, 4, 128)
    assert integers.unique().tolist() == list(range(-7, 8))


def test_a_model_of_images_is_pruned_without_a_tokenizer_and_keeps_its_processor(tmp_path):
    tiny_models.make("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    run("prune", tmp_path / "vit", "--method", "magnitude", "--pattern", "2:4", "-o", tmp_path / "out")
    kept = (tmp_path / "out" / "preprocessor_config.json").read_text()
    assert kept == '{"image_processor_type": "ViTImageProcessor"}'
    assert {report.pattern for report in inspect(tmp_path / "out") if "encoder" in report.name} == {"2:4"}
    text = ("--calibration", CALIBRATION)
    refused = run("prune", tmp_path / "vit", "--pattern", "2:4", *text, "-o", tmp_path / "other", code=2)
    assert "cannot load tokenizer" in refused.stderr


def test_inspect_finds_the_pattern_in_what_prune_wrote(pruned):
    rows = json.loads(run("inspect", pruned, "--json").stdout)
    found = {row["pattern"] for row in rows if "_proj" in row["name"]}
    assert found == {"2:4"}
    assert "matrices" in run("inspect", pruned).output


def test_eval_gives_the_perplexity_that_prune_reported(pruned, heldout):
    result = json.loads(run("eval", pruned, "--text", heldout, "--seqlen", "64", "--json").stdout)
    report = json.loads((pruned / "sparsekern.json").read_text())
    assert result["value"] == pytest.approx(report["perplexity"]["after"]["value"], rel=1e-6)


def test_bench_times_a_checkpoint_after_checking_it(pruned):
    result = json.loads(run("bench", pruned, "--tokens", "1", "--seconds", "2", "--json").stdout)
    assert result["dense_bytes"] > 0


def test_bench_times_the_layers_of_real_shapes_with_random_weights(tmp_path):
    args = (
        "bench",
        "--config",
        "tiny",
        "--layers",
        "--tokens",
        "1,3",
        "--seconds",
        "2",
        "--plot",
        tmp_path / "speed.png",
        "--isa",
        "portable",
        "--json",
    )
    if compiled.cpu() is None:
        args = tuple(word for word in args if word not in ("--isa", "portable"))
    result = json.loads(run(*args).stdout)
    assert result["instruction_set"] == ("portable" if compiled.cpu() else None)
    assert {row["tokens"] for row in result["rows"]} == {1, 3}
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_bench_generates_with_a_random_model_of_a_published_shape(tmp_path):
    args = ("bench", "--config", "tiny", "--sparsity", "0.5,0.9", "--values", "bfloat16", "--seconds", "0")
    args += ("--new-tokens", "4", "--prompt", "3", "--blocks", "1", "--plot", tmp_path / "speed.png")
    result = json.loads(run(*args, "--json").stdout)
    names = ["dense", "own dense", "50% bfloat16", "90% bfloat16", "no linear layers"]
    assert [row["name"] for row in result["variants"]] == names
    assert all(row["decode_tokens_s"] > 0 for row in result["variants"])
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "× own dense" in run(*args).output


def test_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path):
    args = ("prune", MODEL, "--pattern", "2:4", "--calibration", CALIBRATION, "-o", tmp_path / "out", "--dry-run")
    planned = json.loads(run(*args, "--json").stdout)
    assert planned["decode_ceiling"] == pytest.approx(16 / 9)
    assert "nothing was written" in run(*args).output
    assert not (tmp_path / "out").exists()


def test_doctor_prints_json_and_tables():
    assert json.loads(run("doctor", "--json").stdout)["kernels"]
    assert "sparsekern._cpu" in run("doctor").output


NOWHERE, TOO_SHORT, OUT, HERE = "{dir}/nowhere", "{dir}/short.txt", "{dir}/out", "{dir}"
PRUNE = ("prune", MODEL, "-o", OUT, *SMALL)
CALIBRATED = (*PRUNE, "--calibration", CALIBRATION)
BAD = {
    "missing model": (("prune", NOWHERE, "-o", OUT, "--calibration", CALIBRATION), "no such directory"),
    "not a checkpoint": (("eval", HERE, "--text", HELDOUT), "holds no config.json"),
    "missing text": ((*PRUNE, "--calibration", f"{NOWHERE}.txt"), "no such file"),
    "short text": ((*PRUNE, "--calibration", TOO_SHORT), "a window needs 64 tokens"),
    "no calibration": (PRUNE, "method admm needs --calibration"),
    "unknown method": ((*PRUNE, "--method", "magic"), f"method must be one of {', '.join(METHODS)}, got 'magic'"),
    "permute without groups": ((*CALIBRATED, "--pattern", "0.5", "--permute"), "--permute helps N:M patterns only"),
    "permute without calibration": (
        (*PRUNE, "--method", "magnitude", "--permute"),
        "--permute needs --calibration",
    ),
    "unknown allocation": (
        (*CALIBRATED, "--allocation", "magic"),
        "must be one of uniform, owl, loss, best, got 'magic'",
    ),
    "allocation of groups": ((*CALIBRATED, "--allocation", "loss"), "--allocation loss needs a sparsity"),
    "allocation without calibration": (
        (*PRUNE, "--method", "magnitude", "--pattern", "0.5", "--allocation", "owl"),
        "--allocation owl needs --calibration",
    ),
    "finish without calibration": ((*PRUNE, "--method", "magnitude", "--finish", "1"), "--finish needs --calibration"),
    "refine without calibration": ((*PRUNE, "--method", "magnitude", "--refine", "9"), "--refine needs --calibration"),
    "refined gradients": ((*CALIBRATED, "--method", "obd", "--refine", "9"), "and obd reads gradients"),
    "finished gradients": ((*CALIBRATED, "--method", "obd", "--finish", "1"), "and obd reads gradients"),
    "quantised gradients": ((*CALIBRATED, "--method", "obd", "--bits", "8"), "and obd reads gradients"),
    "finish off the grid": ((*CALIBRATED, "--bits", "8", "--finish", "1"), "off the grid of --bits"),
    "refine off the grid": (
        (*CALIBRATED, "--method", "sparsegpt", "--bits", "8", "--refine", "9"),
        "would move weights off the 8-bit grid",
    ),
    "no such grid": ((*CALIBRATED, "--bits", "3"), "bits must be 4, 8 or None, got 3"),
    "groups without bits": ((*CALIBRATED, "--group-size", "64"), "--group-size 64 goes with --bits"),
    "negative refine": ((*CALIBRATED, "--refine", "-1"), "steps must be at least 1, got -1"),
    "negative finish": ((*CALIBRATED, "--finish", "-1"), "epochs must be at least 1, got -1"),
    "scope of groups": ((*CALIBRATED, "--scope", "row"), "--scope row needs a sparsity, got --pattern 2:4"),
    "unknown scope": ((*CALIBRATED, "--pattern", "0.5", "--scope", "head"), "scope must be"),
    "all layers at once": ((*CALIBRATED, "--pattern", "0.5", "--scope", "model"), "Magnitude and OBD can"),
    "unknown pattern": ((*CALIBRATED, "--pattern", "half"), "pattern must be N:M"),
    "sparsity out of range": ((*CALIBRATED, "--pattern", "1.5"), "must lie in 0..1, got 1.5"),
    "odd group": ((*CALIBRATED, "--pattern", "2:7"), "multiple of 7, got 256"),
    "existing output": (("prune", MODEL, "-o", HERE, "--calibration", CALIBRATION), "exists already"),
    "unknown dtype": ((*CALIBRATED, "--dtype", "int4"), "dtype must be one of"),
    "nothing to inspect": (("inspect", HERE), "holds no safetensors"),
    "bench of nothing": (("bench",), "exactly one of them"),
    "unknown config": (("bench", "--config", "gpt-9"), "no shapes are known of model 'gpt-9'"),
    "no windows": (("eval", MODEL, "--text", HELDOUT, "--seqlen", "0"), "seqlen must be at least 2, got 0"),
    "output below a file": (("prune", MODEL, "-o", f"{TOO_SHORT}/out", "--calibration", CALIBRATION), "is a file"),
    "dry run of a missing text": ((*PRUNE, "--calibration", f"{NOWHERE}.txt", "--dry-run"), "no such file"),
    "skip that names nothing": ((*CALIBRATED, "--skip", "nosuch*"), "names no layer"),
    "demo without windows": (("demo", "-o", OUT, "--windows", "0"), "must be positive"),
    "long windows": (
        ("eval", MODEL, "--text", HELDOUT, "--seqlen", "4096"),
        "at most the model's 1024 positions, got 4096",
    ),
    "tokens that are no numbers": (("bench", "--config", "tiny", "--layers", "--tokens", "one"), "tokens must be num"),
    "layers of a checkpoint": (("bench", "out", "--layers"), "--layers goes with --config"),
    "layers at two sparsities": (("bench", "--config", "tiny", "--layers", "--sparsity", "0.5,0.7"), "one sparsity"),
    "generate in float32": (("bench", "--config", "tiny", "--dtype", "float32"), "generate is timed in bfloat16"),
    "values that are none": (("bench", "--config", "tiny", "--values", "int7"), "values must be of bfloat16, int8"),
    "more blocks than there are": (("bench", "--config", "tiny", "--blocks", "3"), "blocks must be 1..2 of tiny"),
    "instruction set of no machine": (
        ("bench", "--config", "tiny", "--isa", "avx1024"),
        "does not have the instruction set avx1024, only" if compiled.cpu() else "without sparsekern._cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_writes_nothing(tmp_path, case):
    args, words = BAD[case]
    (tmp_path / "short.txt").write_text("too short")
    result = run(*(str(arg).format(dir=tmp_path) for arg in args), code=2)
    assert words in result.stderr
    assert result.stderr.startswith("error:")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
