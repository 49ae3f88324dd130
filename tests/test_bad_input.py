"""Bad input, through the command line: one clear message, exit code 2, and nothing changed on disk.

What can only be found out while a run goes on (full disk, CTRL-C, a loss that is not finite) is in ``test_faults.py``.
"""

import gzip
import io
import json
import lzma
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm_cht.cli import main
from llm_cht.errors import UserError
from llm_cht.models import ModelSettings, build_model
from llm_cht.sparse.surgery import SparseSettings, sparsify
from tests.helpers import MODEL, command, digest, finished, tiny_config, told


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must be refused with a message that holds ``parts``, and leave the test's folder as it is."""

    def _refused(*arguments: str | Path, parts: tuple[str, ...], untouched: Path = tmp_path) -> None:
        before = digest(untouched)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == ""
        told(code, err, *parts)
        assert digest(untouched) == before
        assert not list(Path(os.environ["LLM_CHT_CACHE"]).glob("*.partial"))

    return _refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, to which nothing may happen."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(tiny_config(folder))]) == 0
    return folder / "run"


# ---- settings ----

SETTINGS = {
    "section": ("--lr 0.1", "`lr` = '0.1' in the command line", "section", "e.g. `lr.schedule`"),
    "unknown key": ("--train.stepz 5", "`train.stepz` in the command line", "did you mean `train.steps`"),
    "key of another section": ("--train.lr 1", "`train.lr`", "did you mean `optimizer.lr`"),
    "wrong type": ("--train.steps many", "train.steps", "a int", "many"),
    "wrong type of an optional": ("--train.micro_batch_size some", "train.micro_batch_size", "int, null", "some"),
    "no such choice": ("--method.preset sett", "method.preset", "did you mean `set`", "sett"),
    "no value": ("--train.steps", "--train.steps", "expected one argument"),
    "config after a setting": ("--seed 3 more.yaml", "more.yaml", "config files come before settings"),
    "negative seed": ("--seed -1", "`seed` = -1", "between 0 and"),
    "seed too large": (f"--seed {2**64}", f"`seed` = {2**64}", "between 0 and"),
    "sparsity 1": ("--method.sparsity 1.0", "`method.sparsity` = 1.0", "[0, 1)"),
    "sparsity below 0": ("--method.sparsity -0.1", "`method.sparsity` = -0.1", "[0, 1)"),
    "no link left": ("--method.sparsity 0.99999", "`method.sparsity` = 0.99999", "no link in `model.layers.0", "lower"),
    "no update interval": ("--method.update_interval 0", "`method.update_interval` = 0", "at least 1"),
    "end_step beyond the run": ("--method.end_step 21", "`method.end_step` = 21", "20 steps", "null chooses it"),
    "end_step below 0": ("--method.end_step -1", "`method.end_step` = -1", "0 to 20"),
    "density window beyond the run": ("--method.density_end_step 21", "`method.density_end_step` = 21", "20 steps"),
    "include matches nothing": ("--sparse.include [nope]", "`sparse.include`: 'nope'", "e.g. model.layers.0.self_attn"),
    "include is empty": ("--sparse.include []", "`sparse.include` = []", "null takes"),
    "no regular expression": ("--sparse.exclude ['*q']", "`sparse.exclude`: '*q'", "nothing to repeat", "correct it"),
    "exclude leaves nothing": ("--sparse.exclude [proj]", "`sparse.exclude` ['proj']", "none of the 14"),
    "exclude matches nothing": ("--sparse.exclude [nope]", "`sparse.exclude`: 'nope'", "matches no linear layer"),
    "shared weight": (
        "--sparse.include [lm_head] --model.overrides.tie_word_embeddings true",
        "model.embed_tokens.weight = lm_head.weight",
        "`sparse.exclude`",
    ),
    "no steps": ("--train.steps 0", "`train.steps` = 0", "at least 1"),
    "micro batch does not divide": ("--train.micro_batch_size 3", "`train.batch_size` = 4", "= 3", "change one"),
    "warm-up beyond the run": ("--lr.warmup_steps 21", "`lr.warmup_steps` = 21", "20 steps"),
    "learning rate 0": ("--optimizer.lr 0", "`optimizer.lr` = 0", "above 0"),
    "infinite learning rate": ("--optimizer.lr .inf", "`optimizer.lr` = inf", "finite"),
    "no checkpoint kept": ("--checkpoint.keep_last 0", "`checkpoint.keep_last` = 0", "at least 1"),
    "sequence too long for the model": (
        "--data.sequence_length 1100",
        "`data.sequence_length` = 1100",
        "1024",
        "lower",
    ),
    "sequence of one token": ("--data.sequence_length 1", "`data.sequence_length` = 1", "at least 2"),
    "tokenizer larger than the model": ("--data.vocab_size 500", "330 tokens", "vocabulary 300", "to 330 or more"),
    "vocabulary too small": ("--data.vocab_size 100", "`data.vocab_size` = 100", "at least 259"),
    "tokenizer that is not there": ("--data.tokenizer nowhere", "`data.tokenizer` = 'nowhere'", "`tokenizer.json`"),
    "nothing held out": ("--data.validation_fraction 0", "`data.validation_fraction` = 0", "between 0 and 1"),
    "no source": ("--data.source=", "`data.source` = ''", "names no file", "give files"),
    "empty list of sources": ("--data.source []", "`data.source` = []", "names no file"),
    "empty name in a list": ("--data.source ['']", "`data.source` = ['']", "names no file"),
    "no validation": ("--data.validation=", "`data.validation` = ''", "names no file"),
    "empty list of validation": ("--data.validation []", "`data.validation` = []", "names no file"),
    "no run folder": ("--run=", "`run` = ''", "names no folder"),
    "no full validation sequence": (
        "--data.validation_fraction 0.00001",
        "validation documents of `data.source` = ",
        "text.txt have 0 tokens",
        "one sequence needs 32",
        "raise `data.validation_fraction`",
    ),
    "model that does not exist": ("--model.config llama_6m", "`model.config` = 'llama_6m'", "llama_60m, llama_7b"),
    "checkpoint that does not exist": (
        "--model.path ./nowhere",
        "`model.path` = './nowhere'",
        "no folder here",
        "give a",
    ),
    "config file that does not exist": ("--model.config nofam.yaml", "`model.config` = 'nofam.yaml'", "correct it"),
    "config without a name": ("--model.config=", "`model.config` = ''", "no shipped config", "no name of the hub"),
    "no model": ("--model.config null", "`model.config`", "`model.path`", "name a config"),
    "unknown model key": ("--model.overrides.hidden_sise 3", "no key `hidden_sise`", "correct it"),
    "heads do not divide": ("--model.overrides.num_attention_heads 3", "(16)", "heads (3)", "correct"),
    "no heads": ("--model.overrides.num_attention_heads 0", "`model.overrides`", "ZeroDivisionError", "correct"),
    "key heads do not divide": ("--model.overrides.num_key_value_heads 3", "2 attention heads and 3 key-value"),
    "negative vocabulary": ("--model.overrides.vocab_size -5", "`model.overrides`", "negative dimension -5"),
    "unknown activation": ("--model.overrides.hidden_act nope", "`model.overrides`", "'nope'", "correct"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, refused, tmp_path):
    overrides, *parts = SETTINGS[case]
    refused("train", tiny_config(tmp_path), *overrides.split(" "), parts=tuple(parts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(refused, tmp_path):
    refused("train", tiny_config(tmp_path), "--train.device", "cuda", parts=("`train.device` = cuda", "no CUDA", "cpu"))


FILES = {
    "section that is a number": ("train: 5", "`train` = 5", "more.yaml", "section", "`train.steps`"),
    "section that is empty": ("train:", "`train` = None", "section"),
    "section that is a list": ("train: [1]", "`train` = [1]", "section"),
    "section twice": ("train: {steps: 5}\ntrain: {steps: 6}", "more.yaml", "`train` stands twice", "line 2"),
    "key twice": ("train:\n  steps: 5\n  steps: 6", "`steps` stands twice", "line 3"),
    "unknown key": ("train: {stepz: 3}", "`train.stepz`", "more.yaml", "did you mean `train.steps`"),
    "key too deep": ("train: {steps: {a: 3}}", "`train.steps.a`", "did you mean `train.steps`"),
    "wrong type": ("seed: 1.5", "more.yaml: setting", "seed", "a int", "1.5"),
    "null": ("train: {precision: null}", "`train.precision` is null or empty in", "more.yaml", "give it a value"),
    "no value": ("run:", "`run` is null or empty in", "more.yaml"),
    "list": ("- a", "more.yaml", "list", "`key: value`"),
    "nothing": ("", "more.yaml", "`key: value`"),
    "not YAML": ("a: [", "more.yaml", "not YAML", "line 1"),
    "tab": ("train:\n\tsteps: 3", "more.yaml", "not YAML", "line 2"),
    "binary": ("\0\1\2", "more.yaml", "not YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_files(case, refused, tmp_path):
    text, *parts = FILES[case]
    (tmp_path / "more.yaml").write_text(text)
    refused("train", tiny_config(tmp_path), tmp_path / "more.yaml", parts=tuple(parts))


def test_commands(refused, tmp_path):
    refused("trian", "config.yaml", parts=("unknown command `trian`", "train, prepare, report"))
    refused("train", tmp_path / "none.yaml", parts=("none.yaml", "No such file", "give the path"))
    refused("train", tmp_path, parts=(str(tmp_path), "Is a directory", "give the path"))
    refused(
        "prepare", "--data.source", "none.txt", parts=("`data.source` = 'none.txt'", "no such file", "correct the path")
    )
    refused("train", parts=("no config file is given", "usage: llm-cht train CONFIG.yaml"))
    refused("train", "--train.steps", "3", parts=("no config file is given",))
    refused("report", parts=("usage: llm-cht report RUN",))
    refused("report", tmp_path, parts=(str(tmp_path), "no config.yaml", "give the folder of a run"))
    refused("report", tmp_path / "none", parts=(str(tmp_path / "none"), "give the folder of a run"))


def test_a_command_of_its_own_says_one_line(tmp_path):
    code, out, err = finished(command("train", tiny_config(tmp_path), "--train.stepz", "5"))
    assert (code, out) == (2, "")
    assert err.startswith("llm-cht: error: unknown key `train.stepz`")
    assert err.count("\n") == 1


# ---- models ----


def test_model_configs(refused, tmp_path):
    broken, binary, other = (tmp_path / name for name in ("broken.yaml", "binary.yaml", "other.yaml"))
    broken.write_text("a: [")
    binary.write_bytes(bytes(range(128, 256)))
    other.write_text("model_type: gpt2\nn_embd: 16\nn_layer: 1\nn_head: 3")
    train = ("train", tiny_config(tmp_path), "--model.config")
    refused(*train, broken, parts=(str(broken), "not YAML", "line 1", "correct it"))
    refused(*train, binary, parts=(str(binary), "not YAML"))
    config = tiny_config(tmp_path, model={"config": str(other), "overrides": {}})
    refused("train", config, parts=("cannot work", "divisible", "correct them"))


def test_model_checkpoints(refused, tmp_path, run):
    config = tiny_config(tmp_path, model={"config": None, "overrides": {}})
    whole, cut, empty, text = run / "model", tmp_path / "cut", tmp_path / "empty", tmp_path / "text"
    shutil.copytree(whole, cut)
    os.truncate(cut / "model.safetensors", 1000)
    empty.mkdir()
    shutil.copytree(whole, text)
    (text / "config.json").write_text("{")
    train = ("train", config, "--model.path")
    refused(*train, empty, parts=(f"`model.path` = '{empty}'", "no config.json", "give the folder of a"))
    refused(*train, cut, parts=(f"`model.path` = '{cut}'", "invalid header length", "give a"))
    refused(*train, text, parts=(f"`model.path` = '{text}'", "not a valid JSON", "give a"))
    refused(*train, whole, "--model.overrides", "{nope: 3}", parts=("no key `nope`",))
    for size in ("hidden_size: 32", "num_hidden_layers: 3"):
        parts = (f"`model.path` = '{whole}'", "weights are missing there or have another size", "`model.overrides: {}`")
        refused(*train, whole, "--model.overrides", f"{{{size}}}", parts=parts)


def test_a_model_that_is_sparse_already():
    model = build_model(ModelSettings(overrides=dict(MODEL)), seed=0)
    sparsify(model, SparseSettings())
    with pytest.raises(UserError, match=r"layer `model.layers.0.self_attn.q_proj` is sparse already; sparsify .* once"):
        sparsify(model, SparseSettings())


# ---- data ----

TEXTS = [f"document {number} of the links and masks of a layer" for number in range(200)]
PLAIN = "\n\n".join(TEXTS).encode()
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), file, compression="snappy")
    return file.getvalue()


PARQUET = _parquet()

DATA = {
    "binary": ("a.txt", random.Random(0).randbytes(5000), "not UTF-8 text at byte", "line 1", "leave it out"),
    "binary compressed": ("a.txt.gz", gzip.compress(bytes(100)), "not UTF-8 text at byte 0", "leave it out"),
    "empty": ("a.txt", b"", "is empty", "leave it out"),
    "blank": ("a.txt", b"\n \n", "is empty", "leave it out"),
    "empty xz": ("a.txt.xz", b"", "truncated or damaged", "fetch it again"),
    "truncated xz": ("a.txt.xz", lzma.compress(PLAIN)[:-100], "truncated or damaged", "fetch it again"),
    "truncated gz": ("a.txt.gz", gzip.compress(PLAIN)[:-100], "truncated or damaged", "fetch it again"),
    "not xz": ("a.txt.xz", PLAIN, "truncated or damaged", "fetch it again"),
    "not gz": ("a.txt.gz", PLAIN, "truncated or damaged", "fetch it again"),
    "truncated JSON lines": ("a.jsonl", LINES[:-20], "a.jsonl:200", "is the file truncated?"),
    "broken JSON line": ("a.jsonl", LINES.replace(b"}\n", b"\n", 1), "a.jsonl:1", "not JSON"),
    "no text field": (
        "a.jsonl",
        LINES.replace(b'"text"', b'"body"'),
        "a.jsonl:1",
        "`text`",
        "`data.text_field`",
        "`body`",
    ),
    "truncated parquet": ("a.parquet", PARQUET[:-100], "not a whole parquet file", "fetch it again"),
    "empty parquet": ("a.parquet", b"", "not a whole parquet file", "fetch it again"),
    "damaged parquet": ("a.parquet", PARQUET[:100] + bytes(200) + PARQUET[300:], "cannot be read", "fetch it again"),
    "unknown format": ("a.pdf", PLAIN, "no known format", "`.parquet`"),
    "missing": ("a.txt", None, "no such file", "correct the path"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_files(case, refused, tmp_path):
    name, content, *parts = DATA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused("train", tiny_config(tmp_path), "--data.source", tmp_path / name, parts=(str(tmp_path / name), *parts))


def test_equal_bytes_in_another_format_are_not_taken_from_the_cache(refused, tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES)
    config = tiny_config(tmp_path, data={"source": str(tmp_path / "a.txt"), "text_documents": "line"})
    assert main(["prepare", str(config)]) == 0
    shutil.copy(tmp_path / "a.txt", tmp_path / "a.txt.gz")
    refused("prepare", config, "--data.source", tmp_path / "a.txt.gz", parts=("a.txt.gz", "truncated or damaged"))


def test_tokenizers(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.model").write_bytes(random.Random(0).randbytes(500))
    train = ("train", tiny_config(tmp_path), "--data.tokenizer")
    refused(*train, tmp_path / "empty", parts=(f"`data.tokenizer` = '{tmp_path / 'empty'}'", "give a folder with"))
    refused(*train, tmp_path / "a.model", parts=("a.model", "entencepiece"))


# ---- run folders and resume ----


def test_run_folders(refused, tmp_path, run):
    config = tiny_config(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    refused("train", config, "--run", run, parts=(str(run), "holds a run already", "--resume auto", "`--run`"))
    refused("train", config, "--run", run, parts=("holds a run already",), untouched=run)
    for resume in ((), ("--resume", "auto")):
        refused("train", config, "--run", config, *resume, parts=(str(config), "Not a directory", "`--run`"))
        refused("train", config, "--run", config / "x", *resume, parts=(str(config / "x"), "Not a directory"))
        refused("train", config, "--run", foreign, *resume, parts=(str(foreign), "holds no run", "`--run`"))


RESUMES = {
    "seed": ("--seed 1", "`seed` is 1 now and was 0"),
    "model": ("--model.overrides.hidden_size 32", "`model.overrides.hidden_size` is 32 now and was 16"),
    "other model": ("--model.config llama_20m", "`model.config` is 'llama_20m' now and was 'llama_9m'"),
    "data": ("--data.text_field body", "`data.text_field` is 'body' now and was 'text'"),
    "tokenizer": ("--data.vocab_size 290", "`data.vocab_size` is 290 now and was 300"),
    "method": ("--method.preset set", "`method.preset` is 'set' now and was 'chts'"),
    "steps": ("--train.steps 40", "`train.steps` is 40 now and was 20"),
    "open end": ("--train.steps 40 --method.end_step null", "`train.steps` is 40 now and was 20"),
}


@pytest.mark.parametrize("case", RESUMES)
@pytest.mark.parametrize("resume", ["auto", "checkpoints/step-00000015"])
def test_a_resume_of_another_run(case, resume, refused, run):
    overrides, *parts = RESUMES[case]
    where = resume if resume == "auto" else run / resume
    arguments = ("train", run / "config.yaml", "--resume", where, *overrides.split(" "))
    refused(*arguments, parts=(*parts, str(run), "resume with RUN/config.yaml", "`--run`"), untouched=run)


def test_a_checkpoint_of_elsewhere_does_not_overwrite_the_run_that_is_here(refused, tmp_path, run):
    config = tiny_config(tmp_path, seed=1, train={"steps": 4})
    assert main(["train", str(config)]) == 0
    foreign = ("--resume", tmp_path / "run", "--run", run)
    refused(
        "train", config, *foreign, parts=("belongs to the run", str(tmp_path / "run"), "give `--run"), untouched=run
    )


def test_places_to_resume_from(refused, tmp_path, run):
    (tmp_path / "empty").mkdir()
    train = ("train", tiny_config(tmp_path), "--resume")
    for place in ("empty", "nowhere"):
        parts = ("no checkpoint to resume from", str(tmp_path / place), "give a run folder")
        refused(*train, tmp_path / place, parts=parts)
    refused(*train, tmp_path / "text.txt", parts=(str(tmp_path / "text.txt"), "Not a directory", "give a readable"))
    nowhere = run / "checkpoints" / "step-00000007"
    refused(*train, nowhere, parts=(str(nowhere), "manifest.json is missing", "--resume auto"), untouched=run)


def test_a_resume_after_data_or_tokenizer_changed_on_disk(refused, tmp_path, run):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "model" / name, tokenizer)
    config = tiny_config(tmp_path, data={"tokenizer": str(tokenizer)}, train={"steps": 4})
    assert main(["train", str(config)]) == 0
    text, rules = (tmp_path / "text.txt").read_text(), json.loads((tokenizer / "tokenizer.json").read_text())
    rules["model"]["merges"].pop()
    for path, changed in (tmp_path / "text.txt", text + " more"), (tokenizer / "tokenizer.json", json.dumps(rules)):
        good = path.read_text()
        path.write_text(changed)
        parts = ("the data differ from those of", "step-00000004", "a file, the tokenizer", "restore them", "`--run`")
        refused("train", config, "--resume", "auto", parts=parts)
        path.write_text(good)
    assert main(["train", str(config), "--resume", "auto"]) == 0


def test_damaged_checkpoints(refused, tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    newest, older = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    train = ("train", config, "--run", tmp_path / "run", "--resume")
    refused(*train, newest, parts=(str(newest), "model.safetensors has", "bytes", "--resume auto takes"))
    (older / "state.json").unlink()
    parts = ("all 2 checkpoints", str(tmp_path / "run" / "checkpoints"), "damaged", "restore one from a copy")
    refused(*train, "auto", parts=parts)


def test_reports_of_damaged_runs(refused, tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    metrics, masks = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "topology_start.safetensors"
    masks.write_bytes(masks.read_bytes()[:-3])
    refused("report", tmp_path / "run", parts=("topology_start.safetensors are damaged", "copy both again"))
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    refused("report", tmp_path / "run", parts=(f"{metrics}, line 2 is damaged", "remove that line"))
    metrics.write_text("\n".join([lines[0], "[1, 2]", *lines[2:]]))
    refused("report", tmp_path / "run", parts=(f"{metrics}, line 2 is no record of a run", "remove that line"))


def test_a_damaged_config_of_a_run_without_checkpoint(refused, tmp_path):
    (tmp_path / "run").mkdir()
    for text in ("", "a: ["):
        (tmp_path / "run" / "config.yaml").write_text(text)
        refused("train", tiny_config(tmp_path), "--resume", "auto", parts=(str(tmp_path / "run" / "config.yaml"),))
