"""What ``eval/zero_shot.py`` refuses: one sentence that names the value, the place and the remedy."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eval import zero_shot
from eval.zero_shot import main
from tests.zero_shot_parts import MLP, write_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("zero_shot"))


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files with one fault each."""
    tmp = tmp_path_factory.mktemp("bad")
    for name in ("bare", "gap", "wild", "own", "off"):
        shutil.copytree(folder / ("b" if name == "off" else "a"), tmp / name)
    for file in (tmp / "bare").glob("tokenizer*"):
        file.unlink()
    LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp / "gap")
    state = load_file(tmp / "wild" / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, tmp / "wild" / "model.safetensors", metadata={"format": "pt"})
    save_file(
        load_file(folder / "a" / "model.safetensors"), tmp / "off" / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((tmp / "own" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp / "own" / "config.json").write_text(json.dumps(config))
    (tmp / "own" / "mine.py").write_text("raise SystemExit('this must not run')\n")
    good = (folder / "data" / "glue" / "cola.jsonl").read_text().splitlines()
    faults = {
        "empty": [],
        "label": [*good[:4], json.dumps({"sentence": "A link.", "label": 2})],
        "negative": [json.dumps({"sentence": "A link.", "label": -1})],
        "damaged": [*good[:2], '{"sentence": "A li'],
        "list": ["[1, 2]"],
        "field": [*good[:3], json.dumps({"label": 1})],
        "null": [json.dumps({"sentence": None, "label": 1})],
        "other": [json.dumps({"text": "A link.", "label": 1})],
        "latin": ["caf\xe9"],
    }
    for name, lines in faults.items():
        (tmp / f"d_{name}").mkdir()
        (tmp / f"d_{name}" / "cola.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    return {"a": folder / "a", "data": folder / "data", "tmp": tmp}


COLA = ["--tasks", "cola"]
GOOD = ["--data", "{data}", *COLA]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere", *GOOD], "nowhere: no such folder"),
        (["{tmp}", *GOOD], "no model here, as it has no config.json"),
        (["{a}", "{a}", *GOOD], "more than once"),
        (["{tmp}/bare", *GOOD], "bare: AutoTokenizer cannot load it"),
        (["{tmp}/gap", *GOOD], "of its tokenizer is none of the model's 40"),
        (["{tmp}/wild", *GOOD], "its likelihoods are not finite"),
        (["{tmp}/own", *GOOD], "own: runs code of its own; read it, and trust it with --trust_remote_code"),
        (["{tmp}/off", *GOOD], f"weights of '{MLP}' are not 0 where topology.safetensors has no link"),
        (["{a}", "--data", "{tmp}/nowhere"], "--data {tmp}/nowhere: no such folder"),
        (["{a}", "--data", "{data}", "--tasks", "hellaswg"], "did you mean `hellaswag`?"),
        (["{a}", "--data", "{data}", "--tasks", ","], "names no task"),
        (
            ["{a}", "--data", "{tmp}/d_empty", "--tasks", "rte"],
            "no rte.jsonl in {tmp}/d_empty, and the hub",
        ),
        (["{a}", "--data", "{tmp}/bare"], "has no file such as cola.jsonl"),
        (["{a}", *COLA], "--tasks cola: the hub's data cannot be had"),
        (["{a}", "--data", "{tmp}/d_empty", *COLA], "cola.jsonl: the file is empty"),
        (["{a}", "--data", "{tmp}/d_label", *COLA], "cola.jsonl:5: label 2 is outside the 2 choices of cola"),
        (["{a}", "--data", "{tmp}/d_negative", *COLA], "cola.jsonl:1: label -1 is outside"),
        (["{a}", "--data", "{tmp}/d_damaged", *COLA], "cola.jsonl:3: is no JSON"),
        (["{a}", "--data", "{tmp}/d_list", *COLA], "cola.jsonl:1: is no JSON object"),
        (["{a}", "--data", "{tmp}/d_field", *COLA], "cola.jsonl:4: field 'sentence' lacks"),
        (["{a}", "--data", "{tmp}/d_null", *COLA], "cola.jsonl:1: field 'sentence' lacks"),
        (["{a}", "--data", "{tmp}/d_other", *COLA], "cola.jsonl: is no data of cola: UndefinedError"),
        (["{a}", "--data", "{tmp}/d_latin", *COLA], "cola.jsonl: cannot be read"),
        (["{a}", *GOOD, "--num_fewshot", "12"], "has 12 documents; give fewer"),
        (["{a}", *GOOD, "--seeds", "-1"], "-1 is not a whole number"),
        (["{a}", *GOOD, "--limit", "0"], "--limit: 0"),
        (["{a}", *GOOD, "--bootstrap", "1"], "at least 2 resamples"),
        (["{a}", *GOOD, "--plot", "bars.gif"], "bars.gif: give a name that ends with"),
        (["{a}", *GOOD, "--limit", "2", "--plot", "{tmp}/no/bars.svg"], "no/bars.svg: cannot be written"),
        (["{a}", *GOOD, "--limit", "2", "--json", "{tmp}/no/rows.json"], "no/rows.json: cannot be written"),
        (["{a}", *GOOD, "--write_tasks", "{a}/config.json/tasks"], "--write_tasks"),
        (["{a}", *COLA, "--write_tasks", "{tmp}/tasks"], "--write_tasks: needs --data"),
    ],
)
def test_bad_input_is_one_clear_line(
    places: dict[str, Path], capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main([word.format(**places) for word in arguments] + ["--device", "cpu"]) == 2
    error = capfd.readouterr().err
    assert message.format(**places) in error
    assert error.startswith("zero_shot.py: error: ")
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    assert main([str(folder / "a"), "--device", "cpu"]) == 2
    assert "lm-eval is not installed: pip install" in capfd.readouterr().err
