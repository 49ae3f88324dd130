"""Translation against search by hand and exhaustive search; batches, foreign settings and ranks change nothing."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.train.decode import DecodeSettings, Translator, translate
from tests.launched import free_port
from tests.train.translate_ranks import SETTINGS, SOURCES
from tests.translators import POSITIONS, new_model, new_tokenizer, sentences

SCRIPT = Path(__file__).parent / "translate_ranks.py"
FAMILIES = ("marian", "t5", "bart")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return new_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def log_p(model: Any, source: list[int], hypothesis: list[int]) -> Tensor:
    """Log-probabilities (tokens + 1, vocabulary) of what follows each beginning of a hypothesis; one pass, no cache."""
    inputs = torch.tensor([[model.config.decoder_start_token_id, *hypothesis]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=inputs, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


# ---- what the search finds ----


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_takes_the_most_probable_token_until_the_end_or_the_limit(family: str, tokenizer: Any):
    model = new_model(family, tokenizer).double()
    settings = DecodeSettings(beams=1, max_ratio=0.5, max_extra=3)
    ended = 0
    for source in sentences(30, 3):
        tokens, hypothesis = tokenizer(source)["input_ids"], []
        while len(hypothesis) < len(tokens) // 2 + 2:
            scores = log_p(model, tokens, hypothesis)[-1]
            scores[model.config.pad_token_id] = -torch.inf
            if int(scores.argmax()) == model.config.eos_token_id:
                ended += 1
                break
            hypothesis.append(int(scores.argmax()))
        (found,) = translate(model, tokenizer, [source], settings)
        assert found == tokenizer.decode(hypothesis, skip_special_tokens=True)
    assert ended < 30


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_hypotheses(length_penalty: float, tokenizer: Any):
    model = new_model("marian", tokenizer).double()
    end, some = model.config.eos_token_id, [5, 9, 20, 33]
    model.final_logits_bias.fill_(-1e4)
    model.final_logits_bias[0, [end, *some]] = 0.0
    lengths = set()
    for source in sentences(6, 4):
        tokens, best = tokenizer(source)["input_ids"], (-torch.inf, [])
        for length in range(4):  # and an end token: at most 4
            for hypothesis in map(list, itertools.product(some, repeat=length)):
                scores = log_p(model, tokens, hypothesis)
                total = sum(scores[place, token].item() for place, token in enumerate([*hypothesis, end]))
                best = max(best, (total / (length + 1) ** length_penalty, hypothesis))
        settings = DecodeSettings(beams=64, length_penalty=length_penalty, max_ratio=0, max_extra=4)
        (found,) = translate(model, tokenizer, [source], settings)
        assert found == tokenizer.decode(best[1], skip_special_tokens=True)
        lengths.add(len(best[1]))
    assert lengths


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_limits_hold_row_by_row(beams: int, tokenizer: Any):
    """A model that says one word for ever says it as often as its row may, less the end token."""
    model = new_model("marian", tokenizer)
    (word,) = [number for piece, number in tokenizer.encoder.items() if piece == "▁ka"]
    model.final_logits_bias[0, word] = 1e4
    sources = sentences(40, 5)
    lengths = [len(tokenizer(source)["input_ids"]) for source in sources]
    assert len(set(lengths)) > 10
    found = translate(model, tokenizer, sources, DecodeSettings(beams=beams, max_ratio=1.5, max_extra=2))
    assert [len(text.split()) for text in found] == [min(int(1.5 * length) + 2, POSITIONS) - 1 for length in lengths]
    assert set(" ".join(found).split()) == {"ka"}
    only_end = DecodeSettings(beams=beams, max_ratio=0, max_extra=0)
    assert translate(model, tokenizer, sources[:3], only_end) == ["", "", ""]


def test_padding_is_never_said(tokenizer: Any):
    model = new_model("marian", tokenizer)
    model.final_logits_bias[0, model.config.pad_token_id] = 1e4
    model.final_logits_bias[0, model.config.eos_token_id] = -1e4
    for beams in (1, 2):
        translator = Translator(model, tokenizer, DecodeSettings(beams=beams))
        (text,) = translator(["ka lo mi"])
        assert len(tokenizer(text_target=text)["input_ids"]) > 5


# ---- what must not matter ----


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_do_not_matter(family: str, beams: int, tokenizer: Any):
    model, sources = new_model(family, tokenizer).double(), sentences(60, 1)
    settings = DecodeSettings(beams=beams, batch_tokens=600)
    found = translate(model, tokenizer, sources, settings)
    assert len(set(found)) > 20
    assert translate(model, tokenizer, sources, settings, order="file") == found
    alone = DecodeSettings(beams=beams, batch_tokens=1)
    assert translate(model, tokenizer, sources[:20], alone) == found[:20]


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_changes_hardly_any(family: str, tokenizer: Any):
    model, sources = new_model(family, tokenizer), sentences(200, 2)
    settings = DecodeSettings(max_ratio=1, batch_tokens=1000)
    by_length, by_file = (translate(model, tokenizer, sources, settings, order=order) for order in ("sorted", "file"))
    assert sum(a == b for a, b in zip(by_length, by_file, strict=True)) >= 0.995 * len(sources)


def test_settings_of_the_folder_do_not_matter_and_stay(tokenizer: Any):
    model, sources = new_model("marian", tokenizer), sentences(20, 6)
    expected = translate(model, tokenizer, sources, DecodeSettings())
    theirs = model.generation_config
    foreign = {"max_length": 3, "min_length": 2, "no_repeat_ngram_size": 1, "num_beams": 5, "do_sample": True}
    foreign |= {"bad_words_ids": [[5]], "repetition_penalty": 9.0, "length_penalty": -3.0, "early_stopping": True}
    theirs.update(**foreign)
    model.train()
    assert translate(model, tokenizer, sources, DecodeSettings()) == expected
    assert model.training
    assert model.generation_config is theirs
    assert theirs.no_repeat_ngram_size == 1


def test_vocabularies_of_different_sizes(tmp_path: Path):
    tokenizer = new_tokenizer(tmp_path, separate=True)
    sizes = len(tokenizer.encoder), len(tokenizer.target_encoder)
    assert sizes[0] > sizes[1]
    model = new_model("marian", tokenizer, decoder_vocab_size=sizes[1], share_encoder_decoder_embeddings=False).double()
    sources = sentences(30, 8)
    found = translate(model, tokenizer, sources, DecodeSettings(batch_tokens=200))
    assert found == translate(model, tokenizer, sources, DecodeSettings(batch_tokens=200), order="file")
    assert model.config.vocab_size == sizes[0]


def test_a_first_token_that_the_model_asks_for(tokenizer: Any):
    """Multilingual models say the language first."""
    model = new_model("bart", tokenizer, forced_bos_token_id=7)
    rows = translate(model, tokenizer, sentences(5), DecodeSettings(max_ratio=0, max_extra=3))
    assert all(tokenizer(text_target=text)["input_ids"] for text in rows)
    assert translate(model, tokenizer, ["ka"], DecodeSettings(max_ratio=0, max_extra=1)) == [""]


def test_batches_keep_their_bound_and_are_shown(tokenizer: Any):
    model, seen = new_model("marian", tokenizer), []
    sources = ["", *sentences(50, 9), "  "]

    def shown(batches: Any) -> Any:
        for batch in batches:
            seen.append(batch)
            yield batch

    settings = DecodeSettings(beams=3, batch_tokens=200)
    found = translate(model, tokenizer, sources, settings, shown=shown)
    assert [place for place, text in enumerate(found) if not text] == [0, 51]
    assert sorted(number for batch in seen for number in batch) == list(range(1, 51))
    lengths = [len(tokenizer(source)["input_ids"]) for source in sources]
    assert all(3 * len(batch) * max(lengths[n] for n in batch) <= 200 or len(batch) == 1 for batch in seen)
    longest = [max(lengths[n] for n in batch) for batch in seen]
    assert longest == sorted(longest, reverse=True)
    assert translate(model, tokenizer, ["", "\t"], settings) == ["", ""]
    assert translate(model, tokenizer, [], settings) == []


# ---- bad input ----


def test_a_source_longer_than_the_positions_is_named(tokenizer: Any):
    model = new_model("marian", tokenizer)
    with pytest.raises(UserError, match=rf"source line 3: \d+ tokens, but the model has {POSITIONS} positions"):
        translate(model, tokenizer, ["ka", "", "ka lo 1999 " * 40], DecodeSettings())
    unbounded = new_model("t5", tokenizer)
    assert translate(unbounded, tokenizer, ["ka lo 1999 " * 40], DecodeSettings(max_ratio=0, max_extra=5))


def test_special_tokens_must_be_known(tokenizer: Any):
    model = new_model("t5", tokenizer, decoder_start_token_id=None)
    with pytest.raises(UserError, match="decoder_start_token_id"):
        translate(model, tokenizer, ["ka"], DecodeSettings())


def test_a_model_with_more_tokens_than_its_tokenizer(tokenizer: Any):
    model = new_model("marian", tokenizer, vocab_size=5000)
    model.final_logits_bias[0, 4000] = 1e4
    with pytest.raises(UserError, match="token 4000, which its tokenizer does not know"):
        translate(model, tokenizer, ["ka"], DecodeSettings())


# ---- ranks ----


@pytest.mark.timeout(900)  # DeepSpeed compiles an operator the first time a machine uses it
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_say_what_one_says(engine: str, tokenizer: Any, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = new_model("marian", tokenizer)
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--machine_rank", "0", "--mixed_precision"]
    launcher += ["no", "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", free_port()]
    if engine == "zero3":
        (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        launcher += ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "deepspeed.json")]
    else:
        launcher += ["--multi_gpu"]
    command = [sys.executable, *launcher, str(SCRIPT), str(tmp_path / "tokenizer"), str(tmp_path / "told.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = json.loads((tmp_path / "told.json").read_text())
    assert [rank["engine"] for rank in ranks] == [{"ddp": "ddp", "zero3": "zero-3"}[engine]] * 2
    assert all(rank["training"] for rank in ranks)
    for name, settings in SETTINGS.items():
        expected = translate(model, tokenizer, SOURCES, settings)
        assert [rank[name]["hypotheses"] for rank in ranks] == [expected, expected], name
        assert ranks[0][name]["calls"] == ranks[1][name]["calls"] > 0
