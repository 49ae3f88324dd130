"""The tables over runs: by hand from written folders, what may share a cell, every format, papers."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import table
from eval.table_grid import load_papers
from eval.table_metrics import metric_of
from eval.table_write import CSV_HEAD, escape
from llm_cht.topology.presets import PRESETS


def make_run(folder: Path, value: float | None, preset: str = "chts", sparsity: float = 0.9, **other: Any) -> Path:
    """A run folder with one figure; ``seed``, ``lr``, ``task``, ``model``, ``method``, ``ended`` and ``metric``."""
    translation = other.get("task") == "translation"
    config = {
        "run": str(folder),
        "seed": other.get("seed", 0),
        "task": other.get("task", "language_modelling"),
        "model": {"config": other.get("model", "llama_60m")},
        "data": {"source": ["/data/openwebtext/train.jsonl"]},
        "pairs": {"train": "/data/multi30k/train", "source": "en", "target": "de"},
        "method": {"preset": preset, "sparsity": sparsity, **other.get("method", {})},
        "optimizer": {"lr": other.get("lr", 0.003)},
        "train": {"steps": 100, "device": "cpu"},
    }
    summary = {
        other.get("metric", "test_bleu" if translation else "perplexity"): value,
        "density": 1 - sparsity,
        "average_density": 1 - sparsity + 0.05,
        "flops": 1.5e12,
        "flops_relative": 0.375,
        "seconds": 60.0,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record: dict[str, Any] = {"kind": "end", "step": 9, "seconds": 1, "summary": summary | other.get("also", {})}
    record = record if other.get("ended", True) else {"kind": "start", "step": 0, "seconds": 0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def papers_table(folder: Path) -> Path:
    """A dense model, two methods at two sparsities: two seeds each, but for one cell of one seed and one empty."""
    figures = {("dense", 0.0): [30, 32], ("set", 0.9): [33, 35], ("set", 0.7): [29, 31], ("chts", 0.9): [31.5]}
    for (preset, sparsity), values in figures.items():
        for seed, value in enumerate(values):
            make_run(folder / f"{preset}{sparsity}" / str(seed), value, preset, sparsity, seed=seed)
    return folder


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert table.main([str(word) for word in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one message of a call that is refused."""
    assert table.main([str(word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("table.py: error: ")
    return err


def rows_of(text: str, title: str) -> list[str]:
    """The lines of a Markdown table without its rule."""
    lines = text.split(f"### {title}", 1)[1].split("\n\n")[1].splitlines()
    return [line for line in lines if "---" not in line]


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# ---- one table by hand ----


def test_the_table_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = out_of(capsys, papers_table(tmp_path / "sweep"))
    assert text.startswith("## llama_60m on openwebtext/train.jsonl\n\n### Validation perplexity (lower is better)\n")
    assert rows_of(text, "Validation perplexity") == [
        "| method | 70 % | 90 % |",
        "| dense | 31.00 ± 1.00 (2) | 31.00 ± 1.00 (2) |",
        "| set | 30.00 ± 1.00 (2)\\* | 34.00 ± 1.00 (2) |",  # alone in its column: nothing to win
        "| chts | - | **31.50 (1)** |",
    ]
    assert rows_of(text, "Density")[1:] == [
        "| dense | 1.05 (1) | 1.05 (1) |",
        "| set | 0.35 (0.3) | 0.15 (0.1) |",
        "| chts | - | 0.15 (0.1) |",
    ]
    assert rows_of(text, "Training FLOPs")[3] == "| chts | - | 1.50e12 (0.375) |"
    assert "in brackets the number of seeds" in text
    assert "Settings that differ" not in text


def test_csv_parsed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = out_of(capsys, papers_table(tmp_path / "sweep"), "--format", "csv", "--paper", "llama_60m")
    rows = read_csv(text)
    assert list(rows[0]) == CSV_HEAD
    ours = {(row["method"], float(row["sparsity"])): row for row in rows if row["source"] == "runs"}
    assert {key: (row["mean"], row["standard_error"], row["n"], row["best"]) for key, row in ours.items()} == {
        ("dense", 0.0): ("31.0", "1.0", "2", "False"),
        ("set", 0.7): ("30.0", "1.0", "2", "False"),
        ("set", 0.9): ("34.0", "1.0", "2", "False"),
        ("chts", 0.9): ("31.5", "", "1", "True"),
    }
    assert (ours["set", 0.9]["seeds"], float(ours["set", 0.9]["flops"])) == ("0 1", 1.5e12)
    printed = {(row["method"], row["sparsity"]): row["mean"] for row in rows if row["source"] != "runs"}
    assert printed["set", "0.9"] == "35.26"
    assert {row["source"] for row in rows} == {"runs", "Zhang et al. 2025, Table 3 (LLaMA-60M)"}


def test_higher_is_better_for_bleu_and_ties_are_both_bold(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, value in (("dense", 25.0), ("set", 26.0), ("rigl", 26.0), ("chts", 24.0)):
        make_run(tmp_path / name, value, name, 0.0 if name == "dense" else 0.9, task="translation")
    rows = rows_of(out_of(capsys, tmp_path), "Test BLEU (higher is better)")
    assert rows[1:] == ["| dense | 25.00 |", "| set | **26.00**\\* |", "| rigl | **26.00**\\* |", "| chts | 24.00 |"]


# ---- what may share a cell ----


def test_what_differs_within_a_cell_is_a_row_and_never_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, (lr, seed, value) in enumerate([(3e-3, 0, 20.0), (3e-3, 1, 22.0), (1e-2, 0, 19.0), (1e-2, 1, 25.0)]):
        make_run(tmp_path / str(number), value, lr=lr, seed=seed)
    make_run(tmp_path / "4", 1.0, lr=0.1)
    make_run(tmp_path / "5", 23.0, "set", lr=0.1)
    text = out_of(capsys, tmp_path)
    assert rows_of(text, "Validation perplexity")[1:] == [
        "| set | 23.00 (1) |",
        "| chts (optimizer.lr 0.003) | 21.00 ± 1.00 (2) |",
        "| chts (optimizer.lr 0.01) | 22.00 ± 3.00 (2) |",
        "| chts (optimizer.lr 0.1) | **1.00 (1)** |",
    ]
    best = out_of(capsys, tmp_path, "--best", "optimizer.lr")
    assert "| chts | **21.00 ± 1.00 (2)** |" in best  # 1.00 has fewer seeds than the others
    assert "chts at 90 %: 0.003 of 0.003, 0.01, 0.1." in best
    ignoring = out_of(capsys, *(tmp_path / str(number) for number in range(4)), "--ignore", "optimizer.lr")
    assert "| chts | 21.50 ± 2.00 |" in ignoring  # of seed 0: 19.5, of seed 1: 23.5
    assert "Mean over 2 seeds" in ignoring
    assert "- Averaged over `optimizer.lr`, within each seed first.\n" in ignoring
    text = out_of(capsys, tmp_path, "--ignore", "optimizer.lr", "--format", "csv")
    (row,) = [row for row in read_csv(text) if row["method"] == "chts"]
    assert (row["n"], row["seeds"], float(row["mean"])) == ("2", "0 1", pytest.approx((40 / 3 + 23.5) / 2))
    uneven = out_of(capsys, tmp_path, "--ignore", "optimizer.lr")
    assert "within each seed first; not every seed has the same values of chts at 90 %." in uneven
    make_run(tmp_path / "again", 1.0, lr=0.1)
    assert "both chts at 90 % with seed 0" in told(capsys, tmp_path, "--ignore", "optimizer.lr")
    ignoring = out_of(capsys, tmp_path / "0", tmp_path / "3", "--ignore", "optimizer.lr")
    assert "| chts | 22.50 ± 2.50 |" in ignoring


def test_what_differs_between_rows_and_from_the_preset_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "a", 1.0, "dense", 0.0, lr=0.001, method={"update_interval": 7})
    make_run(tmp_path / "b", 2.0, "set", method={"update_interval": 5})
    regrowth = {"regrowth_choice": "hard", "regrowth_from": {8: "gradient"}, "update_interval": 5}
    make_run(tmp_path / "c", 3.0, "chts", method=regrowth)
    notes = out_of(capsys, tmp_path).split("### Settings that differ")[1].strip().splitlines()
    assert notes == [
        "- `optimizer.lr`: 0.001 in dense; 0.003 in set, chts.",
        '- Not as its preset has it: chts: `method.regrowth_from` {"8": "gradient"}, `method.regrowth_choice` hard.',
    ]


def test_settings_that_follow_from_another_do_not_lengthen_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "a", 1.0, lr=0.001, method={"end_step": 75})
    make_run(tmp_path / "b", 2.0, lr=0.002, method={"end_step": 150})
    text = out_of(capsys, tmp_path)
    assert "| chts (optimizer.lr 0.001) | **1.00** |" in text
    assert "- chts: with `optimizer.lr` varies `method.end_step`." in text


def test_models_and_data_are_sections_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, model, task in (("a", "llama_60m", None), ("b", "llama_130m", None), ("c", "marian", "translation")):
        make_run(tmp_path / name, 9.0, model=model, task=task or "language_modelling")
    text = out_of(capsys, tmp_path)
    headings = re.findall("^##+ (.*)", text, re.MULTILINE)
    assert [heading for heading in headings if " on " in heading] == [
        "llama_60m on openwebtext/train.jsonl",
        "llama_130m on openwebtext/train.jsonl",
        "marian on multi30k/train, en to de",
    ]
    assert headings[9] == "Test BLEU (higher is better)"
    assert "several models or data sets" in told(capsys, tmp_path, "--paper", "llama_60m")


def test_unfinished_and_diverged_runs_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "good", 5.0)
    make_run(tmp_path / "diverged", None, seed=1)
    make_run(tmp_path / "half", 1.0, seed=2, ended=False)
    begun = make_run(tmp_path / "begun", 1.0, seed=3)
    (begun / "metrics.jsonl").unlink()
    other = make_run(tmp_path / "other", 7.0, seed=4, metric="accuracy_of_mine")
    text = out_of(capsys, tmp_path)
    assert "| chts | 5.00 |" in text
    assert f"Left out, for their perplexity is not finite: {tmp_path / 'diverged'}." in text
    assert f"Left out, for they have no perplexity: {other}." in text
    assert f"Left out, for they have not finished: {begun}, {tmp_path / 'half'}." in text


def test_a_cell_of_which_a_seed_diverged_wins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "dense", 22.0, "dense", 0.0)
    for seed, (whole, survived) in enumerate([(20.0, 19.9), (21.0, None), (22.0, None)]):
        make_run(tmp_path / f"set{seed}", whole, "set", seed=seed)
        make_run(tmp_path / f"rigl{seed}", survived, "rigl", seed=seed)
    text = out_of(capsys, tmp_path)
    assert rows_of(text, "Validation perplexity")[2:] == ["| set | **21.00 ± 0.58 (3)**\\* |", "| rigl | 19.90 (1) |"]
    assert "\\*: better than dense; neither where a seed diverged." in text
    rows = read_csv(out_of(capsys, tmp_path, "--format", "csv"))
    assert {row["method"]: row["best"] for row in rows} == {"dense": "False", "set": "True", "rigl": "False"}
    only = out_of(capsys, *(tmp_path / f"rigl{seed}" for seed in (0, 1)), tmp_path / "dense")
    assert "| rigl | 19.90 |" in only


# ---- formats ----


def test_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = papers_table(tmp_path / "a_b & c%#$^~")
    make_run(runs / "half", 1.0, ended=False)
    make_run(runs / "more", 30.5, "chts", 0.7, lr=0.01)
    file = tmp_path / "table.tex"
    assert out_of(capsys, runs, "--paper", "llama_60m", "--output", file) == ""
    text = file.read_text()
    assert "dense & \\multicolumn{2}{c}{31.00 $\\pm$ 1.00 (2)} & \\multicolumn{2}{c}{26.56} \\\\" in text
    assert "chts & 30.50 (1)* & \\textbf{31.50 (1)} & 28.12 & 33.03 \\\\" in text
    assert "\\cmidrule(lr){2-3} \\cmidrule(lr){4-5}" in text
    assert "$1.50 \\times 10^{12}$ (0.375)" in text
    assert "a\\_b \\& c\\%\\#\\$\\textasciicircum{}\\textasciitilde{}" in text
    assert text.count("\\begin{table}") == text.count("\\end{table}") == text.count("\\bottomrule") == 3
    for table_text in text.split("\\midrule")[1:]:
        lines = table_text.split("\\bottomrule")[0].strip().splitlines()
        spans = [sum(int(width) - 1 for width in re.findall(r"multicolumn\{(\d)", line)) for line in lines]
        columns = {line.replace("\\&", "").count("&") + more for line, more in zip(lines, spans, strict=True)}
        assert len(columns) == 1
    if shutil.which("pdflatex"):
        head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table}\\end{document}"
        (tmp_path / "all.tex").write_text(head)
        call = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:]


def test_text_for_latex():
    assert escape("-0.003 ± 1.2e9, `a_b` at 5-6 \\ {x}") == (
        "$-$0.003 $\\pm$ $1.2 \\times 10^{9}$, \\texttt{a\\_b} at 5-6 \\textbackslash{} \\{x\\}"
    )


def test_files_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = papers_table(tmp_path / "runs")
    files = [tmp_path / f"table{ending}" for ending in (".md", ".tex", ".csv")]
    assert out_of(capsys, runs, "--output", *files, "--plot", tmp_path / "plot.svg") == ""
    both = out_of(capsys, runs, "--format", "markdown", "csv")
    assert both == files[0].read_text() + "\n" + files[2].read_text()
    assert (tmp_path / "plot.svg").read_text().count("<path") > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plot.svg",
        "runs",
        "table.csv",
        "table.md",
        "table.tex",
    ]


# ---- papers ----


def test_papers_are_whole_and_stand_beside_by_name_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = out_of(capsys, "--papers").splitlines()
    papers = load_papers()
    assert [line.split()[0] for line in listed] == list(papers)
    for paper in papers.values():
        assert metric_of(paper.metric)
        assert set(paper.figures) <= set(PRESETS)
        assert all(len(row) == (1 if name == "dense" else len(paper.sparsities)) for name, row in paper.figures.items())
    runs = papers_table(tmp_path / "runs")
    assert "Zhang" not in out_of(capsys, runs)
    text = out_of(capsys, runs, "--paper", "llama_60m")
    title = "Zhang et al. 2025, Table 3 (LLaMA-60M)"
    assert rows_of(text, "Validation perplexity")[::3] == [
        f"| method | 70 % | 90 % | {title}: 70 % | {title}: 90 % |",
        "| chts | - | **31.50 (1)** | 28.12 | 33.03 |",
    ]
    make_run(tmp_path / "t" / "a", 30.0, "cht", 0.95, task="translation")
    make_run(tmp_path / "t" / "b", 30.0, "dense", 0.0, task="translation")
    text = out_of(capsys, tmp_path / "t", "--paper", "multi30k")
    assert rows_of(text, "Test BLEU")[1:] == ["| dense | 30.00 | 31.38 ± 0.38 |", "| cht | 30.00 | 27.79 |"]
    assert "the runs have 95 %" in told(capsys, tmp_path / "t", "--paper", "multi30k_2024")


# ---- mistakes ----


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", 1.0)
    half = make_run(tmp_path / "half", 1.0, ended=False)
    copy = make_run(tmp_path / "copy", 1.0)
    (tmp_path / "empty").mkdir()
    cases: dict[str, tuple[Any, ...]] = {
        "no such folder": (tmp_path / "none",),
        "neither a run nor a folder of runs": (tmp_path / "empty",),
        f"no run has finished: {half}; go on with: llm-cht train {half}/config.yaml": (half,),
        "did you mean `perplexity`?": (run, "--metric", "perplexty"),
        "as repetitions they would count twice": (run, copy),
        "unknown key `lr` in --best; did you mean `optimizer.lr`?": (run, "--best", "lr"),
        "in --ignore; did you mean `train.steps`?": (run, "--ignore", "train.step"),
        "did you mean `multi30k`?": (run, "--paper", "multi30"),
        "prints Test BLEU, which no table here shows": (run, "--paper", "multi30k"),
        "ends with .md, .tex or .csv": (run, "--output", "table.txt"),
        "ends with .svg, .png or .pdf": (run, "--plot", "table.gif"),
        "there is no folder": (run, "--output", tmp_path / "none" / "table.md"),
        "is a folder": (run, "--output", make_run(tmp_path / "folder.md", 1.0)),
        "give the folder of a run": (),
        "invalid choice: 'html'": (run, "--format", "html"),
    }
    for part, arguments in cases.items():
        assert part in told(capsys, *arguments)
    (run / "config.yaml").write_text("seed: 0\n")
    assert "lacks `method.preset`" in told(capsys, run)
    (copy / "metrics.jsonl").write_text("damaged\n" + (copy / "metrics.jsonl").read_text())
    assert "line 1 is damaged" in told(capsys, copy)
