"""Trained vocabularies as stock Marian folders, their normalization, and encoding as the tokenizer does it."""

import random
import warnings
from pathlib import Path

import pytest
from transformers import AutoTokenizer, MarianTokenizer, PreTrainedTokenizerFast

from llm_cht.data.pair_vocabulary import (
    TRAINED,
    Encoder,
    Sample,
    VocabularySettings,
    check_tokenizer,
    open_vocabulary,
    pair_tokenizer_digest,
    pieces,
    train_vocabulary,
    vocabulary_sizes,
)
from llm_cht.data.tokenizer import train_bpe, trained_bpe
from llm_cht.errors import UserError

ENGLISH = "the a man woman dog runs sits with in on street house red green old and then 3 12".split()  # noqa: SIM905
GERMAN = "der die ein Mann Frau Hund läuft sitzt mit in auf Straße Haus rot grün alt und dann".split()  # noqa: SIM905
NOT_SPECIAL = ["</s> <pad> <unk> x", "<pad>", "a</s>", "Hund\u200b</s>"]
TRAPS = [
    *NOT_SPECIAL,
    ">>de<< Hund",
    ">> der alte << Hund",
    " >>de<< Hund",
    "日本 語",
    "",
    " ",
    "Die Straße... (GROß), ja!",
]


def sentences(words: list[str], count: int = 300) -> list[str]:
    draw = random.Random(len(words))
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))).capitalize() + draw.choice(".!?") for _ in range(count)]


PAIRS = list(zip(sentences(ENGLISH), sentences(GERMAN), strict=True))


def trained(folder: Path, kind: str = "bpe", joint: bool = True, size: int = 120, lowercase: bool = False):
    folder.mkdir(exist_ok=True)
    train_vocabulary(PAIRS, VocabularySettings(kind, joint, size, lowercase, ("en", "de")), folder)
    return open_vocabulary(folder)


def texts_of(tokenizer, texts: list[str]) -> list[list[str]]:
    """Pieces of targets, without the end token."""
    return [pieces(tokenizer, tokens.tolist()[:-1], 1) for tokens in Encoder(tokenizer)(texts, 1)]


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("lowercase", [True, False])
def test_a_saved_vocabulary_is_a_stock_tokenizer_that_gives_the_same_tokens(tmp_path, kind, joint, lowercase):
    tokenizer = trained(tmp_path / "made", kind, joint, lowercase=lowercase)
    tokenizer.save_pretrained(tmp_path / "saved")
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(stock) is MarianTokenizer
    assert pair_tokenizer_digest(stock) == pair_tokenizer_digest(tokenizer)
    assert vocabulary_sizes(stock) == vocabulary_sizes(tokenizer)
    assert max(vocabulary_sizes(tokenizer)) <= 120
    assert (stock.pad_token_id, stock.eos_token_id, stock.unk_token_id) == (0, 1, 2)
    encoder = Encoder(tokenizer)
    assert encoder.sizes == vocabulary_sizes(stock)
    assert encoder.blank == [1, 1]
    for side in (0, 1):
        texts = [*[pair[side] for pair in PAIRS[:50]], *TRAPS]
        given = stock(text_target=texts) if side else stock(texts)
        assert [tokens.tolist() for tokens in encoder(texts, side)] == given["input_ids"]
    for text in [pair[1] for pair in PAIRS[:20]]:
        (tokens,) = encoder([text], 1)
        expected = text.lower() if lowercase else text
        if kind == "word":
            assert 2 in tokens or stock.decode(tokens[:-1]) == f"{expected[:-1]} {expected[-1]}"
        else:
            assert stock.decode(tokens[:-1]) == expected


def test_side_of_a_separate_vocabulary(tmp_path):
    tokenizer = trained(tmp_path / "made", "word", joint=False, size=1000)
    assert vocabulary_sizes(tokenizer) == (len(tokenizer.encoder), len(tokenizer.target_encoder))
    assert len(tokenizer.encoder) != len(tokenizer.target_encoder)
    encoder = Encoder(tokenizer)
    (source,), (target,) = encoder(["dog and man"], 0), encoder(["Hund und Mann"], 1)
    assert pieces(tokenizer, source.tolist(), 0) == ["▁dog", "▁and", "▁man", "</s>"]
    assert pieces(tokenizer, target.tolist(), 1) == ["▁Hund", "▁und", "▁Mann", "</s>"]
    assert encoder(["Hund"], 0)[0].tolist() == [2, 1]


def test_word_splits_punctuation_off_and_knows_the_commonest_words(tmp_path):
    tokenizer = trained(tmp_path / "made", "word", size=1000)
    assert texts_of(tokenizer, ["Der Hund,(ein Mann)!", "in  \tHaus ; und … 3.12", "Hund-Haus Hund\u2019s und"]) == [
        ["▁Der", "▁Hund", "<unk>", "▁ein", "▁Mann", "<unk>", "▁!"],
        ["▁in", "▁Haus", "<unk>", "▁und", "<unk>", "▁3", "▁.", "▁12"],
        ["<unk>", "▁und"],
    ]
    small = trained(tmp_path / "small", "word", size=20)
    assert len(small) == 20
    assert 2 in small("Frau")["input_ids"]


@pytest.mark.parametrize("kind", TRAINED)
def test_lower_case_keeps_the_sharp_s(tmp_path, kind):
    tokenizer = trained(tmp_path / "made", kind, size=150, lowercase=True)
    (tokens,) = Encoder(tokenizer)(["DIE STRAßE GRÜN U\u0308"], 1)
    assert tokenizer.decode(tokens[:-1], skip_special_tokens=True).startswith("die straße grün")
    assert not any(piece != piece.lower() for piece in tokenizer.get_vocab())


@pytest.mark.parametrize("kind", TRAINED)
def test_special_tokens_in_a_text_are_text(tmp_path, kind):
    train = [(text, text) for text in ["foo</s>", "<pad> bar", "<unk>", "</s>", "x<pad>y"] * 20] + PAIRS
    train_vocabulary(train, VocabularySettings(kind, True, 120, False, ("en", "de")), tmp_path)
    tokenizer = open_vocabulary(tmp_path)
    for tokens in Encoder(tokenizer)(NOT_SPECIAL, 0):
        assert tokens[-1] == 1
        assert min(tokens[:-1]) >= 2


def test_a_language_code_in_front_is_one_unknown_token(tmp_path):
    tokenizer = trained(tmp_path / "made")
    code, swallowed, led = texts_of(tokenizer, [">>de<< Hund", ">> der << Hund", " >>de<< Hund"])
    assert code == swallowed == ["<unk>", *texts_of(tokenizer, ["Hund"])[0]]
    assert "de" in "".join(led)


def test_training_is_deterministic_and_silent(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (trained(tmp_path / name, "unigram") for name in ("a", "b"))
    assert pair_tokenizer_digest(first) == pair_tokenizer_digest(second)
    assert pair_tokenizer_digest(first) != pair_tokenizer_digest(trained(tmp_path / "c", "bpe"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", TRAINED)
def test_little_text_makes_a_small_vocabulary(tmp_path, kind):
    train_vocabulary([("dog", "Hund")], VocabularySettings(kind, True, 8000, False, ("en", "de")), tmp_path)
    tokenizer = open_vocabulary(tmp_path)
    assert len(tokenizer) < 30
    assert tokenizer.decode(tokenizer("dog")["input_ids"], skip_special_tokens=True) == "dog"


def test_text_or_size_that_makes_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"`pairs\.vocab_size` = 20: the characters .* alone need \d+; raise it"):
        trained(tmp_path / "a", size=20)
    for number, text in enumerate(["\u200b", "a" * 10_000]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=r"`pairs\.vocabulary` = 'bpe': .* made no vocabulary of 2 training"):
            train_vocabulary([(text, text)], VocabularySettings("bpe", True, 100, False, ("en", "de")), folder)


def test_a_sample_is_bounded_uniform_and_always_the_same():
    samples = [Sample(50), Sample(50)]
    for sample in samples:
        for number in range(1000):
            sample.add((str(number), ""))
    assert samples[0].pairs == samples[1].pairs
    numbers = [int(text) for text, _ in samples[0].pairs]
    assert len(set(numbers)) == 50
    assert 300 < sum(numbers) / 50 < 700


def test_any_other_tokenizer_ends_targets(tmp_path):
    other = trained_bpe(train_bpe([" ".join(ENGLISH)], 270, 1000))
    encoder = Encoder(other)
    (source,), (target,) = encoder(["the dog"], 0), encoder(["the dog"], 1)
    assert target.tolist() == [*source.tolist(), other.eos_token_id]
    assert encoder.blank == [0, 1]
    assert vocabulary_sizes(other) == (len(other), len(other))
    check_tokenizer(other, "here")
    for missing, name in (("pad_token", "padding"), ("eos_token", "end")):
        kept = {"pad_token": "<pad>", "eos_token": "</s>"}
        del kept[missing]
        bare = PreTrainedTokenizerFast(tokenizer_object=other.backend_tokenizer, **kept)
        with pytest.raises(UserError, match=f"here: it has no {name} token"):
            check_tokenizer(bare, "here")


def test_a_marian_tokenizer_of_other_numbers_is_asked_itself(tmp_path):
    made = trained(tmp_path / "made")
    made.encoder = {piece: len(made.encoder) - 1 - number for piece, number in made.encoder.items()}
    made.decoder = {number: piece for piece, number in made.encoder.items()}
    made.save_pretrained(tmp_path / "other")
    other = open_vocabulary(tmp_path / "other")
    texts = [text for text, _ in PAIRS[:20]]
    assert [tokens.tolist() for tokens in Encoder(other)(texts, 0)] == other(texts)["input_ids"]
    assert pair_tokenizer_digest(other) != pair_tokenizer_digest(trained(tmp_path / "made"))
