"""``leanstep eval --tasks``: questions of the evaluation harness, on dense and sparse folders, without a network."""

import json
import math

import pytest
import torch
from pruned_models import make_llama, save_tokenizer
from sparse_folders import save_sparse
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanstep.cli import main
from leanstep.lora import LoraConfig, apply_lora, merge, remove_lora, save_adapter
from leanstep.sparsity import export_folder

pytest.importorskip("lm_eval", reason="needs the extra tasks")
ROWS = [
    {"question": "Which animal barks?", "choices": ["A cat", "A dog", "A fish"], "answer": 1},
    {"question": "What do cows drink?", "choices": ["Milk", "Petrol", "Water"], "answer": 2},
    {"question": "Which is the sky's colour?", "choices": ["Blue", "Green", "Red"], "answer": 0},
    {"question": "How many legs has a spider?", "choices": ["Six", "Eight", "Two"], "answer": 1},
    {"question": "Where does the sun rise?", "choices": ["East", "West", "North"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    model = make_llama(hidden_size=64, intermediate_size=96, max_position_embeddings=128)
    save_sparse(root / "dense", model, dtype=torch.float32)
    save_tokenizer(root / "dense")
    export_folder(root / "dense", root / "sparse")
    torch.manual_seed(1)
    adapted = apply_lora(
        AutoModelForCausalLM.from_pretrained(root / "dense"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], base_model_name_or_path=str(root / "dense")),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_adapter(adapted, root / "adapter")
    merge(adapted)
    remove_lora(adapted)
    adapted.save_pretrained(root / "merged")
    save_tokenizer(root / "merged")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, data in (("quiz", root / "rows.jsonl"), ("lost", root / "nothing.jsonl")):
        (root / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (root / "far.yaml").write_text(TASK.format(name="far", data="x").replace("path: json", "path: nobody/quiz"))
    (root / "broken.yaml").write_text("task: [")
    return root


def evaluate(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def accuracy(folder):
    """By definition: a question is answered by the choice with the largest log-probability."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in ROWS:
        begin = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        sums = []
        for choice in row["choices"]:
            answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([begin + answer])).logits[0, len(begin) - 1 : -1].double()
            sums.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
        right += sums.index(max(sums)) == row["answer"]
    return right / len(ROWS)


def test_accuracy_and_its_standard_error_of_dense_sparse_and_adapted_folders(places, capsys):
    dense, sparse, adapted = (
        evaluate(capsys, places / kind, "--tasks", places / "quiz.yaml", "--batch-size", 2)
        for kind in ("dense", "sparse", "adapter")
    )
    assert adapted["tasks"][0]["value"] == accuracy(places / "merged") != accuracy(places / "dense")
    mean = accuracy(places / "dense")
    (score,) = dense["tasks"]
    assert score == {
        "task": "quiz",
        "metric": "acc",
        "value": mean,
        "stderr": pytest.approx(math.sqrt(mean * (1 - mean) / (len(ROWS) - 1))),
        "shots": 0,
        "questions": 5,
    }
    assert 0 < mean < 1 and sparse["tasks"] == dense["tasks"] and dense["prompts_cut"] == 0
    assert sparse["parameters"] == dense["parameters"]


def test_shots_limit_and_perplexity_beside_tasks_in_a_table(places, capsys):
    arguments = ("--tasks", places / "quiz.yaml", "--shots", 2, "--limit", 3)
    result = evaluate(capsys, places / "dense", *arguments, "--data", places / "rows.jsonl", "--text-key", "question")
    assert (result["tasks"][0]["shots"], result["tasks"][0]["questions"]) == (2, 3)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    # two solved examples are more tokens than the model has positions
    assert result["prompts_cut"] > 0
    assert main(["eval", str(places / "dense"), *map(str, arguments)]) == 0
    out, shown = capsys.readouterr()
    head, row, cut = out.splitlines()[-3:]
    assert head.split() == ["task", "shots", "questions", "metric", "value", "stderr"]
    assert row.split()[:4] == ["quiz", "2", "3", "acc"] and "perplexity" not in out
    assert cut == f"{result['prompts_cut']} prompts were cut at their begin to fit the model's positions"
    assert "\ntasks: 1/9 answers\n" in shown and "Running" not in shown, "one progress, not the harness's"


def test_prune_judges_the_dense_and_the_pruned_model_and_shows_both_in_its_report(places, tmp_path, capsys):
    quiz, out = places / "quiz.yaml", tmp_path / "pruned"
    (tmp_path / "text.txt").write_text("Which animal barks? A dog. " * 40)
    small = "--samples 4 --curve-samples 2 --held-out 2 --seq-len 16 --curves fisher --sparsity 0.8 --json"
    command = ["prune", places / "dense", "--out", out, "--data", tmp_path / "text.txt", *small.split()]
    wrong = [*command, "--eval-tasks", places / "lost.yaml"], [*command, "--eval-limit", 2]
    assert [main([*map(str, arguments)]) for arguments in wrong] == [2, 2] and not out.exists()
    assert "--eval-limit goes with --eval-tasks" in capsys.readouterr().err
    # the exit code of `eval`, whose error is the same
    assert main([*map(str, command), "--eval-tasks", str(places / "far.yaml")]) == 2 and not out.exists()
    assert "needs the network once" in capsys.readouterr().err
    assert main([*map(str, command), "--eval-tasks", str(quiz), "--batch-size", "2"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tasks"]
    assert [row["before"]] == evaluate(capsys, places / "dense", "--tasks", quiz)["tasks"]
    assert [row["after"]] == evaluate(capsys, out, "--tasks", quiz)["tasks"]
    assert json.loads((out / "sparsity.json").read_text())["tasks"] == [row]
    before, after = (f"{row[when]['value']:.4f}" for when in ("before", "after"))
    assert f">{before} ± " in (page := (out / "report.html").read_text()) and f">{after} ± " in page
    assert f"| quiz (acc) | {after} ± " in (out / "README.md").read_text()


@pytest.fixture
def named(places, monkeypatch):
    """Tasks and a group by their names. The harness's own take ten seconds to read."""
    import lm_eval.tasks

    folder, manager = places / "named", lm_eval.tasks.TaskManager
    folder.mkdir(exist_ok=True)
    for name in ("one", "other"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=places / "rows.jsonl"))
    group = {"group": "both", "task": ["one", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(json.dumps(group))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager(include_defaults=False, include_path=folder))


def test_a_group_has_a_row_beside_its_tasks(places, named, capsys):
    scores = evaluate(capsys, places / "dense", "--tasks", "both", "--limit", 2)["tasks"]
    assert {score["task"]: score["questions"] for score in scores} == {"one": 2, "other": 2, "both": 4}
    assert len({score["value"] for score in scores}) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost.yaml", "the task {}: FileNotFoundError: Unable to find"),
        ("far.yaml", "the task {} needs the network once, to load its data, and the hub cannot be reached (HF_HUB_OFF"),
        ("none.yaml", "the task {}: there is no such file"),
        ("broken.yaml", "the task {}: ParserError: while parsing a flow node"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_told_in_one_line(places, capsys, name, message):
    assert main(["eval", str(places / "dense"), "--tasks", str(places / name)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: " + message.format(places / name)), error


def test_a_name_that_no_task_has_is_answered_by_the_nearest(places, named, capsys):
    assert main(["eval", str(places / "dense"), "--tasks", "one,othre"]) == 2
    assert "no task is named 'othre'; did you mean other? `lm_eval ls tasks` lists" in capsys.readouterr().err
