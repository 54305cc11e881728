"""Tiny models with random weights, one function an architecture; nothing is downloaded.

MODELS and MULTIMODAL name them all; batches(name) makes what their forward takes, each batch of another length where
it can be.
"""

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97
# few blocks, heads that are shared, and a size that no two things have in common
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED_HEADS = SIZES | {"num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# shorter than the batches, and not the same in all blocks where the model knows both
SLIDING = {"head_dim": 8, "sliding_window": 5}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING = SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def llama(**changed) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED_HEADS | changed))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHARED_HEADS))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHARED_HEADS, head_dim=8))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHARED_HEADS, sliding_window=5))


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHARED_HEADS, **SLIDING))


def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHARED_HEADS, **ALTERNATING))


def gemma3n() -> nn.Module:
    """Its last block attends to keys and values that an earlier block has left behind."""
    config = transformers.Gemma3nTextConfig(
        **SHARED_HEADS,
        **ALTERNATING,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        laurel_rank=4,
        activation_sparsity_pattern=None,
        altup_num_inputs=2,
    )
    return transformers.Gemma3nForCausalLM(config)


def phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SHARED_HEADS))


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHARED_HEADS))


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        **TOKENS,
    )
    return transformers.OPTForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def albert() -> nn.Module:
    """One block, run three times."""
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SIZES, embedding_size=16))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SHARED_HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SHARED_HEADS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def olmoe() -> nn.Module:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SHARED_HEADS, num_experts=4, num_experts_per_tok=2))


def granite_moe() -> nn.Module:
    config = transformers.GraniteMoeConfig(**SHARED_HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GraniteMoeForCausalLM(config)


def jetmoe() -> nn.Module:
    """Its attention has experts as well."""
    config = transformers.JetMoeConfig(
        **SIZES, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.JetMoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Square experts, transposed: no shape says which side their inputs are."""
    sizes = SHARED_HEADS | {"intermediate_size": 16}
    config = transformers.GptOssConfig(
        **sizes, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE
    )
    return transformers.GptOssForCausalLM(config)


def llama4() -> nn.Module:
    """Every token goes through every expert, as zeros where it is not routed there."""
    config = transformers.Llama4TextConfig(
        **SHARED_HEADS,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=8,
        no_rope_layers=[1, 1, 0],
        rope_parameters=ROPE,
    )
    return transformers.Llama4ForCausalLM(config)


def mamba2() -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=8,
        num_hidden_layers=3,
        n_groups=1,
        chunk_size=8,
        **TOKENS,
    )
    return transformers.Mamba2ForCausalLM(config)


def falcon_h1() -> nn.Module:
    config = transformers.FalconH1Config(
        **SHARED_HEADS,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    )
    return transformers.FalconH1ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        decoder_start_token_id=1,
        **TOKENS,
    )
    return transformers.WhisperForConditionalGeneration(config)


IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=SIZES, vision_config=IMAGES, projection_dim=16)
    return transformers.CLIPModel(config)


def blip() -> nn.Module:
    """Its text decoder attends to the image's tokens."""
    text = SIZES | {"encoder_hidden_size": 32, "sep_token_id": 2}
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=IMAGES))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SHARED_HEADS),
        vision_config=transformers.CLIPVisionConfig(**IMAGES),
        image_token_id=VOCABULARY - 1,
        image_token_index=VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
        num_hidden_layers=2,
        num_feat_extract_layers=2,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **TOKENS,
    )
    return transformers.Wav2Vec2ForCTC(config)


MODELS = {
    model.__name__: model
    for model in (
        *(llama, qwen2, qwen3, mistral, gemma2, gemma3, gemma3n, phi, phi3, opt, gpt2, gpt_neox, bert, albert, vit),
        *(mixtral, qwen3_moe, deepseek_v3, olmoe, granite_moe, jetmoe, gpt_oss, llama4),
        *(mamba2, falcon_h1, t5, whisper),
    )
}
# of images or sound, some with a text beside; not all have logits
MULTIMODAL = {model.__name__: model for model in (clip, blip, llava, wav2vec2)}


def make(name: str) -> nn.Module:
    """The model `name` with the same random weights each time, in eval mode."""
    torch.manual_seed(0)
    return (MODELS | MULTIMODAL)[name]().eval()


def batches(name: str, count: int = 3) -> list[Tensor | dict[str, Tensor]]:
    """Calibration batches that the model `name` understands, the same each time."""
    generator = torch.Generator().manual_seed(1)

    def ids(tokens: int) -> Tensor:
        # no special tokens: some models make a mask of them
        return torch.randint(3, VOCABULARY, (2, tokens), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    lengths = range(11, 11 + count)
    if name == "vit":
        return [{"pixel_values": noise(3, 16, 16)} for _ in lengths]
    if name == "whisper":
        return [{"input_features": noise(8, 20), "decoder_input_ids": ids(n)} for n in lengths]
    if name == "t5":
        return [{"input_ids": ids(n), "decoder_input_ids": ids(n - 4)} for n in lengths]
    if name in ("clip", "blip"):
        # as many tokens as patches with their class token, so that no shape tells them apart
        return [{"input_ids": ids(5), "pixel_values": noise(3, 16, 16)} for _ in lengths]
    if name == "llava":
        image, most = torch.full((2, 4), VOCABULARY - 1), VOCABULARY - 2
        return [
            {"input_ids": torch.cat([image, ids(n).clamp(max=most)], dim=1), "pixel_values": noise(3, 16, 16)}
            for n in lengths
        ]
    if name == "wav2vec2":
        return [{"input_values": noise(40 * n)} for n in lengths]
    return [ids(n) for n in lengths]


def why_two_answers(name: str) -> str | None:
    """Why what the model `name` computes is not one thing: transformers 5.0 needs a cache for gemma3n; None for others.

    Its last block reads keys and values that an earlier one has left in the cache, and without one attends to others.
    Whatever is done without a cache, as training and pruning are, is then about another model.
    """
    if name != "gemma3n":
        return None
    model, batch = make(name), batches(name, 1)[0]
    with torch.no_grad():
        with_cache, without = model(batch).logits, model(batch, use_cache=False).logits
    if torch.allclose(with_cache, without, atol=1e-4):
        return None
    return f"transformers {transformers.__version__} computes something else without a cache"
