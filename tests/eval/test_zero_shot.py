"""``eval/zero_shot.py`` on made-up documents: against scikit-learn, lm-eval's own files and command, and bad input."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import process_docs
from sklearn.metrics import matthews_corrcoef

from eval import zero_shot_tasks
from eval.zero_shot import main
from eval.zero_shot_run import share
from tests.launched import ROOT, Launched, free_port
from tests.zero_shot_parts import FIELDS, new_model, write_all, write_data

SCRIPT = ROOT / "eval" / "zero_shot.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("zero_shot"))


def report_of(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """What a call in this process writes; models are named by their folders' names."""
    names = [str(folder / word) if word in ("a", "b", "yes") else str(word) for word in arguments]
    files = ["--data", str(folder / "data"), "--json", str(folder / "report.json"), "--device", "cpu"]
    assert main([*names, *files, "--bootstrap", "50"]) == 0
    return json.loads((folder / "report.json").read_text())


def test_figures_follow_from_the_samples_and_are_lm_evals(folder: Path, capfd: pytest.CaptureFixture[str]):
    report = report_of(folder, "a", "b", "--limit", "8", "--plot", folder / "bars.svg")
    table = capfd.readouterr().out
    tasks = {task["task"]: task for task in report["tasks"]}
    assert [*tasks] == [name for name in zero_shot_tasks.DEFAULT if name != "qqp"]
    assert [row["task"] for row in report["skipped"]] == ["qqp"]
    assert "qqp: skipped: no qqp.jsonl" in table
    assert {name for name, task in tasks.items() if task["prompt_differs"]} == {"hellaswag"}
    for row in report["figures"]:
        task, own = tasks[row["task"]], row["lm_eval"][0]
        assert row["accuracy"] == pytest.approx(own.get("acc,none", row["accuracy"]), abs=1e-12)
        if row["task"] in ("copa", "hellaswag"):
            assert "mcc" not in row
            assert task["balance"] is None
            continue
        file = zero_shot_tasks.local_file(row["task"], folder / "data")
        assert task["labels"] == [json.loads(line)["label"] for line in file.read_text().splitlines()[:8]]
        (predictions,) = row["predictions"]
        assert row["mcc"] == pytest.approx(matthews_corrcoef(task["labels"], predictions), abs=1e-12)
        assert own.get("mcc,none", row["mcc"]) == pytest.approx(row["mcc"], abs=1e-12)
        assert np.allclose(task["balance"], np.bincount(task["labels"], minlength=len(task["classes"])) / 8)
        assert np.allclose(row["predicted"], np.bincount(predictions, minlength=len(task["classes"])) / 8)
        assert f"{row['mcc'] + 0:.3f} ± {row['mcc_error']:.3f}" in table or row["mcc"] == 0
    assert len({tuple(row["predictions"][0]) for row in report["figures"] if "mcc" in row}) > 4
    for average, model in zip(report["averages"], report["models"], strict=True):
        rows = [row for row in report["figures"] if row["model"] == model["model"]]
        assert average["mcc"] == pytest.approx(np.mean([row["mcc"] for row in rows if "mcc" in row]))
        assert average["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in rows]))
        assert (average["mcc_tasks"], average["accuracy_tasks"]) == (9, 11)
    assert [model["sparsity"] for model in report["models"]] == [None, 0.75]
    picture = (folder / "bars.svg").read_text()
    assert picture.count("<path") > 40


def test_a_constant_predictor_is_seen_at_a_glance(folder: Path, capfd: pytest.CaptureFixture[str]):
    report = report_of(folder, "yes", "a", "--tasks", "mrpc", "--plot", folder / "bars.png")
    row, _ = report["figures"]
    assert row["accuracy"] == report["tasks"][0]["balance"][1] >= 2 / 3
    assert (row["mcc"], row["mcc_error"], row["predicted"]) == (0, 0, [0, 1])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[4].split("|")[4].strip() == "**only yes**"
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_local_tasks_are_lm_evals_but_for_the_data(folder: Path, tmp_path: Path):
    own = zero_shot_tasks.own_files(zero_shot_tasks.DEFAULT)
    source = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}
    for name in [*FIELDS, "hellaswag"]:
        data = zero_shot_tasks.local_file(name, folder / "data")
        written = zero_shot_tasks.write_local(name, own[name], data, tmp_path)
        ours, theirs = (load_yaml(path, resolve_func=False) for path in (written.yaml, own[name]))
        prompt = {"process_docs", "doc_to_text", "doc_to_choice"} if written.prompt_differs else set()
        ignored = source | prompt | {"tag", "fewshot_split"}
        assert written.prompt_differs == (name == "hellaswag")
        for key in (ours.keys() | theirs.keys()) - ignored:
            assert ours[key] == theirs[key], (name, key)
        assert not TaskManager(include_defaults=False, include_path=tmp_path).all_tags


def test_short_hellaswag_cleans_as_lm_eval_does(tmp_path: Path):
    task = zero_shot_tasks.load(
        zero_shot_tasks.write_local(
            "hellaswag",
            zero_shot_tasks.own_files(["hellaswag"])["hellaswag"],
            zero_shot_tasks.local_file("hellaswag", write_data(tmp_path)),
            tmp_path,
        )
    )
    whole = [{**document, "ctx_a": document["ctx"], "ctx_b": ""} for document in task.eval_docs]
    theirs = process_docs(type(task.eval_docs).from_list(whole))
    for ours, cleaned in zip(task.eval_docs, theirs, strict=True):
        assert task.doc_to_text(ours).strip() == cleaned["query"].strip()
        assert task.doc_to_choice(ours) == cleaned["choices"]
        assert task.doc_to_target(ours) == cleaned["gold"]
        assert "[" not in task.doc_to_text(ours)


def test_files_with_whole_contexts_keep_lm_evals_prompt(folder: Path, tmp_path: Path):
    lines = (folder / "data" / "other" / "hellaswag.jsonl").read_text().splitlines()
    whole = [{**json.loads(line), "ctx_a": "A link.", "ctx_b": "the mask"} for line in lines]
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(record) + "\n" for record in whole))
    own = zero_shot_tasks.own_files(["hellaswag"])["hellaswag"]
    source = zero_shot_tasks.write_local("hellaswag", own, tmp_path / "hellaswag.jsonl", tmp_path)
    assert not source.prompt_differs
    assert zero_shot_tasks.load(source).eval_docs[0]["query"] == "Sparse links: A link. The mask"


def test_shots_are_drawn_by_seeds(folder: Path, capfd: pytest.CaptureFixture[str]):
    call = ["a", "--tasks", "sst2,copa", "--num_fewshot", "2", "--seeds"]
    both, again, alone = (report_of(folder, *call, *seeds) for seeds in (["0", "1"], ["0", "1"], ["1"]))
    assert both == again
    row, copa = both["figures"]
    assert len(row["predictions"]) == len(copa["correct"]) == 2
    assert row["predictions"][1] == alone["figures"][0]["predictions"][0]
    assert row["mcc_seeds"][1] == alone["figures"][0]["mcc"]
    assert row["mcc"] == pytest.approx(np.mean(row["mcc_seeds"]))
    assert "2 shots, means over the seeds 0, 1 that draw them" in capfd.readouterr().out
    zero = report_of(folder, "a", "--tasks", "sst2", "--seeds", "0", "1")
    assert len(zero["figures"][0]["predictions"]) == 1
    assert row["predictions"] != zero["figures"][0]["predictions"] * 2


def test_other_tasks_of_lm_eval_run_on_a_file_of_their_name(folder: Path, tmp_path: Path):
    records = [{"goal": "Move a link", "sol1": "the mask", "sol2": "a token", "label": n % 2} for n in range(4)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(tmp_path, tmp_path / "data")
    (figures,) = report_of(tmp_path, "a", "--tasks", "piqa")["figures"]
    assert figures["accuracy"] == figures["lm_eval"][0]["acc,none"] == 0.5


def test_long_prompts_are_counted(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    new_model(tmp_path / "a", 1, max_position_embeddings=40)
    shutil.copytree(folder / "data", tmp_path / "data")
    (row,) = report_of(tmp_path, "a", "--tasks", "mnli", "--limit", "4")["figures"]
    assert row["cut"] == 12
    assert "longer than its positions: mnli 12" in capfd.readouterr().out


def test_jobs_are_shared_out_by_their_cost():
    assert share([5, 1, 1, 9, 4, 1], 1) == [0] * 6
    owners = share([5, 1, 1, 9, 4, 1], 2)
    assert sum(cost for cost, owner in zip([5, 1, 1, 9, 4, 1], owners, strict=True) if owner) in (10, 11)
    assert share([], 2) == []


def test_real_data(folder: Path, data_dir: Path):
    files = ["--data", str(data_dir), "--limit", "8", "--json", str(folder / "real.json"), "--device", "cpu"]
    assert main([str(folder / "a"), *files]) == 0
    report = json.loads((folder / "real.json").read_text())
    assert len(report["tasks"]) == 11
    assert all(0 <= row["accuracy"] <= 1 for row in report["figures"])


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(folder: Path):
    arguments = [folder / "a", folder / "b", "--data", folder / "data", "--limit", "8", "--device", "cpu"]
    arguments += ["--num_fewshot", "1", "--seeds", "0", "1", "--tasks", "cola,mnli,cb,copa"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / "ddp.yaml"), "--main_process_port", free_port()]
    texts = {}
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        file = folder / f"{name}.json"
        with Launched([[*command, *map(str, [SCRIPT, *arguments, "--json", file])]], [{}]) as launched:
            codes, (output,) = launched.ends(280)
        assert codes == [0], output
        texts[name] = file.read_text(), [line for line in output.splitlines() if line.startswith("|")]
    assert texts["one"] == texts["two"]
    with Launched(
        [[*launcher, str(SCRIPT), str(folder / "nowhere"), "--data", str(folder / "data")]], [{}]
    ) as launched:
        codes, (output,) = launched.ends(280)
    assert codes != [0]
    assert output.count("zero_shot.py: error: ") == 1
    assert "nowhere: no such folder" in output


@pytest.mark.slow
@pytest.mark.timeout(600)  # the command reads every task file of lm-eval
def test_the_stock_command_finds_the_same_accuracies(folder: Path, capfd: pytest.CaptureFixture[str]):
    # not cola: lm-eval computes the error of its Matthews correlation by 100,000 calls of scikit-learn
    tasks = ["--tasks", "mnli,sst2,cb,copa,hellaswag", "--limit", "8", "--write_tasks", folder / "tasks"]
    report = report_of(folder, "b", *tasks)
    (command,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("lm_eval "))
    call = [sys.executable, "-m", *shlex.split(command), "--limit", "8", "--output_path", str(folder / "stock")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "stock").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    assert {row["task"]: row["accuracy"] for row in report["figures"]} == {
        name: pytest.approx(theirs[name]["acc,none"]) for name in theirs
    }
