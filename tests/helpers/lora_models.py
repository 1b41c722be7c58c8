"""Tiny models for tests of adapters, and what is compared of them."""

import copy

import torch
import transformers

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]


def tiny_llama(dtype=torch.float32, layers=2, seed=0, **settings):
    """A LLaMA of grouped queries: 4 heads, 2 of keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        **{**sizes, "num_hidden_layers": layers, "vocab_size": 61, "max_position_embeddings": 64, **settings}
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(dtype)


def tiny_gpt2(dtype=torch.float32, seed=0):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def tiny_t5(resized=False, seed=0):
    """With one weight in its embeddings and head. If ``resized``, the embeddings are one module of 64 tokens."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    if resized:
        model.resize_token_embeddings(64)
    return model


def llama(**settings):
    """One whose attention is replaced."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, **settings)).eval()


def gpt2(**settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **settings)).eval()


def tokens(rows=2, length=10, seed=0, vocabulary=61):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomise(model, seed=1, scale=0.3):
    """Give every trainable tensor values of its own, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter) * scale
                parameter.copy_(parameter * (1 + 0.1 * noise) if "magnitude" in name else noise)
    return model


def loss_and_gradients(model, ids, seed=5):
    """The language-model loss and the gradients of what is trained, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def slow_copy(model):
    """The same model in plain torch: no fast path, no fused blocks."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "lora"):
            module.lora.fast_path = False
    return other


def relative_error(found, wanted):
    """Largest difference over the largest entry wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
