"""The trained tokenizer, sentencepiece models, and what is refused."""

import hashlib
import io
import json
import lzma

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_cht.data.tokenizer import check_vocabulary, encode, load_tokenizer, tokenizer_digest, train_bpe, trained_bpe
from llm_cht.errors import UserError

TEXTS = ["def f(x):\n    return x  # é", "</s> is text here, <pad> too\n", "日本語 \t tab"]


@pytest.fixture(scope="module")
def trained():
    return trained_bpe(train_bpe(TEXTS * 3, 300, 10_000))


def test_trained_tokenizer_loses_nothing_and_reads_special_tokens_as_text(trained):
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert len(trained) == 300
    for text, tokens in zip(TEXTS, encode(trained, TEXTS), strict=True):
        assert trained.decode(tokens[:-1]) == text
        assert tokens[-1] == 2
        assert min(tokens[:-1]) > 2


def test_trained_tokenizer_survives_saving(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(again) == tokenizer_digest(trained)
    assert all((a == b).all() for a, b in zip(encode(again, TEXTS), encode(trained, TEXTS), strict=True))


def test_training_is_deterministic_and_stops_at_the_limit():
    texts = [" ".join(str(number**3) for number in range(first, first + 50)) for first in range(0, 5000, 50)]
    rules = train_bpe([*texts, "never read"], 500, sum(len(text.encode()) for text in texts))
    assert rules == train_bpe(texts, 500, 10**9)
    merges = json.dumps(json.loads(rules)["model"]["merges"])
    assert hashlib.sha256(merges.encode()).hexdigest()[:16] == "8a6b2af09f64ef59"


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(UserError, match=r"`data\.vocab_size` = 100: .* at least 259"):
        train_bpe(TEXTS, 100, 1000)


def test_vocabulary_against_the_model(trained):
    check_vocabulary(trained, 300)
    with pytest.raises(UserError, match="300 tokens and the model's vocabulary 299"):
        check_vocabulary(trained, 299)


def words(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "one": 1, "two": 2, "<end>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def test_end_token_is_added_once_and_demanded(tmp_path):
    assert [tokens.tolist() for tokens in encode(words(eos_token="<end>"), ["one two", "one <end>"])] == [
        [1, 2, 3],
        [1, 3],
    ]
    words().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_that_are_not_there(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for name in ("no/such-tokenizer", tmp_path / "bad", tmp_path / "bad.model", tmp_path / "none.model"):
        with pytest.raises(UserError, match=f"`data.tokenizer` = '{name}'"):
            load_tokenizer(str(name))


@pytest.mark.parametrize(("kind", "rule"), [("bpe", "identity"), ("bpe", "nmt_nfkc"), ("unigram", "nmt_nfkc")])
def test_sentencepiece_models_give_their_own_tokens(tmp_path, data_dir, kind, rule):
    with lzma.open(data_dir / "openwebtext_1k" / "openwebtext_1k.jsonl.xz", "rt", encoding="utf-8") as file:
        lines = file.readlines(100_000)
    texts = [part for line in lines for part in json.loads(line)["text"].split("\n") if part]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=600,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        minloglevel=2,
    )
    path = tmp_path / "a.model"
    path.write_bytes(model.getvalue())
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [*texts[:300], "a </s> b", "two  spaces", " x"]
    tokenizer = load_tokenizer(str(path))
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ours = [tokens.tolist() for tokens in encode(loaded, texts)]
        theirs = [[*original.encode(text), original.eos_id()] for text in texts]
        # a unigram model may split a word in two ways of equal probability
        assert sum(map(list.__eq__, ours, theirs)) >= len(texts) * (1 if kind == "bpe" else 0.99)
        assert [loaded.decode(tokens[:-1]) for tokens in ours] == [original.decode(tokens[:-1]) for tokens in theirs]
