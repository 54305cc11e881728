"""The Trainer's callbacks: zeros through whatever a Trainer does, and what they refuse."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import sparsekern as sk
from sparsekern import hf
from sparsekern.hf_trainer import GradualPruning, KeepZeros
from tests import tiny_models

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": window, "labels": window} for window in TOKENS]


def settings(directory: Path, **changed) -> TrainingArguments:
    usual = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(directory), **usual | changed)


def trainer(model: nn.Module, directory: Path, *callbacks, **changed) -> Trainer:
    data = {"train_dataset": DATA, "eval_dataset": DATA[:4]}
    return Trainer(model, settings(directory, **changed), callbacks=list(callbacks), **data)


def dense() -> nn.Module:
    return tiny_models.make("llama")


def pruned(pattern="2:4") -> nn.Module:
    model = dense()
    sk.prune(model, sk.Magnitude(), pattern)
    return model


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: hf.weight(layer) == 0 for name, layer in hf.layers(model)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch(TrainerCallback):
    """Looks at weights and optimizer state after every step."""

    def __init__(self, wanted):
        self.wanted, self.steps = wanted, 0

    def on_step_end(self, args, state, control, model=None, optimizer=None, **others):
        self.steps += 1
        assert same(zeros(model), self.wanted)
        for name, layer in hf.layers(model):
            state = optimizer.state[layer.weight].values()
            held = [value for value in state if getattr(value, "shape", None) == layer.weight.shape]
            # Adafactor keeps rows and columns
            assert held or args.optim == "adafactor"
            assert not any(tensor[self.wanted[name]].any() for tensor in held)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optim": "rmsprop"},
        {"optim": "adafactor"},
    ],
    ids=["plain", "bfloat16, accumulated, clipped", "RMSprop", "Adafactor"],
)
def test_zeros_stay_after_every_step_in_weights_and_optimizer(tmp_path, changed):
    model = pruned()
    before, there = model.lm_head.weight.clone(), zeros(model)
    watch = Watch(there)
    trainer(model, tmp_path, KeepZeros(), watch, **changed).train()
    assert watch.steps == 6
    assert same(zeros(model), there)
    assert not torch.equal(before, model.lm_head.weight)


def test_without_the_callback_they_are_lost(tmp_path):
    model = pruned()
    trainer(model, tmp_path).train()
    assert not any(zero.any() for zero in zeros(model).values())


def test_after_training_the_model_is_let_go(tmp_path):
    model = pruned()
    trainer(model, tmp_path, KeepZeros(), max_steps=1).train()
    model(TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    layer = hf.layers(model)[0][1]
    assert layer.weight.grad[layer.weight == 0].any()


def test_training_again_takes_the_zeros_that_are_there_by_then(tmp_path):
    model = pruned("3:4")
    training = trainer(model, tmp_path, KeepZeros(), max_steps=2)
    training.train()
    sk.prune(model, sk.Magnitude(), "2:4")
    there = zeros(model)
    training.train()
    assert same(zeros(model), there)


class ZeroOne(TrainerCallback):
    """A kept weight comes out as exactly zero after the third step, as one in a thousand million would."""

    def on_step_end(self, args, state, control, model=None, **others):
        if state.global_step == 3:
            weight = hf.layers(model)[0][1].weight.data
            weight[0, weight[0].nonzero()[0]] = 0


@pytest.mark.parametrize(
    "callback",
    [KeepZeros, lambda: GradualPruning("2:4", every=2, initial=0.2)],
    ids=["KeepZeros", "GradualPruning"],
)
@pytest.mark.parametrize("restored", [False, True], ids=["", "callbacks restored"])
def test_resumed_from_a_checkpoint_it_goes_on_bit_for_bit(tmp_path, callback, restored):
    make = pruned if callback is KeepZeros else dense
    changed = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restored}
    model, again = make(), make()
    # before the default callback that saves
    trainer(model, tmp_path / "a", callback(), ZeroOne(), **changed).train()
    trainer(again, tmp_path / "b", callback(), ZeroOne(), **changed).train(str(tmp_path / "a/checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not (hf.layers(model)[0][1].weight[0] == 0).all()
    assert sum(int(zero.sum()) for zero in zeros(model).values()) * 2 == sum(z.numel() for z in zeros(model).values())


def test_a_checkpoint_on_the_way_holds_the_zeros_and_so_does_the_best(tmp_path):
    model = pruned()
    there = zeros(model)
    changed = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer(model, tmp_path, KeepZeros(), load_best_model_at_end=True, learning_rate=1.0, **changed).train()
    assert same(zeros(model), there)
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert len(saved) == 3
    assert all(same(zeros(hf.load(directory)), there) for directory in saved)


def test_zeros_of_embeddings_vectors_and_of_what_starts_at_zero_may_move(tmp_path):
    model = pruned()
    model.model.embed_tokens.weight.data[:50] = 0
    # as an adapter's second matrix
    added = nn.Linear(32, 32, bias=True)
    nn.init.zeros_(added.weight)
    nn.init.zeros_(added.bias)
    model.model.layers[0].register_module("added", added)
    model.model.layers[0].register_forward_hook(lambda block, args, out: out + block.added(out))
    # of a dense layer in half precision a few weights are zero by chance
    model.lm_head.weight.data[3, 3] = 0
    trainer(model, tmp_path, KeepZeros(at_least=0.001)).train()
    assert added.weight.any()
    assert added.bias.any()
    assert model.lm_head.weight[3, 3] != 0
    assert (model.model.embed_tokens.weight != 0).any(dim=1)[:50].any()


def test_gradual_pruning_ends_with_the_pattern_and_some_steps_to_recover(tmp_path):
    model, seen = dense(), []
    gradual = GradualPruning("2:4", end=0.5, every=1)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            seen.append(gradual.gradual.sparsity)

    trainer(model, tmp_path, gradual, Look(), max_steps=8).train()
    assert seen == pytest.approx([0.5 * (1 - (1 - t / 4) ** 3) for t in range(1, 5)] + [0.5] * 4, abs=2e-4)
    for zero in zeros(model).values():
        assert (zero.view(-1, 4).sum(1) == 2).all()


def test_gradual_pruning_takes_scopes_and_a_pattern_a_layer(tmp_path):
    model = dense()
    trainer(model, tmp_path, GradualPruning(0.7, scope="model", end=0.5, every=1)).train()
    parts = [float(zero.float().mean()) for zero in zeros(model).values()]
    assert len(set(parts)) > 5
    model = dense()
    name, other = [name for name, _ in hf.layers(model)][:2]
    trainer(model, tmp_path, GradualPruning({name: sk.NM(1, 4)}, every=1)).train()
    assert zeros(model)[name].float().mean() == 0.75
    assert not zeros(model)[other].any()


def test_training_that_ends_before_the_last_pruning_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            control.should_training_stop = state.global_step == 2

    with pytest.warns(UserWarning, match=r"ended after 2 optimizer steps, before the last pruning at 4: sparsity is"):
        trainer(dense(), tmp_path, GradualPruning("2:4", every=1), Stop()).train()


def test_what_cannot_be_trained_with_zeros_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no zeros to keep: in no weight are 0.1% zero; prune"):
        trainer(dense(), tmp_path, KeepZeros()).train()
    model = pruned()
    for _, layer in hf.layers(model):
        layer.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="its zeros cannot be lost, because it is frozen, like all 21 weights"):
        trainer(model, tmp_path, KeepZeros()).train()
    changed = {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match="load_best_model_at_end may bring back a model from before the last pruning"):
        trainer(dense(), tmp_path, GradualPruning("2:4"), **changed).train()
    packed = pruned()
    sk.sparsify(packed, plan=sk.Unmeasured())
    # already when the Trainer is made
    for callback in (KeepZeros(), GradualPruning("2:4")):
        with pytest.raises(ValueError, match=r"q_proj is packed, and packed .* sparsekern.densify\(model\) first"):
            trainer(packed, tmp_path, callback)


def test_a_compressed_checkpoint_is_unpacked_trained_and_packed_again(tmp_path):
    model = pruned()
    there = zeros(model)
    sk.sparsify(model, plan=sk.Unmeasured())
    sk.save(model, tmp_path / "packed")
    model = sk.load(tmp_path / "packed")
    # transformers' own refusal comes before ours
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path, KeepZeros())
    model.dequantize()
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    trainer(model, tmp_path / "run", KeepZeros(), load_best_model_at_end=True, **changed).train()
    assert same(zeros(model), there)
    assert same(zeros(hf.load(tmp_path / "run/checkpoint-3")), there)
    sk.sparsify(model, plan=sk.Unmeasured())
    sk.save(model, tmp_path / "again")
    again = sk.load(tmp_path / "again")
    torch.testing.assert_close(again(TOKENS[:2]).logits, model(TOKENS[:2]).logits)


def test_sharded_models_are_refused():
    model, callback = pruned(), KeepZeros()
    for way in ("fsdp", "deepspeed"):
        args = SimpleNamespace(**{"fsdp": None, "deepspeed": None} | {way: "full_shard"})
        with pytest.raises(ValueError, match=f"{way}: masks need whole weights, and these are sharded"):
            callback.on_init_end(args, None, None, model=model)
    args = SimpleNamespace(fsdp=None, deepspeed=None)
    model.lm_head.weight.ds_id = 3
    with pytest.raises(ValueError, match="lm_head.weight: masks need whole weights"):
        callback.on_init_end(args, None, None, model=model)
    # as ZeRO's first stage steps float32 copies
    model = pruned()
    copies = torch.optim.SGD([p.detach().clone().requires_grad_() for p in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds 30 tensors that are no parameters of LlamaForCausalLM"):
        callback.on_train_begin(args, None, None, model=model, optimizer=copies)


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="0 <= begin < end <= 1, got 0.5 and 0.5"):
        GradualPruning("2:4", begin=0.5, end=0.5)
    with pytest.raises(ValueError, match="pattern must be N:M"):
        GradualPruning("half")
    with pytest.raises(ValueError, match=r"the scope is an argument of its own: GradualPruning\(0.5, 'row'\)"):
        GradualPruning(sk.Unstructured(0.5, "row"))
    with pytest.raises(ValueError, match="at_least is a part of a weight's elements"):
        KeepZeros(at_least=0)


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path):
    changed = {"save_strategy": "steps", "save_steps": 3}
    trainer(dense(), tmp_path, GradualPruning("2:4", every=1), **changed).train()
    with pytest.raises(ValueError, match="saved with patterns"):
        trainer(dense(), tmp_path, GradualPruning("1:4", every=1), **changed).train(str(tmp_path / "checkpoint-3"))
    trainer(pruned(), tmp_path / "kept", KeepZeros(), **changed).train()
    with pytest.raises(ValueError, match="written without GradualPruning; begin a new training from its weights"):
        trainer(pruned(), tmp_path, GradualPruning("1:4"), **changed).train(str(tmp_path / "kept/checkpoint-3"))


def test_importing_sparsekern_leaves_the_trainer_alone():
    """It takes as long as all the rest; a callback is imported when it is asked for, and without the Trainer."""
    code = (
        "import sys, sparsekern as sk; print(sum('transformers.trainer' in name for name in sys.modules)); "
        "print(sk.KeepZeros.__name__, 'transformers.trainer' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert ran.stdout == "0\nKeepZeros False\n"
