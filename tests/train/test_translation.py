"""Translation through the command line: what a run leaves behind, its learning rate, its loss, resume, and the end."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MarianMTModel

from llm_cht.cli import main
from llm_cht.config import parse
from llm_cht.models import build_model, configs_folder
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.train.bleu import bleu
from llm_cht.train.build import prepare_pairs
from llm_cht.train.config import RunSettings
from llm_cht.train.integrity import describe, read_manifest, write_manifest
from llm_cht.train.translation import shifted, vocabulary_of
from tests.helpers import MODEL, PAIR_MODEL, learned, records, tiny_config, tiny_translation, told
from tests.translators import new_model, new_tokenizer

CERTAIN = PAIR_MODEL | {"dropout": 0.0, "attention_dropout": 0.0}


def test_a_run_leaves_a_stock_marian_and_says_its_bleu(tmp_path, capsys):
    config = tiny_translation(tmp_path)
    assert main(["train", str(config)]) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    end = records(run, "end")[0]["summary"]
    assert f"BLEU, test             {end['test_bleu']:.2f}" in out
    assert f"copying the source: {end['test_copy_bleu']:.2f}" in out
    assert end["bleu_signature"] in out
    assert [r["step"] for r in records(run, "validation")] == [10, 20]
    assert all("bleu" in r for r in records(run, "validation"))
    topology = read_topology(run / "model")
    assert len(topology.masks) == 6 + 2 * 10  # encoder; decoder with cross-attention; neither embeddings nor lm_head
    for name, mask in topology.masks.items():
        assert int(mask.sum()) == math.floor(0.3 * mask.numel() + 0.5), name
    verify_folder(run / "model")
    assert (run / "report.html").is_file()

    model, tokenizer = MarianMTModel.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    lines = (tmp_path / "test.en").read_text().splitlines()
    found = model.generate(**tokenizer(lines, return_tensors="pt", padding=True), num_beams=2, max_new_tokens=40)
    assert all(text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True))


HAND = {  # lr 0.25, width 16, 8 steps of warm-up, updates after steps 5, 10 and 15 (end 15), 4 steps of re-warm-up
    1: 0.25 * 16**-0.5 * 1 * 8**-1.5,
    5: 0.25 * 16**-0.5 * 5 * 8**-1.5,
    6: 0.25 * 16**-0.5 * 6 * 8**-1.5 * 1 / 4,
    7: 0.25 * 16**-0.5 * 7 * 8**-1.5 * 2 / 4,
    9: 0.25 * 16**-0.5 * 9**-0.5,
    11: 0.25 * 16**-0.5 * 11**-0.5 * 1 / 4,
    14: 0.25 * 16**-0.5 * 14**-0.5,
    16: 0.25 * 16**-0.5 * 16**-0.5 * 1 / 4,
    20: 0.25 * 16**-0.5 * 20**-0.5,
}


def test_the_learning_rate_of_a_run_is_inoam(tmp_path):
    config = tiny_translation(
        tmp_path,
        method={"update_interval": 5},
        optimizer={"lr": 0.25},
        lr={"warmup_steps": 8, "rewarm_steps": 4},
        validation={"every": None},
    )
    assert main(["train", str(config)]) == 0
    rates = {r["step"]: r["lr"] for r in records(tmp_path / "run", "train")}
    assert {step: rates[step] for step in HAND} == pytest.approx(HAND, rel=1e-12)


def test_a_dense_run_equals_a_plain_loop_over_stock_marian(tmp_path):
    config = tiny_translation(
        tmp_path,
        method={"preset": "dense", "sparsity": 0.0},
        model={"overrides": CERTAIN},
        optimizer={"lr": 0.02},
        train={"steps": 8, "clip_norm": None},
        validation={"every": None},
    )
    assert main(["train", str(config)]) == 0
    settings = parse(RunSettings, "x", [str(config)])
    pairs = prepare_pairs(settings)
    model = build_model(settings.model, settings.seed, "seq2seq", vocabulary_of(pairs)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2]}, {"params": [p for p in trained if p.dim() < 2]}]
    optimizer = torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.998), fused=True)
    losses = []
    for step in range(1, 9):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 16**-0.5 * min(step**-0.5, step * 4**-1.5)
        (batch,), _ = pairs.train.next(0, 1, 1)
        decoder_inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        logits = model(batch["input_ids"], batch["attention_mask"], decoder_inputs).logits
        log_p = F.log_softmax(logits, dim=-1)
        real = batch["labels"] != -100
        right = log_p.gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
        loss = -(0.9 * right + 0.1 * log_p.mean(-1))[real].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [r["loss"] for r in records(tmp_path / "run", "train")] == pytest.approx(losses, rel=1e-5)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in saved:
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5)


def test_what_the_decoder_reads():
    labels = torch.tensor([[7, 8, 2, -100], [9, 2, -100, -100]])
    assert shifted(labels, start=1, pad=0).tolist() == [[1, 7, 8, 2], [1, 9, 2, 0]]
    assert labels.tolist() == [[7, 8, 2, -100], [9, 2, -100, -100]]


def test_accumulation_is_exact(tmp_path):
    losses = []
    for tokens in (None, 40):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        config = tiny_translation(
            folder,
            model={"overrides": CERTAIN},
            train={"steps": 8, "micro_batch_tokens": tokens},
            validation={"every": None},
        )
        assert main(["train", str(config)]) == 0
        losses.append([r["loss"] for r in records(folder / "run", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    assert main(["train", str(tiny_translation(tmp_path / "a"))]) == 0
    assert main(["train", str(tiny_translation(tmp_path / "b"))]) == 0
    run = tmp_path / "b" / "run"
    assert main(["train", str(run / "config.yaml"), "--resume", str(run / "checkpoints" / "step-00000015")]) == 0
    assert learned(run) == learned(tmp_path / "a" / "run")


@pytest.mark.parametrize(("kind", "steps"), [("last", [20]), ("best", None), ("average", [15, 20])])
def test_which_weights_become_the_model(tmp_path, kind, steps):
    checkpoint = {"export": kind, "average": 3, "keep_last": 4}
    config = tiny_translation(tmp_path, checkpoint=checkpoint, validation={"bleu_pairs": None})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    end = records(run, "end")[0]["summary"]
    scores = {r["step"]: r["bleu"] for r in records(run, "validation")}
    if kind == "best":
        steps = [max(scores, key=lambda step: (scores[step], -step))]
        assert end["bleu"] == pytest.approx(scores[steps[0]], abs=1e-6)
    assert end["model_of_steps"] == steps
    parts = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in steps]
    for name, value in load_file(run / "model" / "model.safetensors").items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-8)
    verify_folder(run / "model")


MISTAKES = {
    "batch_size": ({"train": {"batch_size": 8}}, "`train.batch_size` = 8", "train.batch_tokens"),
    "text": (
        {"data": {"vocab_size": 500}},
        "`data.vocab_size` = 500",
        "`task: language_modelling`",
        "`pairs` that counts",
    ),
    "no budget": (
        {"train": {"batch_tokens": None}},
        "`train.batch_tokens`",
    ),
    "budget": ({"train": {"batch_tokens": 5}}, "train.batch_tokens"),
    "smoothing": ({"train": {"label_smoothing": 1.0}}, "`train.label_smoothing` = 1.0"),
    "beams": ({"validation": {"decode": {"beams": 0}}}, "`validation.decode.beams` = 0"),
    "no pairs": ({"pairs": {"train": None}}, "`pairs.train`"),
    "positions": ({"model": {"overrides": {"max_position_embeddings": 8}}}, "positions", "pairs.max_length"),
    "causal": ({"model": {"config": "llama_9m", "overrides": {}}}, "llama_9m", "task"),
    "average": ({"checkpoint": {"export": "average"}}, "checkpoint.keep_last"),
    "best": ({"checkpoint": {"save_best": False}}, "`checkpoint.export: best`"),
    "validation in sequences": ({"validation": {"batch_size": 4}}, "`validation.batch_size` = 4", "task"),
    "validation by a part": ({"validation": {"max_tokens": 100}}, "`validation.max_tokens` = 100", "task"),
    "warm-up": ({"lr": {"warmup_steps": 0}}, "`lr.warmup_steps` = 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_and_leave_nothing(tmp_path, capsys, name):
    sections, *parts = MISTAKES[name]
    code = main(["train", str(tiny_translation(tmp_path, **sections))])
    told(code, capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()


def test_settings_of_translation_are_refused_for_text(tmp_path, capsys):
    code = main(["train", str(tiny_config(tmp_path, train={"label_smoothing": 0.1}))])
    told(code, capsys.readouterr().err, "`train.label_smoothing` = 0.1", "task")


def test_bleu_settings_are_refused_for_text(tmp_path, capsys):
    code = main(["train", str(tiny_config(tmp_path, validation={"bleu_pairs": 8}))])
    told(code, capsys.readouterr().err, "`validation.bleu_pairs` = 8", "task")


def test_prepare_tells_mistakes_too(tmp_path, capsys):
    code = main(["prepare", str(tiny_translation(tmp_path, train={"batch_tokens": None}))])
    told(code, capsys.readouterr().err, "`train.batch_tokens`")


@pytest.mark.parametrize("family", ["marian", "bart", "t5"])
def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, capsys, family):
    """transformers gives an empty tokenizer for BART and T5: a run would read unknown words alone."""
    path = tmp_path / "checkpoint"
    new_model(family, new_tokenizer(tmp_path / "elsewhere")).save_pretrained(path)
    code = main(["train", str(tiny_translation(tmp_path)), "--model.path", str(path), "--model.overrides", "{}"])
    told(code, capsys.readouterr().err, "`model.path`", "no tokenizer", "`pairs.vocabulary`")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_keeps_its_tokenizer_and_says_so(tmp_path, capsys):
    config = tiny_translation(tmp_path, train={"steps": 4}, validation={"every": None})
    assert main(["train", str(config)]) == 0
    more = ["--run", str(tmp_path / "more"), "--model.path", str(tmp_path / "run" / "model"), "--model.overrides", "{}"]
    capsys.readouterr()
    assert main(["train", str(config), *more, "--pairs.vocab_size", "60", "--pairs.joint", "false"]) == 0
    err = capsys.readouterr().err
    assert "note: `pairs.vocab_size` has no effect" in err
    assert "note: `pairs.joint` has no effect" in err
    vocabularies = [(tmp_path / run / "model" / "vocab.json").read_text() for run in ("run", "more")]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize(("place", "parts"), [("gone", ("no folder here",)), ("causal", ("task: translation",))])
def test_a_checkpoint_that_cannot_translate_is_refused_before_pairs_are_read(tmp_path, capsys, place, parts):
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(tmp_path / "causal")
    config = tiny_translation(tmp_path, pairs={"train": "nowhere/train"})
    code = main(["train", str(config), "--model.path", str(tmp_path / place), "--model.overrides", "{}"])
    told(code, capsys.readouterr().err, "`model.path`", *parts)


def test_the_perplexity_is_that_of_the_model(tmp_path):
    """Not of the last step, where the best one is exported."""
    config = tiny_translation(tmp_path, validation={"bleu_pairs": None}, optimizer={"lr": 4.0})
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    end = records(run, "end")[0]["summary"]
    of_step = {r["step"]: r["perplexity"] for r in records(run, "validation")}
    assert end["model_of_steps"] != [20]
    assert end["perplexity"] == pytest.approx(of_step[end["model_of_steps"][0]], rel=1e-5)


@pytest.mark.parametrize(("beams", "kept"), [(2, 101.0), (3, None)])
def test_the_best_is_looked_for_anew_where_bleu_is_measured_otherwise(tmp_path, capsys, beams, kept):
    """A best BLEU of another beam search would keep every later checkpoint from being the best."""
    assert main(["train", str(tiny_translation(tmp_path))]) == 0
    run = tmp_path / "run"
    at = run / "checkpoints" / "step-00000015"
    state = json.loads((at / "state.json").read_text())
    state["progress"]["best"] = 101.0
    (at / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(at)
    del manifest["format"]
    files = manifest.pop("files") | {"state.json": describe(at / "state.json")}
    write_manifest(at, manifest, files)
    more = ["--resume", str(at), "--validation.decode.beams", str(beams)]
    assert main(["train", str(run / "config.yaml"), *more]) == 0
    state = json.loads((run / "checkpoints" / "step-00000020" / "state.json").read_text())
    last = records(run, "validation")[-1]["bleu"]
    assert state["progress"]["best"] == (kept or last)
    assert ("looked for anew" in capsys.readouterr().err) == (kept is None)


def test_export_gives_the_same_bleu_as_the_run(tmp_path):
    config = tiny_translation(tmp_path, train={"steps": 12}, checkpoint={"export": "last"})
    assert main(["train", str(config)]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    out = tmp_path / "out"
    code = [sys.executable, "eval/bleu.py", str(tmp_path / "model"), "--source", str(tmp_path / "test.en")]
    code += ["--reference", str(tmp_path / "test.de"), "--output", str(out)]
    subprocess.run(code, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    (written,) = (path for path in out.iterdir() if path.name != "references.txt")
    hypotheses = written.read_text().split("\n")[:-1]
    end = records(tmp_path / "run", "end")[0]["summary"]
    references = (tmp_path / "test.de").read_text().splitlines()
    assert bleu(hypotheses, references).score == pytest.approx(end["test_bleu"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("preset", "times"), [("dense", 5), ("chts", 3)])
def test_the_small_recipe_learns_to_translate(tmp_path, data_dir, monkeypatch, preset, times):
    monkeypatch.setenv("LLM_CHT_DATA", str(data_dir))
    recipe = configs_folder() / "translation" / "tiny_cpu.yaml"
    assert main(["train", str(recipe), "--method.preset", preset, "--run", str(tmp_path / "run")]) == 0
    end = records(tmp_path / "run", "end")[0]["summary"]
    assert end["test_bleu"] > times * end["test_copy_bleu"]
    assert end["test_bleu"] > 20
