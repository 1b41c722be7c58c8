"""Embedding models and classifiers, of texts and images: prune, compress and eval take their folders."""

import json
import re
import shutil

import pytest
import torch
from architectures import make
from gguf_models import SIZES, save_folder, save_tokenizer
from pruned_models import images, save_model
from safetensors.torch import save_file
from texts import sentences
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from leanstep.cli import main
from leanstep.pruning.folder.kinds import judge_of, pooling_of
from leanstep.pruning.measure.batches import Batch
from leanstep.pruning.measure.metrics import POOLINGS, Cosine

NAMES = ["no", "yes", "perhaps"]
CLASSES = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
TEXT_CLASSIFIERS = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, **CLASSES)),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**SIZES, **CLASSES)),
}
BY_LABELS, BY_CLASSES = ["cross-entropy", "accuracy"], ["KL", "same class"]
# folder -> data, metric, measures of eval against the dense folder
KINDS = {
    "embedding": ("rows.jsonl", "cosine", ["1 - cosine", "same neighbour"]),
    "bert": ("rows.jsonl", "kl", BY_LABELS + BY_CLASSES),
    "llama": ("text.txt", "kl", BY_CLASSES),
    "vit": ("images.safetensors", "kl", BY_LABELS + BY_CLASSES),
}
AMOUNTS = ["--samples", "8", "--curve-samples", "2", "--held-out", "6"]
QUICK = [*AMOUNTS, "--curves", "fisher"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model of each kind, and data."""
    folder = tmp_path_factory.mktemp("base")
    save_folder(folder / "embedding", "bert", architectures=["BertModel"])
    (folder / "embedding" / "1_Pooling").mkdir()
    pool(folder / "embedding", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    for name, (model_class, config) in TEXT_CLASSIFIERS.items():
        torch.manual_seed(0)
        save_model(model_class(config), folder / name)
        save_tokenizer(folder / name, "word pieces")
    save_model(make("vit"), folder / "vit")
    save_model(make("bert_base"), folder / "narrow")
    texts = [line for line in sentences(80).split(".") if line.strip()][:40]
    rows = [{"text": text, "label": NAMES[n % 3], "other": "never"} for n, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text(sentences(60))
    save_file({"pixel_values": images(20), "labels": torch.arange(20) % 2}, folder / "images.safetensors")
    save_file({"pixel_values": images(20), "labels": torch.arange(20)}, folder / "beyond.safetensors")
    save_file({"pixel_values": images(20)}, folder / "unlabelled.safetensors")
    return folder


def pool(folder, config):
    kind = "sentence_transformers.models."
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [{"idx": n, "name": str(n), "path": path, "type": kind + name} for n, (path, name) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def evaluated(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_each_kind_is_pruned_and_judged(name, base, tmp_path, capsys):
    data, metric, measures = KINDS[name]
    length = [] if name == "vit" else ["--seq-len", "24"]
    command = ["prune", base / name, "--out", tmp_path / "out", "--sparsity", "0.5", "--eval", *QUICK, *length]
    assert main([*map(str, command), "--data", str(base / data)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert content["metric"].startswith(metric) and content["quality"]["samples"] == 6
    assert list(content["quality"]["after"]) == measures and content["perplexity"] is None
    assert all(re.search(rf"^{re.escape(one)} .* \(6 samples\)$", printed, re.M) for one in measures)
    # what is kept beside the weights: for embeddings what sentence-transformers opens
    assert {path.name for path in (base / name).iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}
    result = evaluated(capsys, tmp_path / "out", "--against", base / name, "--data", base / data, *length)
    assert list(result["measures"]) == measures and result["measures"][measures[-2]]["mean"] > 0
    same = evaluated(capsys, base / name, "--against", base / name, "--data", base / data, *length)["measures"]
    assert [same[one]["mean"] for one in measures[-2:]] == [0, 1]


@pytest.mark.parametrize("name", ["embedding", "bert"])
def test_a_folder_of_each_kind_is_compressed(name, base, tmp_path):
    pytest.importorskip("gguf")
    data, metric, measures = KINDS[name]
    command = ["compress", base / name, "--out", tmp_path / "out", "--format", "dense", "--bits-per-weight", "8"]
    more = ["--seq-len", "24", "--include", "*dense*"]
    assert main([*map(str, command), "--data", str(base / data), "--eval", *QUICK, *more]) == 0
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert content["metric"].startswith(metric) and list(content["quality"]["after"]) == measures


def test_embeddings_are_those_of_the_folders_pooling(base):
    judge, folder = judge_of(base / "embedding"), base / "embedding"
    assert judge.cosine.identity == "cosine(pooling='cls')"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(ids).last_hidden_state[0]
    torch.testing.assert_close(judge.outputs(model, ids).rows[0], hidden[0] / hidden[0].norm())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_minus_cosine_leaves_out_masked_tokens_and_is_half_the_square_of_the_roots_change(pooling):
    dense, changed = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch((dense,), mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool())
    metric = Cosine(pooling)
    sums, counts = metric.compare(metric.reference(dense, batch), changed, batch)
    rows = [(d[m], c[m]) for d, c, m in zip(dense, changed, batch.mask, strict=True)]
    pooled = [[POOLINGS[pooling](one) for one in pair] for pair in rows]
    expected = torch.stack([1 - torch.cosine_similarity(*pair, dim=0) for pair in pooled])
    torch.testing.assert_close(sums, expected.double(), atol=1e-6, rtol=1e-5)
    roots = zip(metric.root(dense, batch), metric.root(changed, batch), strict=True)
    halves = torch.stack([(one - other).square().sum() / 2 for one, other in roots])
    torch.testing.assert_close(sums, halves.double(), atol=1e-6, rtol=1e-5)
    assert counts.tolist() == [1, 1, 1]


def test_a_pruned_folder_opens_in_sentence_transformers_with_the_same_embeddings(base, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    shutil.copytree(base / "embedding", tmp_path / "in")
    pool(tmp_path / "in", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    command = ["prune", tmp_path / "in", "--out", tmp_path / "out", "--sparsity", "0.5", *QUICK]
    assert main([*map(str, command), "--data", str(base / "text.txt"), "--seq-len", "24"]) == 0
    texts = ["the cat", "a dog and the cat ran"]
    theirs, dense = (
        sentence_transformers.SentenceTransformer(str(tmp_path / name), device="cpu").encode(texts, batch_size=1)
        for name in ("out", "in")
    )
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    expected = torch.stack([POOLINGS["mean"](row) for row in rows])
    torch.testing.assert_close(torch.from_numpy(theirs), expected)
    assert abs(theirs - dense).max() > 1e-3


POOLED = {
    "the form of today": ({"pooling_mode": "lasttoken"}, "lasttoken"),
    "the former one": ({"pooling_mode_max_tokens": True, "include_prompt": True}, "max"),
    "another": ({"pooling_mode": "weightedmean"}, ValueError),
    "two": ({"pooling_mode": ["cls", "mean"]}, ValueError),
    "none": ({"pooling_mode_cls_token": False}, ValueError),
}


@pytest.mark.parametrize("case", POOLED)
def test_the_pooling_is_that_of_modules_json(case, tmp_path):
    config, expected = POOLED[case]
    (tmp_path / "1_Pooling").mkdir()
    pool(tmp_path, config)
    if isinstance(expected, str):
        assert pooling_of(tmp_path) == expected
        return
    with pytest.raises(ValueError, match="expected one of mean, cls, max, lasttoken"):
        pooling_of(tmp_path)


def test_a_pooling_outside_of_the_folder_is_not_read(tmp_path):
    rows = [{"path": "../1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="expected one inside"):
        pooling_of(tmp_path)


REFUSED = {
    "no labels, nothing dense": (["llama", "--data", "text.txt"], "by labels, which --data lacks .*--against FOLDER"),
    "no labels of images": (["vit", "--data", "unlabelled.safetensors"], "by labels, which --data lacks"),
    "embeddings alone": (["embedding", "--data", "text.txt"], "judged against the dense model: give --against"),
    "another class": (
        ["bert", "--data", "rows.jsonl", "--label-key", "other"],
        "the label never is no class of .*bert",
    ),
    "no such column": (
        ["bert", "--data", "rows.jsonl", "--label-key", "none"],
        "--label-key none: .* text, label, oth",
    ),
    "a class beyond": (["vit", "--data", "beyond.safetensors"], "labels go from 0 to 19: expected classes from 0 to"),
    "text for images": (["vit", "--data", "text.txt"], "takes pixel_values, .* give images: a safetensors file"),
    "images for text": (["bert", "--data", "images.safetensors"], "takes token numbers, got torch.float32"),
    "another model": (
        ["narrow", "--data", "text.txt", "--against", "embedding"],
        r"outputs \(\d+, 16\), .* of the dense model .* 64\)",
    ),
    "tasks": (["bert", "--tasks", "any", "--data", "rows.jsonl"], "--tasks is for language models"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_judged_is_told_in_one_line(case, base, capsys, monkeypatch):
    arguments, message = REFUSED[case]
    monkeypatch.chdir(base)
    assert main(["eval", *arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error), error


def test_no_tokenizer_is_told(base, tmp_path, capsys):
    make("bert_base").save_pretrained(tmp_path / "bare")
    arguments = [tmp_path / "bare", "--against", base / "embedding", "--data", base / "text.txt"]
    assert main(["eval", *map(str, arguments)]) == 2
    assert "holds no tokenizer (no tokenizer.json)" in capsys.readouterr().err.splitlines()[-1]
