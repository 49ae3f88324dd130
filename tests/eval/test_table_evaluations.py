"""What the other programs wrote of models, in the tables over runs: whose it is, and what may be compared."""

import json
from pathlib import Path

import pytest

from eval import bleu, perplexity, zero_shot
from tests.eval.test_table import make_run, out_of, read_csv, told
from tests.helpers import command, finished, tiny_config
from tests.zero_shot_parts import write_data


def test_a_real_run_and_what_the_programs_write_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = finished(command("train", tiny_config(tmp_path, train={"steps": 6}, data={"vocab_size": 300})))
    assert code == 0, err
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    write_data(tmp_path / "data")
    zero, ppl, translated = (tmp_path / f"{name}.json" for name in ("zero", "ppl", "bleu"))
    tasks = ["--data", tmp_path / "data", "--tasks", "mrpc,copa", "--limit", "6", "--bootstrap", "5", "--json", zero]
    assert zero_shot.main([str(word) for word in (model, *tasks, "--device", "cpu")]) == 0
    words = (model, "--data", tmp_path / "text.txt", "--max_tokens", "500", "--json", ppl, "--device", "cpu")
    assert perplexity.main([str(word) for word in words]) == 0
    (tmp_path / "lines").write_text("one two three four\n" * 5)
    files = [word for name in ("hypotheses", "source", "reference") for word in (f"--{name}", str(tmp_path / "lines"))]
    assert bleu.main([*files, "--json", str(translated)]) == 0
    report = json.loads(translated.read_text())
    report["rows"][0]["model"] = "run/model"  # as from another folder
    translated.write_text(json.dumps(report))
    capsys.readouterr()
    names = ["perplexity", "mcc*", "accuracy.copa", "word_perplexity", "eval_bleu"]
    arguments = [run, "--eval", zero, ppl, translated, "--format", "csv", "--metric", *names]
    rows = {row["metric"]: row for row in read_csv(out_of(capsys, *arguments))}
    assert set(rows) == {"perplexity", "mcc", "mcc.mrpc", "accuracy.copa", "word_perplexity", "eval_bleu"}
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["summary"]
    shown = rows["perplexity"]
    assert [float(shown[key]) for key in ("mean", "density", "average_density", "flops", "flops_relative")] == [
        end[key] for key in ("perplexity", "density", "average_density", "flops", "flops_relative")
    ]
    assert (shown["method"], float(shown["sparsity"]), shown["standard_error"]) == ("chts", 0.8, "")
    found = json.loads(zero.read_text())
    assert float(rows["mcc"]["mean"]) == found["averages"][0]["mcc"]
    assert float(rows["word_perplexity"]["mean"]) == json.loads(ppl.read_text())[0]["word_perplexity"]
    assert float(rows["eval_bleu"]["mean"]) == pytest.approx(100)
    text = out_of(capsys, run, "--eval", zero)
    assert "### Average zero-shot MCC (higher is better)" in text
    assert "Not as its preset" not in text


def perplexities(file: Path, **of_model: int) -> Path:
    """What perplexity.py writes: 10 for each model, on texts of so many bytes."""
    keys = {"perplexity": 10.0, "word_perplexity": 9.0, "bits_per_byte": 1.0, "tokens": 7, "sequence_length": 8}
    rows = [keys | {"model": name, "stride": 4, "dtype": "float32", "bytes": size} for name, size in of_model.items()]
    file.write_text(json.dumps(rows).replace("__", "/"))
    return file


def test_evaluations_that_do_not_belong_or_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [make_run(tmp_path / where / "same", 1.0, seed=seed) for seed, where in enumerate(("a", "b"))]
    good = perplexities(tmp_path / "good.json", a__same__model=5, strange__model=5)
    text = out_of(capsys, *runs, "--eval", good)
    assert "strange/model in good.json is the model of no run here" in text
    assert f"Left out, for they have no eval_perplexity: {runs[1]}." in text
    unequal = perplexities(tmp_path / "unequal.json", a__same__model=5, b__same__model=6)
    message = told(capsys, *runs, "--eval", unequal)
    assert "measured in different ways: tokens 7, bytes 5" in message
    assert "stands in another file too" in told(capsys, *runs, "--eval", good, good)
    several = perplexities(tmp_path / "several.json", same__model=5)
    assert "may be that of" in told(capsys, *runs, "--eval", several)
    for content in ("no json", "{}", "[1]", '{"figures": []}'):
        (tmp_path / "bad.json").write_text(content)
        assert "is nothing that zero_shot.py" in told(capsys, *runs, "--eval", tmp_path / "bad.json")
    assert "no such file" in told(capsys, *runs, "--eval", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    assert "bad.json: holds no figure of a model" in told(capsys, *runs, "--eval", tmp_path / "bad.json")
    for value in ('"inf"', "true", "[1]"):
        (tmp_path / "bad.json").write_text(good.read_text().replace("10.0", value))
        message = told(capsys, *runs, "--eval", tmp_path / "bad.json")
        assert f"eval_perplexity of 'a/same/model' is {json.loads(value)!r}, where" in message
    (tmp_path / "bad.json").write_text(good.read_text().replace('"a/same/model"', "5"))
    assert "eval_perplexity of 5 is 10.0, where the name" in told(capsys, *runs, "--eval", tmp_path / "bad.json")


def zero_shots(file: Path, model: Path, documents: int, prompt_differs: bool = False) -> Path:
    """What zero_shot.py writes of one model on two tasks."""
    names = ("cola", "rte")
    report = {
        "settings": {"num_fewshot": 0, "limit": None, "seeds": [0], "dtype": "float32"},
        "tasks": [{"task": name, "documents": documents, "prompt_differs": prompt_differs} for name in names],
        "figures": [{"model": str(model), "task": name, "mcc": 0.1, "accuracy": 0.5} for name in names],
        "averages": [{"model": str(model), "mcc": 0.1, "accuracy": 0.5}],
    }
    file.write_text(json.dumps(report))
    return file


def test_zero_shot_figures_of_other_data_or_prompts_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, second = (make_run(tmp_path / preset, 1.0, preset) for preset in ("set", "rigl"))
    whole = zero_shots(tmp_path / "whole.json", first / "model", 1043)
    for metric in ("mcc", "accuracy", "mcc.cola", "accuracy.rte"):
        words = (first, second, "--metric", metric, "--eval", whole)
        few = zero_shots(tmp_path / "few.json", second / "model", 20)
        assert f"{metric} of {first} and of {second} were measured in different ways" in told(capsys, *words, few)
        other = zero_shots(tmp_path / "other.json", second / "model", 1043, prompt_differs=True)
        assert "1043 documents, prompt differs" in told(capsys, *words, other)
        alike = zero_shots(tmp_path / "alike.json", second / "model", 1043)
        assert out_of(capsys, *words, alike)
