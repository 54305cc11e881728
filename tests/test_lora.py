"""PEFT's LoRA beside packed layers: adapters train, the packed weights stay, merging takes a dense weight."""

import copy

import peft
import pytest
import torch
import transformers

import sparsekern as sk
from sparsekern import hf
from tests import compressed

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lora(**settings):
    """The settings of LoRA adapters, with the layer that PEFT puts around a SparseLinear: the one for nn.Linear."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings)
    config._register_custom_module({sk.SparseLinear: peft.tuners.lora.Linear})
    return config


def swapped(tmp_path):
    return compressed.sparse("llama")


def loaded(tmp_path):
    sk.save(compressed.sparse("llama"), tmp_path / "out")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def packed_weights(model):
    """A copy of every tensor that a kernel reads."""
    return {name: value.clone() for name, value in model.named_buffers() if "operand" in name}


def train(model, steps=25):
    """The loss on one batch before and after some steps on what requires a gradient."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (4, 12), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.fixture(params=[swapped, loaded])
def trained(request, tmp_path):
    """A sparse model with adapters that were trained, what its kernels read before, and both losses."""
    torch.manual_seed(0)
    model = peft.get_peft_model(request.param(tmp_path), lora())
    before = packed_weights(model)
    return model, before, train(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 12)[None]).logits


def test_adapters_learn_and_every_packed_weight_keeps_its_bits(trained):
    model, before, (first, last) = trained
    assert last < first - 0.3
    after = packed_weights(model)
    assert before.keys() == after.keys()
    # 21 layers by three operands
    assert len(before) == 63
    assert all(torch.equal(after[name], value) for name, value in before.items())
    adapted = [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(adapted) == 12
    assert all(isinstance(module.base_layer, sk.SparseLinear) for module in adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(compressed.sparse("llama")))


def test_adapters_are_saved_alone_and_fit_a_fresh_base(trained, tmp_path):
    model, *_ = trained
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    config._register_custom_module({sk.SparseLinear: peft.tuners.lora.Linear})
    again = peft.PeftModel.from_pretrained(compressed.sparse("llama"), tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_a_packed_weight_is_refused_and_changes_nothing(trained, safe):
    model, before, _ = trained
    want = logits(model)
    with pytest.raises(RuntimeError, match=r"cannot be .* merged into: sparsekern\.densify\(model\) first"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model), want)
    assert all(torch.equal(packed_weights(model)[name], value) for name, value in before.items())


def test_densified_it_merges_and_the_merged_weights_are_dense(trained):
    model, *_ = trained
    want = logits(model)
    sk.densify(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    assert not [module for module in merged.modules() if isinstance(module, sk.SparseLinear)]
    for name, layer in hf.layers(merged):
        zeros = (layer.weight == 0).float().mean()
        # where all that reads an output is pruned, its adapter got no gradient
        assert zeros < 0.4 if name.endswith(tuple(TARGETS)) else zeros == 0.5, name


def test_a_packed_model_with_adapters_cannot_be_saved_as_one(trained, tmp_path):
    with pytest.raises(ValueError, match="merge the adapter first"):
        sk.save(trained[0], tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_transformers_own_adapters_train_and_are_saved_alone(tmp_path):
    torch.manual_seed(0)
    model = loaded(tmp_path)
    model.add_adapter(lora())
    before = packed_weights(model)
    first, last = train(model)
    assert last < first - 0.3
    assert all(torch.equal(packed_weights(model)[name], value) for name, value in before.items())
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_without_the_mapping_peft_says_what_it_does_not_know():
    config = peft.LoraConfig(target_modules=TARGETS)
    with pytest.raises(ValueError, match="Target module SparseLinear.* is not supported"):
        peft.get_peft_model(compressed.sparse("llama"), config)


def test_the_trainer_trains_adapters_and_refuses_the_packed_model_alone(tmp_path):
    model = loaded(tmp_path)
    arguments = transformers.TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], use_cpu=True)
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments, train_dataset=rows)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora())
    before = packed_weights(adapted)
    trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert all(torch.equal(packed_weights(adapted)[name], value) for name, value in before.items())
