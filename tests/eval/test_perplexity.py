"""``eval/perplexity.py`` against a token-by-token reference, against stock transformers, and with bad input."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    ViTConfig,
)

from eval.perplexity import main, summed_loss
from llm_cht.config import parse
from llm_cht.data.tokenizer import train_bpe, trained_bpe
from llm_cht.errors import UserError
from llm_cht.models import ModelSettings, build_model, check_kind
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.train.config import RunSettings
from llm_cht.train.run import train
from tests.helpers import records, tiny_config

DOCUMENTS = ["A sparse link moves.", "Größe zählt:\nzwei Zeilen, 3 Wörter.", "the mask of the layer, the mask"]
POSITIONS = 64


def new_model(vocab_size: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,  # far from uniform predictions, which would hide mistakes
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    new_model().save_pretrained(folder)
    trained_bpe(train_bpe(DOCUMENTS, 300, 10**6)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(DOCUMENTS) + "\n\n  \n")
    return path


def rows(folder: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """The rows that a call in this process writes."""
    assert main(["--device", "cpu", "--json", str(folder / "rows.json"), *map(str, arguments)]) == 0
    return json.loads((folder / "rows.json").read_text())


def line_of(folder: Path) -> torch.Tensor:
    """The documents as one line of tokens, an end token after each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor([token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], 2]])


@torch.no_grad()
def token_by_token(model: LlamaForCausalLM, tokens: torch.Tensor, length: int, stride: int) -> float:
    """Sum of -ln p, each token predicted alone from the context that the first window to reach it gives."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = next(start for start in range(0, len(tokens), stride) if target <= start + length)
        context = tokens[start:target]
        assert len(context) >= min(target, length - stride + 1)
        log_p = model(input_ids=context[None]).logits[0, -1].double().log_softmax(0)
        total -= log_p[tokens[target]].item()
    return total


@pytest.mark.parametrize(
    ("length", "stride", "batch_size"),
    [(16, 16, 2), (16, 8, 3), (16, 5, 1), (16, 1, 64), (1, 1, 9), (64, 64, 8), (64, 7, 2)],
)
def test_equals_prediction_token_by_token(model_folder: Path, length: int, stride: int, batch_size: int):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokens = line_of(model_folder)
    expected = token_by_token(model, tokens, length, stride)
    assert summed_loss(model, tokens, length, stride, batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_tokens", [2, 15, 16, 17, 18, 24, 25, 26, 33])
def test_predicts_every_token_but_the_first_once(num_tokens: int):
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every prediction is uniform: the sum counts them
    loss = summed_loss(model, torch.arange(num_tokens), length=16, stride=8, batch_size=2)
    assert loss == pytest.approx((num_tokens - 1) * math.log(300), rel=1e-6)


def test_figures_follow_their_definitions(model_folder: Path, text: Path, tmp_path: Path):
    (row,) = rows(tmp_path, model_folder, "--data", text, "--dtype", "float64", "--sequence_length", "16")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokens = line_of(model_folder)
    loss = token_by_token(model, tokens, 16, 8)
    assert row["perplexity"] == pytest.approx(math.exp(loss / (len(tokens) - 1)), rel=1e-6)
    assert row["word_perplexity"] == pytest.approx(math.exp(loss / 17), rel=1e-6)
    num_bytes = len("".join(DOCUMENTS).encode())
    assert row["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-6)
    del row["perplexity"], row["word_perplexity"], row["bits_per_byte"]
    assert row == {
        "model": str(model_folder),
        "tokens": len(tokens) - 1,
        "words": 17,
        "bytes": num_bytes,
        "sparsity": None,
        "sequence_length": 16,
        "stride": 8,
        "dtype": "float64",
    }


def test_max_tokens_keeps_whole_documents(model_folder: Path, text: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    first, second, _ = (len(tokenizer(document)["input_ids"]) + 1 for document in DOCUMENTS)
    for max_tokens, num_documents in ((first, 1), (first + second - 1, 1), (first + second, 2)):
        (row,) = rows(tmp_path, model_folder, "--data", text, "--max_tokens", str(max_tokens))
        assert row["tokens"] == (first, first + second)[num_documents - 1] - 1
        assert row["bytes"] == len("".join(DOCUMENTS[:num_documents]).encode())


def test_models_are_rows_of_one_markdown_table(
    model_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    loose = f"{model_folder}/"
    first, second = rows(tmp_path, model_folder, loose, "--data", text, text, "--dtype", "bfloat16")
    assert second == first | {"model": loose}
    assert (first["sequence_length"], first["stride"]) == (POSITIONS, POSITIONS // 2)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    header, rule, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == list(first)
    assert set("".join(rule)) == {"-"}
    assert [cells[0] for cells in body] == [str(model_folder), loose]
    assert body[0][1] == f"{first['perplexity']:,.6g}"
    assert body[0][header.index("sparsity")] == "-"


# ---- a folder that `llm-cht train` wrote ----

STOCK = """
import json, math, sys, numpy as np, torch
from pathlib import Path
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, length, stride = Path(sys.argv[1]), Path(sys.argv[2]).read_text(), int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
documents = [tokenizer(document)["input_ids"] + [tokenizer.eos_token_id] for document in text.split("\\n\\n")]
tokens = torch.tensor([sum(documents, [])])
found = {"tokens": tokens.shape[1] - 1}
for dtype in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    total, start, done = 0.0, 0, 0
    while done < found["tokens"]:
        window = tokens[:, start : start + length + 1]
        new = done - start
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0, new:].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, new + 1 :], reduction="sum").item()
        start, done = start + stride, start + window.shape[1] - 1
    found[dtype] = math.exp(total / done)
for name, bits in load_file(folder / "topology.safetensors").items():
    weight = model.get_parameter(name + ".weight")
    links = np.unpackbits(bits, count=weight.numel(), bitorder="little").astype(bool)
    assert np.array_equal((weight != 0).flatten().numpy(), links), name
assert not [name for name in sys.modules if name.startswith("llm_cht")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(parse(RunSettings, "llm-cht train", [str(tiny_config(folder))]), say=print)
    return folder / "run"


def test_equals_stock_transformers_in_a_process_without_llm_cht(run: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join((run.parent / "text.txt").read_text().split("\n\n")[:100]))
    call = [sys.executable, "-c", STOCK, str(run / "model"), str(text), "32", "20"]
    stock = json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, cwd=tmp_path).stdout)
    for dtype in ("float32", "bfloat16"):
        shape = ["--sequence_length", "32", "--stride", "20"]
        (row,) = rows(tmp_path, run / "model", "--data", text, "--dtype", dtype, *shape)
        assert row["tokens"] == stock["tokens"]
        assert row["perplexity"] == pytest.approx(stock[dtype], rel=1e-4)


def test_zeros_lie_where_the_topology_has_no_link(run: Path, tmp_path: Path):
    counts = verify_folder(run / "model").values()
    assert all(count.nonzero == count.links for count in counts)
    masks = read_topology(run / "model").masks.values()
    sparsity = 1 - sum(count.links for count in counts) / sum(mask_OI.numel() for mask_OI in masks)
    (row,) = rows(tmp_path, run / "model", "--data", run.parent / "text.txt", "--max_tokens", "500")
    assert row["sparsity"] == pytest.approx(sparsity)
    assert row["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_held_out_documents_give_the_validation_of_the_run(run: Path, tmp_path: Path):
    shape = ["--validation_fraction", "0.1", "--sequence_length", "32", "--stride", "32"]
    (row,) = rows(tmp_path, run / "model", "--data", run.parent / "text.txt", *shape)
    (last,) = [record for record in records(run, "validation") if record["full"]]
    assert last["validation_tokens"] == (row["tokens"] + 1) // 32 * 31  # the first of a sequence is not predicted
    assert row["perplexity"] == pytest.approx(last["perplexity"], rel=1e-3)


# ---- bad input ----


@pytest.fixture(scope="module")
def places(model_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files with one fault each."""
    tmp = tmp_path_factory.mktemp("bad")
    tokenizer_of = {name: shutil.copytree(model_folder, tmp / name) for name in ("cut", "narrow", "gap", "wild")}
    weights = tokenizer_of["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    new_model(vocab_size=100).save_pretrained(tokenizer_of["narrow"])
    state = new_model().state_dict()
    save_file({name: t for name, t in state.items() if "norm" not in name}, tokenizer_of["gap"] / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, tokenizer_of["wild"] / "model.safetensors")
    new_model().save_pretrained(tmp / "bare")
    for name, config in (("pairs", MarianConfig()), ("bert", BertConfig()), ("vit", ViTConfig())):
        config.save_pretrained(tmp / name)
    (tmp / "typed").mkdir()
    (tmp / "typed" / "config.json").write_text('{"model_type": "gpt2", "n_embd": "x"}')
    (tmp / "empty.txt").touch()
    (tmp / "blank.jsonl").write_text('{"text": " "}\n')
    return {"folder": model_folder, "text": text, "tmp": tmp}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{text}"], "MODEL"),
        (["{folder}"], "--data"),
        (["{tmp}/nowhere", "--data", "{text}"], "nowhere: no such folder"),
        (["{tmp}/bare", "--data", "{text}"], "AutoTokenizer cannot load it"),
        (["{tmp}", "--data", "{text}"], "no model here, as it has no config.json; you mean"),
        (["{tmp}/pairs", "--data", "{text}"], "marian is an encoder-decoder; use eval/bleu.py"),
        (["{tmp}/bert", "--data", "{text}"], "bert is neither a language model nor an encoder-decoder of text"),
        (["{tmp}/vit", "--data", "{text}"], "vit is neither a language model nor an encoder-decoder of text"),
        (["{tmp}/typed", "--data", "{text}"], "'n_embd' expected int, got str (value: 'x'); correct it"),
        (["{tmp}/cut", "--data", "{text}"], "AutoModelForCausalLM cannot load it"),
        (["{tmp}/narrow", "--data", "{text}"], "none of the model's 100"),
        (["{tmp}/gap", "--data", "{text}"], "no weights for model.layers.0"),
        (["{tmp}/wild", "--data", "{text}"], "not finite"),
        (["{folder}", "--data", "{tmp}/missing.txt"], "missing.txt': no such file"),
        (["{folder}", "--data", "{tmp}/empty.txt"], "empty.txt: the file is empty"),
        (["{folder}", "--data", "{tmp}/blank.jsonl"], "no document with text"),
        (["{folder}", "--data", "{text}", "--sequence_length", "65"], "64 positions"),
        (["{folder}", "--data", "{text}", "--stride", "65"], "--stride 65"),
        (["{folder}", "--data", "{text}", "--stride", "17", "--sequence_length", "16"], "--stride 17"),
        (["{folder}", "--data", "{text}", "--stride", "0"], "--stride: 0"),
        (["{folder}", "--data", "{text}", "--batch_size", "x"], "--batch_size: x"),
        (["{folder}", "--data", "{text}", "--dtype", "int8"], "float16"),
        (["{folder}", "--data", "{text}", "--max_tokens", "3"], "--max_tokens 3: the first document has"),
        (["{folder}", "--data", "{text}", "--validation_fraction", "1.5"], "--validation_fraction 1.5"),
        (["{folder}", "--data", "{text}", "--json", "{tmp}/no/rows.json"], "no/rows.json: cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main([word.format(**places) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("perplexity.py: error: ")
    assert error.count("\n") == 1


def test_training_refuses_a_config_of_a_wrong_type_alike(places: dict[str, Path]):
    typed = str(places["tmp"] / "typed")
    with pytest.raises(UserError, match=r"cannot be loaded: .*'n_embd' expected int, got str"):
        check_kind(ModelSettings(path=typed), "causal")
    with pytest.raises(UserError, match=r"typed': its config.json cannot work: .*'n_embd' expected"):
        build_model(ModelSettings(config=typed), 0)


def test_the_script_passes_the_exit_code_on(monkeypatch: pytest.MonkeyPatch):
    script = Path(__file__).parents[2] / "eval" / "perplexity.py"
    monkeypatch.setattr(sys, "argv", [str(script), "nowhere"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_info.value.code == 2


def test_cuda_is_refused_where_there_is_none(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(places["folder"]), "--data", str(places["text"]), "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.gpu
def test_cuda_gives_the_figures_of_the_cpu(model_folder: Path, text: Path, tmp_path: Path):
    (on_cpu,) = rows(tmp_path, model_folder, "--data", text)
    (on_cuda,) = rows(tmp_path, model_folder, "--data", text, "--device", "cuda")
    assert on_cuda["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-4)
