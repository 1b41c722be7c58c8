"""Small models for the tests of pruning: random weights, always the same, of every architecture that is handled."""

import re
from pathlib import Path

import torch
from forked import preload
from torch import nn

preload("leanstep.pruning.folder.run", "transformers.models.llama.modeling_llama")

VOCABULARY = 64
# how fast the model was when a folder was written, which no other run repeats
_SPEED = re.compile(rb'"per_second": [\d.]+|Speed of reading \| [^ ]+')


def make_llama(layers: int = 3, seed: int = 0, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return _made(LlamaForCausalLM, LlamaConfig(**config | settings), seed)


def make_gpt2(seed: int = 0, **settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return _made(GPT2LMHeadModel, GPT2Config(**config | ends | settings), seed)


def make_mixtral(seed: int = 0):
    from transformers import MixtralConfig, MixtralForCausalLM

    return _made(MixtralForCausalLM, MixtralConfig(**_small(), num_local_experts=3, num_experts_per_tok=2), seed)


def make_vit(seed: int = 0):
    from transformers import ViTConfig, ViTForImageClassification

    return _made(ViTForImageClassification, ViTConfig(**_vision()), seed)


def make_deit(seed: int = 0):
    from transformers import DeiTConfig, DeiTForImageClassification

    return _made(DeiTForImageClassification, DeiTConfig(**_vision()), seed)


def make_cnn(seed: int = 0) -> nn.Module:
    """Residual blocks in Sequentials, batch norms, in-place ReLUs and a linear head, as torchvision's ResNets have."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _ResNet().eval()


class _Block(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + self.downsample(x))


class _ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(_Block(8, 8), _Block(8, 16))
        self.layer2 = nn.Sequential(_Block(16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def _small() -> dict:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip


def _vision() -> dict:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"image_size": 16, "patch_size": 8, "num_labels": 5}


def _made(model_class, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        # the usual start is so small that nothing that is pruned shows in the output
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(6.0)
    return model.eval()


def tokens(count: int = 8, length: int = 16, seed: int = 0) -> torch.Tensor:
    """int64 [count, length]."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# maker of each kind, and of its data
MODELS = {
    "llama": (make_llama, tokens),
    "gpt2": (make_gpt2, tokens),
    "mixtral": (make_mixtral, tokens),
    "vit": (make_vit, images),
    "cnn": (make_cnn, images),
}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters, with an end-of-text token, 64 in all."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;0123456"[: VOCABULARY - 2]
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1, **{letter: place + 2 for place, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")
    fast.model_max_length = 32
    fast.save_pretrained(folder)


def save_model(model, folder: Path, **settings) -> Path:
    """A Hugging Face folder with the model and a tokenizer."""
    model.save_pretrained(folder, **settings)
    save_tokenizer(folder)
    return folder


def snapshot(folder):
    """The bytes of all files of a folder, without measured speeds."""
    return {path.name: _SPEED.sub(b"", path.read_bytes()) for path in folder.iterdir()}
