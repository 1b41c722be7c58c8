"""Tiny random models of transformers' architectures, by name: class, and settings of the configuration."""

import torch
from pruned_models import VOCABULARY
from torch import nn

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENDS = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
_TEXT = {**_SIZES, **_ENDS, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_LLAMA = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_LOCAL = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 16}
_STATES = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **_ENDS}
_LLAMA4 = {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {**_TEXT, **_LATENT, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK |= {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_DBRX = {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
_DBRX |= {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}}
_DBRX |= {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}}
_MAMBA2 = {**_STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
_JAMBA = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
_JAMBA |= {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2}
_LFM2 = {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
_NEXT = {**_SHARED, "layer_types": ["linear_attention", "full_attention"]}
_NEXT |= {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
_NEXT |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
_DEBERTA = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 2}
_T5 |= {"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_SWITCH = {**_T5, "num_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
_BART = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, **_ENDS}
_BART |= {
    f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 32))
}
_BART |= {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None}
_MARIAN = {**_BART, "decoder_vocab_size": VOCABULARY}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
_IMAGES = {"image_size": 16, "num_labels": 5}
_VIT = {**_SIZES, **_IMAGES, "patch_size": 8}
_SWIN = {**_IMAGES, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}

CAUSAL = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", _LLAMA),
    "gemma3": ("Gemma3ForCausalLM", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", _LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA),
    "granite": ("GraniteForCausalLM", _LLAMA),
    "cohere2": ("Cohere2ForCausalLM", _LLAMA),
    "stablelm": ("StableLmForCausalLM", _LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", _LLAMA),
    "phi3": ("Phi3ForCausalLM", _LLAMA),
    "glm4": ("Glm4ForCausalLM", _LLAMA),
    "ernie4_5": ("Ernie4_5ForCausalLM", _LLAMA),
    "nemotron": ("NemotronForCausalLM", _LLAMA),
    "seed_oss": ("SeedOssForCausalLM", _LLAMA),
    "exaone4": ("Exaone4ForCausalLM", _LLAMA),
    "apertus": ("ApertusForCausalLM", _LLAMA),
    "phi": ("PhiForCausalLM", _TEXT),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gptj": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT),
    "opt": ("OPTForCausalLM", {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", _BLOOM),
    "falcon": ("FalconForCausalLM", {**_TEXT, "ffn_hidden_size": 32}),
    "mixtral": ("MixtralForCausalLM", _LOCAL),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _SHARED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS),
    "granitemoe": ("GraniteMoeForCausalLM", _LOCAL),
    "phimoe": ("PhimoeForCausalLM", _LOCAL),
    "gpt_oss": ("GptOssForCausalLM", _LOCAL),
    "llama4": ("Llama4ForCausalLM", _LLAMA4),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _DEEPSEEK),
    "dbrx": ("DbrxForCausalLM", _DBRX),
    "mamba": ("MambaForCausalLM", _STATES),
    "falcon_mamba": ("FalconMambaForCausalLM", _STATES),
    "mamba2": ("Mamba2ForCausalLM", _MAMBA2),
    "jamba": ("JambaForCausalLM", {**_JAMBA, "use_mamba_kernels": False}),
    "lfm2": ("Lfm2ForCausalLM", _LFM2),
    "qwen3_next": ("Qwen3NextForCausalLM", _NEXT),
}
MASKED = {
    "bert": ("BertForMaskedLM", _TEXT),
    "roberta": ("RobertaForMaskedLM", _TEXT),
    "modernbert": ("ModernBertForMaskedLM", _TEXT),
    "deberta": ("DebertaForMaskedLM", _DEBERTA),
    "deberta_v2": ("DebertaV2ForMaskedLM", _DEBERTA),
}
ENCODER_DECODER = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "switch": ("SwitchTransformersForConditionalGeneration", _SWITCH),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _MARIAN),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER),
}
IMAGE = {
    "vit": ("ViTForImageClassification", _VIT),
    "deit": ("DeiTForImageClassification", _VIT),
    "dinov2": ("Dinov2ForImageClassification", _VIT),
    "swin": ("SwinForImageClassification", _SWIN),
    "clip": ("CLIPForImageClassification", {"vision_config": _VIT, "text_config": _TEXT, "num_labels": 5}),
    "convnext": ("ConvNextForImageClassification", {**_STAGES, "num_stages": 2, "patch_size": 2}),
    "resnet": ("ResNetForImageClassification", {**_STAGES, "embedding_size": 8}),
}
WITHOUT_HEAD = {"bert_base": ("BertModel", _TEXT), "gpt2_base": ("GPT2Model", _GPT2), "vit_base": ("ViTModel", _VIT)}
REFUSED = {"clip_pair": ("CLIPModel", {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 16})}
ARCHITECTURES = {**CAUSAL, **MASKED, **ENCODER_DECODER, **IMAGE, **WITHOUT_HEAD, **REFUSED}


def make(name: str, seed: int = 0) -> nn.Module:
    """The model of a name, always with the same weights."""
    import transformers

    class_name, settings = ARCHITECTURES[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings))
        # the usual start is so small that nothing that is pruned shows in the output
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(6.0)
        for module in model.modules():
            if hasattr(module, "create_weight"):  # a table of sines, which no file has
                module.weight.data.copy_(module.create_weight())
    return model.eval()
