"""Streaming from local parquet: order, nothing lost, and a resume that goes on with the very same sequences."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm_cht.data.order import permutation
from llm_cht.data.settings import DataSettings
from llm_cht.data.text import describe, load_text
from llm_cht.data.tokenizer import encode
from llm_cht.errors import UserError

FILES, ROWS = 3, 40
LENGTH = 16


def text(file: int, row: int) -> str:
    return f"file {file} row {row} " + "word " * ((7 * row + file) % 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for file in range(FILES):
        texts = [text(file, row) for row in range(ROWS)]
        pq.write_table(pa.table({"text": texts}), folder / f"{file}.parquet", 16)
    return folder


def stream(folder: Path, seed: int = 5, **changes):
    settings = DataSettings(
        source=str(folder),
        streaming=True,
        vocab_size=300,
        sequence_length=LENGTH,
        validation_fraction=0.1,
        cache_dir=str(folder.with_name(f"{folder.name}-cache")),
    )
    return load_text(DataSettings(**vars(settings) | changes), seed)


def documents(data, seed: int, epoch: int) -> list[list[int]]:
    """Tokens of the training documents of one epoch, in the order that streaming promises."""
    held = data.tokenizer.decode(
        [token for batch in data.validation.batches(8) for token in batch["input_ids"].flatten()]
    )
    order = permutation(seed, epoch, FILES)
    texts = [text(file, row) for file in order for row in range(ROWS)]
    train = [content for content in texts if content[:17] not in held]
    return [tokens.tolist() for tokens in encode(data.tokenizer, train)]


def test_order_is_shards_by_seed_and_epoch_and_nothing_is_dropped(folder):
    data = stream(folder)
    line = [token for epoch in range(3) for tokens in documents(data, 5, epoch) for token in tokens]
    count = len(line) // LENGTH
    sequences = torch.cat([data.train.batch(start, 1)["input_ids"] for start in range(count)])
    assert sequences.flatten().tolist() == line[: count * LENGTH]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_resume_goes_on_exactly(folder, packing):
    whole = stream(folder, packing=packing).train.batch(0, 150)
    train = stream(folder, packing=packing).train
    start = 0
    for count in (1, 2, 7, 31, 40, 3, 36, 30):  # over shards and epochs
        state = json.loads(json.dumps(train.state_dict()))
        train = stream(folder, packing=packing).train
        train.load_state_dict(state)
        batch = train.batch(start, count)
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name], whole[name][start : start + count])
        start += count


def test_pad_takes_one_document_a_sequence(folder):
    data = stream(folder, packing="pad")
    expected = documents(data, 5, 0)
    batch = data.train.batch(0, len(expected))
    for row, labels, tokens in zip(batch["input_ids"], batch["labels"], expected, strict=True):
        real = tokens[:LENGTH]
        assert row.tolist() == real + [data.tokenizer.pad_token_id] * (LENGTH - len(real))
        assert labels.tolist() == real + [-100] * (LENGTH - len(real))


def test_seeds_draw_other_orders(folder):
    batches = [stream(folder, seed).train.batch(0, 50)["input_ids"] for seed in range(4)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) > 1
    assert torch.equal(batches[0], stream(folder, 0).train.batch(0, 50)["input_ids"])


def test_batches_must_follow_each_other(folder):
    train = stream(folder).train
    train.batch(0, 2)
    with pytest.raises(AssertionError):
        train.batch(1, 2)


def test_head_is_what_preparation_reads(folder):
    small = stream(folder, stream_head=60, validation_fraction=0.3)
    large = stream(folder, validation_fraction=0.3)
    assert 0 < len(small.validation) < len(large.validation)
    assert small.fingerprint != large.fingerprint
    assert "streamed from 3 shards" in describe(small)


def test_an_epoch_without_a_sequence(tmp_path):
    (tmp_path / "train.txt").write_text(" ".join(map(str, range(10))))
    (tmp_path / "valid.txt").write_text("many words " * 500)
    names = {"source": str(tmp_path / "train.txt"), "validation": str(tmp_path / "valid.txt")}
    assert stream(tmp_path, **names).train.batch(0, 2)["input_ids"].shape == (2, LENGTH)  # over two epochs
    with pytest.raises(UserError, match=r"the training documents of .* have \d+ tokens and one sequence needs 128"):
        stream(tmp_path, **names, sequence_length=128).train.batch(0, 1)
    with pytest.raises(UserError, match=r"the training documents of .* have 0 tokens"):
        stream(tmp_path, **names | {"source": names["validation"]})
