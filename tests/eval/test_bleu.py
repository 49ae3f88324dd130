"""``eval/bleu.py`` end to end against the ``sacrebleu`` command on the files it wrote, and with bad input."""

import gzip
import json
import lzma
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, WhisperConfig

from eval.bleu import main
from llm_cht.sparse.folder import write_topology
from llm_cht.train.decode import DecodeSettings, translate
from tests.translators import new_model, new_tokenizer, sentences

SCRIPT = Path(__file__).parents[2] / "eval" / "bleu.py"
SPARSE = "model.encoder.layers.0.fc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them sparse in a layer, and aligned files of which one source is empty."""
    folder = tmp_path_factory.mktemp("bleu")
    tokenizer = new_tokenizer(folder / "tokenizer")
    for name, seed in (("one", 0), ("two", 1)):
        model = new_model("marian", tokenizer, seed)
        if name == "two":
            mask = torch.arange(32 * 16).view(32, 16) % 4 == 0
            model.get_parameter(f"{SPARSE}.weight").data.mul_(mask)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_topology(folder / "two", {SPARSE: mask}, "set", 1)
    sources, references = sentences(30, 1), sentences(30, 2)
    sources[4] = ""
    (folder / "source.txt").write_text("".join(f"{line}\n" for line in sources))
    with gzip.open(folder / "reference.txt.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in references)
    (folder / "source.txt.xz").write_bytes(lzma.compress((folder / "source.txt").read_bytes()))
    return folder


def called(folder: Path, *arguments: str | Path) -> tuple[subprocess.CompletedProcess, dict[str, Any]]:
    files = ["--source", folder / "source.txt", "--reference", folder / "reference.txt.gz", "--json", "figures.json"]
    command = [sys.executable, SCRIPT, *arguments, *files, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "figures.json").read_text())


def sacrebleu(command: str, folder: Path, *more: str) -> Any:
    """What the command prints, as JSON, from the words after its name."""
    words = [word for word in shlex.split(command, comments=True) if not word.startswith("SACREBLEU_SEED=")]
    assert words[0] == "sacrebleu"
    call = [sys.executable, "-m", "sacrebleu", *words[1:], *more]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True, cwd=folder).stdout)


def test_figures_are_those_of_the_sacrebleu_command(folder: Path):
    options = ["--output", "out put", "--beams", "2", "--bootstrap", "50", "--batch_tokens", "400"]
    done, figures = called(folder, "one", "two", *options)
    one, two, copied = figures["rows"]
    assert (one["sparsity"], two["sparsity"], copied["sparsity"]) == (None, 0.75, None)
    assert copied["model"] == "copy of the source"
    commands = [line for line in done.stdout.splitlines() if "sacrebleu " in line]
    assert len(commands) == 3
    for command, row in zip(commands, (one, two), strict=False):
        theirs = sacrebleu(command, folder)
        assert theirs["score"] == pytest.approx(row["bleu"], abs=5.1e-5)
        assert f"BLEU|{theirs['signature']}" == figures["signatures"][0]
        lower = sacrebleu(command, folder, "-lc")
        assert lower["score"] == pytest.approx(row["lowercased"], abs=5.1e-5)
        assert f"BLEU|{lower['signature']}" == figures["signatures"][1]
        assert f"BP = {row['brevity_penalty']:.3f} ratio = {row['length_ratio']:.3f}" in theirs["verbose_score"]
    assert all(text in done.stdout for text in figures["signatures"])
    for ours, theirs in zip(figures["bootstrap"], sacrebleu(commands[2], folder), strict=True):
        assert ours["bleu"] == pytest.approx(theirs["BLEU"]["score"])
        assert ours["mean"] == pytest.approx(theirs["BLEU"]["mean"])
        assert ours["p"] == theirs["BLEU"]["p_value"]
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| one", "| two"))]
    assert len(rows) == 4
    assert f"{one['bleu']:,.6g}" in rows[0]


def test_hypotheses_are_those_of_the_decoder_and_can_be_scored_again(folder: Path, tmp_path: Path):
    tokenizer, sources = new_tokenizer(tmp_path), (folder / "source.txt").read_text().split("\n")[:-1]
    done, figures = called(folder, "one", "--output", "again", "--dtype", "float64", "--beams", "3")
    lines = (folder / "again" / "one.txt").read_text().split("\n")
    assert lines.pop() == ""
    assert lines[4] == ""
    model = new_model("marian", tokenizer).double()
    assert lines == translate(model, tokenizer, sources, DecodeSettings(beams=3))
    _, scored = called(folder, "--hypotheses", "again/one.txt", "again/one.txt", "--bootstrap", "5")
    assert scored["rows"][0]["bleu"] == figures["rows"][0]["bleu"]
    assert scored["rows"][0]["sentences_per_s"] is None
    assert [row["bleu"] for row in scored["bootstrap"]] == [figures["rows"][0]["bleu"]] * 2
    assert "Paired" not in done.stdout


@pytest.mark.slow
def test_the_seed_decides_the_resamples(folder: Path):
    for name, seed in (("a", 1), ("b", 2)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in sentences(30, seed + 1)))
    score = ["--hypotheses", "b.txt", "a.txt", "--bootstrap", "20", "--seed"]
    first, again, other = (called(folder, *score, seed)[1]["bootstrap"][0]["mean"] for seed in ("3", "3", "4"))
    assert first == again != other


def test_line_breaks_inside_a_hypothesis_do_not_break_the_file(folder: Path, tmp_path: Path):
    tokenizer = json.loads((folder / "one" / "vocab.json").read_text())
    broken = shutil.copytree(folder / "one", tmp_path / "broken")
    # a vocabulary whose most frequent piece is a line break
    weights = load_file(broken / "model.safetensors")
    number = tokenizer["▁ka"]
    weights["final_logits_bias"] = torch.zeros(1, len(tokenizer)).index_fill_(1, torch.tensor([number]), 50.0)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    renamed = {("a\n\u2028b" if piece == "▁ka" else piece): place for piece, place in tokenizer.items()}
    (broken / "vocab.json").write_text(json.dumps(renamed))
    called(folder, str(broken), "--output", str(tmp_path / "out"), "--max_lines", "3")
    (path,) = [path for path in (tmp_path / "out").iterdir() if path.name != "references.txt"]
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert "a  b" in lines[0]


# ---- bad input ----


@pytest.fixture(scope="module")
def places(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files with one fault each."""
    tmp = tmp_path_factory.mktemp("bad")
    for name in ("narrow", "gap", "wild"):
        shutil.copytree(folder / "one", tmp / name)
    tokenizer = new_tokenizer(tmp / "tokenizer")
    new_model("marian", tokenizer, vocab_size=12).save_pretrained(tmp / "narrow")
    state = load_file(folder / "one" / "model.safetensors")
    kept = {name: weight for name, weight in state.items() if "fc1" not in name}
    save_file(kept, tmp / "gap" / "model.safetensors", metadata={"format": "pt"})
    state["model.encoder.layers.0.fc1.bias"][0] = math.nan
    save_file(state, tmp / "wild" / "model.safetensors", metadata={"format": "pt"})
    new_model("marian", tokenizer).save_pretrained(tmp / "bare")
    llama = LlamaConfig(vocab_size=90, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(llama).save_pretrained(tmp / "causal")
    tokenizer.save_pretrained(tmp / "causal")
    ViTConfig().save_pretrained(tmp / "vit")
    WhisperConfig().save_pretrained(tmp / "whisper")  # an encoder-decoder, but of sound
    lines = (folder / "source.txt").read_text().split("\n")
    (tmp / "short.txt").write_text("\n".join(lines[:20]) + "\n")
    (tmp / "empty.txt").touch()
    (tmp / "latin.txt").write_bytes("\n".join(lines[:6]).encode() + b"\ngr\xf6\xdfer\n")
    (tmp / "long.txt").write_text("\n".join([*lines[:7], "ka lo 1999 " * 40, *lines[8:]]))
    return {"m": folder / "one", "s": folder / "source.txt", "r": folder / "reference.txt.gz", "tmp": tmp}


FILES = ["--source", "{s}", "--reference", "{r}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{m}", "--source", "{s}"], "--reference"),
        (FILES, "give models to translate with"),
        (["{m}", "--hypotheses", "{s}", *FILES], "and not both"),
        (["{tmp}/nowhere", *FILES], "nowhere: no such folder"),
        (["{tmp}/bare", *FILES], "AutoTokenizer cannot load it"),
        (["{tmp}/causal", *FILES], "causal: llama is a language model; use eval/perplexity.py"),
        (["{tmp}/vit", *FILES], "vit is neither a language model nor an encoder-decoder of text"),
        (["{tmp}/whisper", *FILES], "whisper is neither a language model nor an encoder-decoder of text"),
        (["{tmp}/narrow", *FILES], "none of the model's 12"),
        (["{tmp}/gap", *FILES], "no weights for model.decoder.layers.0.fc1"),
        (["{tmp}/wild", *FILES], "not all of its weights are finite"),
        (["{m}", "--source", "{tmp}/none.txt", "--reference", "{r}"], "--source {tmp}/none.txt: no such file"),
        (["{m}", "--source", "{s}", "--reference", "{tmp}/short.txt"], "has 30 lines, --reference {tmp}/short.txt 20"),
        (["{m}", "--source", "{tmp}/empty.txt", "--reference", "{r}"], "empty.txt: the file is empty"),
        (
            ["{m}", "--source", "{tmp}/latin.txt", "--reference", "{r}"],
            "(line 7): invalid start byte; convert",
        ),
        (["{m}", "--source", "{s}", "--reference", "{s}"], "source.txt:5: the reference is empty"),
        (["{m}", "--source", "{tmp}/long.txt", "--reference", "{r}"], "{m}: source line 8: 1"),
        (["--hypotheses", "{tmp}/short.txt", *FILES], "short.txt has 20 lines, --reference"),
        (["{m}", "{m}/", *FILES, "--output", "{tmp}/out"], "give every model once"),
        (["{m}", *FILES, "--output", "{s}/out"], "--output"),
        (["{m}", *FILES, "--beams", "0"], "--beams: 0"),
        (["{m}", *FILES, "--dtype", "float16"], "bfloat16"),
        (["{m}", *FILES, "--max_lines", "2", "--json", "{tmp}/no/rows.json"], "no/rows.json: cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(
    places: dict[str, Path], capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main([word.format(**places) for word in arguments]) == 2
    error = capfd.readouterr().err
    assert message.format(**places) in error
    assert error.startswith("bleu.py: error: ")
    assert error.count("\n") == 1
