"""Packing and padding against a few lines of plain Python, and access to the sequences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_cht.data.pack import Packer, Sequences, unigram_perplexity
from llm_cht.data.tokenizer import encode, train_bpe, trained_bpe

TEXTS = ["abc", "d", "efghijkl", "mn", "op qr"]


@pytest.fixture(scope="module")
def tokenizer():
    return trained_bpe(train_bpe(["nothing"], 259, 1))  # one token a byte


def packed(path, tokenizer, texts, length, packing):
    packer = Packer(path, tokenizer, length, packing)
    for text in texts:
        packer.add(text)
    return packer.close(), Sequences(path, length, tokenizer.pad_token_id)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("ab c", min_size=1, max_size=12), max_size=12), st.integers(2, 9), st.integers(1, 20))
def test_pack_joins_and_cuts(tmp_path_factory, tokenizer, texts, length, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_cht.data.pack._CHUNK_CHARACTERS", chunk)
        counts, sequences = packed(tmp_path_factory.mktemp("p") / "a.arrow", tokenizer, texts, length, "pack")
    line = [int(token) for tokens in encode(tokenizer, texts) for token in tokens] if texts else []
    full = len(line) // length
    assert len(sequences) == counts.sequences == full
    if full:
        batch = sequences.take(np.arange(full))
        assert batch["input_ids"].flatten().tolist() == line[: full * length]
        assert torch.equal(batch["labels"], batch["input_ids"])
    assert (counts.documents, counts.tokens) == (len(texts), len(line))
    assert counts.unused_tokens == len(line) - full * length
    assert counts.bytes == sum(len(text.encode()) for text in texts)
    assert counts.words == sum(len(text.split()) for text in texts)


def test_pad_cuts_and_fills_each_document(tmp_path, tokenizer):
    counts, sequences = packed(tmp_path / "a.arrow", tokenizer, TEXTS, 5, "pad")
    batch = sequences.take(np.array([2, 1]))
    long, short = (tokens.tolist() for tokens in encode(tokenizer, ["efghijkl", "d"]))
    assert batch["input_ids"].tolist() == [long[:5], [*short, 0, 0, 0]]
    assert batch["labels"].tolist() == [long[:5], [*short, -100, -100, -100]]
    assert counts.sequences == len(TEXTS)
    assert counts.unused_tokens == (9 - 5) + (6 - 5)


def test_tokens_beyond_two_bytes_are_kept(tmp_path, tokenizer):
    tokenizer = trained_bpe(tokenizer.backend_tokenizer.to_str())
    tokenizer.add_tokens([f"<extra{number}>" for number in range(70_000)])
    _, sequences = packed(tmp_path / "a.arrow", tokenizer, ["<extra69999>"], 2, "pack")
    assert sequences.take(np.array([0]))["input_ids"].tolist() == [[259 + 69_999, 2]]


def test_batches_of_validation(tmp_path, tokenizer):
    _, sequences = packed(tmp_path / "a.arrow", tokenizer, ["x" * 399], 10, "pack")  # 40 sequences, 9 targets each
    every = list(sequences.batches(16))
    assert [len(batch["input_ids"]) for batch in every] == [16, 16, 8]
    some = list(sequences.batches(16, max_tokens=100))
    assert [len(batch["input_ids"]) for batch in some] == [11]
    assert sum(len(batch["input_ids"]) for batch in sequences.batches(16, max_tokens=10**9)) == 40
    assert sum(len(batch["input_ids"]) for batch in sequences.batches(16, max_tokens=1)) == 1


def test_part_of_validation_is_spread_over_all_of_it(tmp_path, tokenizer):
    _, sequences = packed(tmp_path / "a.arrow", tokenizer, [chr(97 + number) * 9 for number in range(20)], 10, "pack")
    first = torch.cat([batch["input_ids"][:, 0] for batch in sequences.batches(3, max_tokens=36)])
    assert tokenizer.decode(first) == "afkp"


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_unigram_perplexity_is_the_entropy_of_the_targets(tmp_path, tokenizer, packing):
    _, sequences = packed(tmp_path / "a.arrow", tokenizer, TEXTS * 3, 4, packing)
    batch = sequences.take(np.arange(len(sequences)))
    targets = [token for row in batch["labels"][:, 1:].tolist() for token in row if token != -100]
    shares = [targets.count(token) / len(targets) for token in set(targets)]
    assert unigram_perplexity(sequences) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
