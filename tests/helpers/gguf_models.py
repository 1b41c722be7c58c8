"""Small random models of each architecture that GGUF is written for, and what llama.cpp makes of a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from leanstep.recipes.data.tokens import END_OF_TEXT, train_bpe

TOKENS = 400
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {"num_key_value_heads": 2, "head_dim": 32}
GEMMA = {**SIZES, **HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZES, **HEADS}),
    "llama, all rows of 256": ("Llama", {**SIZES, **HEADS, "hidden_size": 256, "head_dim": 64}),
    "llama 3": ("Llama", {**SIZES, **HEADS, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, biases": ("Llama", {**SIZES, **HEADS, "attention_bias": True, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {**SIZES, **HEADS, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**SIZES, **HEADS, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**SIZES, **HEADS}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3_text": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    "gpt2": ("GPT2", {"vocab_size": TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "bert": ("Bert", SIZES),
}
TEXT = (
    """Once upon a time, in 1984, there were 365 days and 12 months. It's what they'd say: "don't!"
    def step(x_1, y=-0.5e3):\n\t\treturn [x_1 != y] // done!!!\n\n Ünïcödé naïve café — 中文字符 日本語 русский 😀
The the quick brown foxes jumped over lazy dogs; they'll jump again 1234567 times (or 89)."""
    * 3
)


def make_model(name: str) -> Any:
    """A random fp32 model, whose biases and norms are not trivial."""
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{"bos_token_id": 0, "eos_token_id": 0, **settings})
    auto = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.05)
    return model


def save_folder(folder: Path, name: str = "llama", tokenizer: str | None = None, **settings: Any) -> Path:
    """A folder with a model and a tokenizer, and its configuration changed."""
    make_model(name).save_pretrained(folder)
    save_tokenizer(folder, tokenizer or ("word pieces" if name == "bert" else "recipe"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def save_tokenizer(folder: Path, kind: str) -> None:
    """A tokenizer of a kind, trained on a little text."""
    tokenizer, special = TOKENIZERS[kind]()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def _recipe() -> tuple[Any, dict[str, str]]:
    return train_bpe([TEXT], TOKENS), {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def _byte_pairs(*steps: Any, begins: bool = False) -> tuple[Any, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - 1, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    # merges that a finer cut must hinder
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}


def _digits(begins: bool = False) -> tuple[Any, dict[str, str]]:
    return _byte_pairs(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False), begins=begins
    )


LLAMA3_CUT = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip


def _cut(pattern: str) -> tuple[Any, dict[str, str]]:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return _byte_pairs(split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def _sentence_pieces() -> tuple[Any, dict[str, str]]:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator([TEXT[:200]], trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are tokens of the model alone
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _word_pieces(*, lowercase: bool = True) -> tuple[Any, dict[str, str]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=special))
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer, {f"{name.strip('[]').lower()}_token": name for name in special}


TOKENIZERS = {
    "recipe": _recipe,
    "digits": _digits,
    "digits, begun and ended": lambda: _digits(begins=True),
    "llama 3": lambda: _cut(LLAMA3_CUT),
    "sentence pieces": _sentence_pieces,
    "word pieces": _word_pieces,
    # that no engine knows
    "vowels apart": lambda: _cut(r"[aeiou]|[^aeiou]+"),
    "word pieces with case": lambda: _word_pieces(lowercase=False),
}


class LlamaCpp:
    """A file, opened by llama.cpp's library with its log off; a context manager."""

    def __init__(self, path: Path) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.library = get_ffi(), get_lib()
        self.quiet = self.ffi.callback("ggml_log_callback", lambda level, text, data: None)
        self.library.llama_log_set(self.quiet, self.ffi.NULL)
        self.model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        assert self.model != self.ffi.NULL, f"llama.cpp refuses {path}"

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: Any) -> None:
        self.library.llama_model_free(self.model)
        self.library.llama_log_set(self.ffi.NULL, self.ffi.NULL)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, those that begin and end it included."""
        data, room = text.encode(), self.ffi.new("llama_token[]", 1000)
        vocabulary = self.library.llama_model_get_vocab(self.model)
        count = self.library.llama_tokenize(vocabulary, data, len(data), room, 1000, True, False)
        return list(room[0:count])

    def outputs(self, tokens: Sequence[int], *, embed: bool = False) -> torch.Tensor:
        """Logits of each position, or with ``embed`` the last hidden states; computed in fp32 where the file is."""
        library, ffi = self.library, self.ffi
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = settings.flash_attn_type = 0
        settings.embeddings, settings.pooling_type = embed, 0
        context = library.llama_init_from_model(self.model, settings)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert (library.llama_encode if embed else library.llama_decode)(context, batch) == 0
        width = library.llama_model_n_embd(self.model) if embed else TOKENS
        read = library.llama_get_embeddings_ith if embed else library.llama_get_logits_ith
        rows = [np.frombuffer(ffi.buffer(read(context, i), 4 * width), np.float32).copy() for i in range(len(tokens))]
        library.llama_batch_free(batch)
        library.llama_free(context)
        return torch.from_numpy(np.stack(rows))
