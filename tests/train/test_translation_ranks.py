"""Translation on many ranks through ``accelerate launch``: the run of one process, resumed, exported, the same BLEU."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, MarianMTModel

from llm_cht.sparse.folder import verify_folder
from llm_cht.train.bleu import bleu
from llm_cht.train.decode import DecodeSettings, translate
from tests.helpers import PAIR_MODEL, command, finished, records, tiny_translation
from tests.train.test_run_ranks import alone, cut_back, launch, losses, summary

pytestmark = pytest.mark.timeout(600)


def config_of(tmp_path: Path) -> Path:
    """No dropout: its draws differ between numbers of ranks. Two passes a step on each of two ranks."""
    return tiny_translation(
        tmp_path,
        model={"overrides": PAIR_MODEL | {"dropout": 0.0, "attention_dropout": 0.0}},
        train={"micro_batch_tokens": 75},
        checkpoint={"keep_last": 9},
    )


def stock_bleu(folder: Path, tmp_path: Path, name: str) -> float:
    """Of a pair of files, by an unmodified MarianMTModel."""
    model, tokenizer = MarianMTModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sources, references = ((tmp_path / f"{name}.{suffix}").read_text().splitlines() for suffix in ("en", "de"))
    return bleu(translate(model, tokenizer, sources, DecodeSettings()), references).score


def test_two_ranks_train_as_one_and_translate_as_stock_marian(tmp_path):
    config = config_of(tmp_path)
    alone(config, "--run", tmp_path / "one")
    launch("zero2", 2, config, "--run", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert summary(tmp_path / "two")["mask_digest"] == summary(tmp_path / "one")["mask_digest"]
    for run in ("one", "two"):
        reached = summary(tmp_path / run)
        assert stock_bleu(tmp_path / run / "model", tmp_path, "test") == pytest.approx(reached["test_bleu"], abs=1e-6)
        assert stock_bleu(tmp_path / run / "model", tmp_path, "valid") == pytest.approx(reached["bleu"], abs=1e-6)
    scores = [[r["bleu"] for r in records(tmp_path / run, "validation")] for run in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)

    # one process goes on where two stopped, and ends where they did
    cut_back(tmp_path / "two", 15)
    alone(tmp_path / "two" / "config.yaml", "--resume", "auto")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)

    # the checkpoint of two ranks, exported without them
    out = tmp_path / "exported"
    code, _, err = finished(command("export", tmp_path / "two" / "checkpoints" / "step-00000015", out))
    assert code == 0, err
    verify_folder(out)
    MarianMTModel.from_pretrained(out)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tolerance"), [("ddp", 1e-4), ("zero1", 1e-4), ("zero3", 1e-3)])
def test_every_engine_trains_and_translates_as_one_process(tmp_path, engine, tolerance):
    config = config_of(tmp_path)
    alone(config, "--run", tmp_path / "one")
    launch(engine, 2, config, "--run", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert summary(tmp_path / "two")["mask_digest"] == summary(tmp_path / "one")["mask_digest"]
    reached = summary(tmp_path / "two")
    assert stock_bleu(tmp_path / "two" / "model", tmp_path, "test") == pytest.approx(reached["test_bleu"], abs=1e-6)
