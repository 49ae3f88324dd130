"""From settings to data: what the cache is keyed by, what is refused, and real data sets."""

import dataclasses
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_cht.data.settings import DataSettings
from llm_cht.data.text import describe, load_text, unigram_perplexity
from llm_cht.errors import UserError

WORDS = [
    "the",
    "sparse",
    "links",
    "move",
    "while",
    "the",
    "model",
    "learns",
    "and",
    "few",
    "remain",
    "at",
    "the",
    "end",
    "of",
    "it",
]


def corpus(path: Path, documents: int = 300, shift: int = 0) -> str:
    texts = [
        " ".join(WORDS[(number * word + shift) % 15] for word in range(12)) + f" {number}"
        for number in range(documents)
    ]
    path.write_text("\n\n".join(texts))
    return str(path)


@pytest.fixture
def settings(tmp_path) -> DataSettings:
    return DataSettings(
        source=corpus(tmp_path / "a.txt"),
        validation_fraction=0.1,
        vocab_size=300,
        sequence_length=16,
        cache_dir=str(tmp_path / "cache"),
    )


def prepared(settings: DataSettings, **changes):
    return load_text(dataclasses.replace(settings, **changes), seed=0)


def folders(settings: DataSettings) -> set[str]:
    return {path.name for path in Path(settings.cache_dir).iterdir() if path.is_dir()}


def test_documents_become_sequences(settings):
    data = prepared(settings)
    train, validation = data.counts["train"], data.counts["validation"]
    assert train.documents + validation.documents == 300
    assert train.sequences == len(data.train) == train.tokens // 16
    assert validation.sequences == len(data.validation)
    batch = data.train.batch(0, len(data.train))
    line = data.tokenizer.decode(batch["input_ids"].flatten())
    assert line.count("</s>") in (train.documents, train.documents - 1)
    assert 2 < unigram_perplexity(data.validation) < 300


def test_second_call_opens_the_cache(settings, monkeypatch):
    first = prepared(settings)
    monkeypatch.setattr("llm_cht.data.text._prepare", lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr("llm_cht.data.text.train_bpe", lambda *_: pytest.fail("trained again"))
    second = prepared(settings)
    assert (first.fingerprint, first.counts) == (second.fingerprint, second.counts)
    assert torch.equal(first.train.batch(5, 40)["input_ids"], second.train.batch(5, 40)["input_ids"])


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 17},
        {"packing": "pad"},
        {"vocab_size": 310},
        {"tokenizer_bytes": 500},
        {"validation_fraction": 0.2},
        {"text_documents": "line"},
    ],
)
def test_a_changed_setting_prepares_anew(settings, change):
    assert prepared(settings, **change).fingerprint != prepared(settings).fingerprint


def test_changed_content_prepares_anew_and_a_moved_file_does_not(settings, tmp_path):
    before = prepared(settings)
    made = folders(settings)
    Path(settings.source).rename(tmp_path / "moved.txt")
    assert prepared(settings, source=str(tmp_path / "moved.txt")).fingerprint == before.fingerprint
    assert folders(settings) == made
    corpus(tmp_path / "a.txt", shift=1)
    assert prepared(settings).fingerprint != before.fingerprint
    corpus(tmp_path / "v.txt", 30)
    own = prepared(settings, validation=str(tmp_path / "v.txt"))
    corpus(tmp_path / "v.txt", 29)
    assert prepared(settings, validation=str(tmp_path / "v.txt")).fingerprint != own.fingerprint


def test_own_validation_documents_are_left_out_of_training(settings, tmp_path):
    (tmp_path / "v.txt").write_text(Path(settings.source).read_text()[:1500])
    data = prepared(settings, validation=str(tmp_path / "v.txt"))
    assert data.counts["train"].shared >= 15
    assert data.counts["train"].documents + data.counts["train"].shared == 300
    assert "documents also in validation" in describe(data)


def test_describe_says_what_there_is(settings):
    data = prepared(settings)
    text = describe(data)
    for part in (
        "vocabulary   300",
        f"{len(data.train):,} sequences of 16",
        "bytes a token",
        "sample",
        str(data.cache),
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 1}, r"`data\.sequence_length` = 1"),
        ({"validation_fraction": 0.0}, r"`data\.validation_fraction` = 0\.0"),
        ({"validation_fraction": 1.0}, r"`data\.validation_fraction` = 1\.0"),
        ({"validation_fraction": 1e-9}, "the validation documents of .* have 0 tokens and one sequence needs 16"),
        ({"sequence_length": 2000}, r"the validation documents of .* have \d+ tokens and one sequence needs 2000"),
        ({"sequence_length": 10**6, "validation_fraction": 0.5}, "tokens and one sequence needs 1000000"),
        ({"vocab_size": 10}, r"`data\.vocab_size` = 10"),
        ({"source": "nowhere.txt"}, "`data.source` = 'nowhere.txt': no such file"),
        ({"source": "no-such-set"}, "no-such-set"),
        ({"validation": ["nowhere.txt"]}, "`data.validation` = 'nowhere.txt': no such file"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(settings, change, words):
    with pytest.raises(UserError, match=words):
        prepared(settings, **change)
    if Path(settings.cache_dir).exists():
        assert not [name for name in folders(settings) if not name.startswith("tokenizer-")]


def test_bad_file_in_the_middle_is_named(settings, tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\x00binary")
    with pytest.raises(UserError, match=r"b\.txt: not UTF-8 text at byte 0 \(line 1\)"):
        prepared(settings, source=[settings.source, str(tmp_path / "b.txt")])


def test_training_without_a_full_sequence(settings, tmp_path):
    (tmp_path / "short.txt").write_text("two words")
    with pytest.raises(UserError, match=r"the training documents of .* have .* tokens and one sequence needs 16"):
        prepared(settings, source=str(tmp_path / "short.txt"), validation=settings.source)


def test_documents_without_text_are_named_with_their_file(settings, tmp_path):
    path = tmp_path / "null.jsonl"
    path.write_text('{"text": null}\n' * 50)
    for streaming in (False, True):
        with pytest.raises(UserError, match=rf"the training documents of `data.source` = {path} have 0 tokens"):
            prepared(settings, source=str(path), validation=settings.source, streaming=streaming)
    with pytest.raises(UserError, match=rf"the validation documents of `data.validation` = {path} have 0 tokens"):
        prepared(settings, validation=str(path))


def test_full_disk(settings):
    """A limit on the size of files stands in for a full disk: the sequences do not fit, or even the tokenizer."""
    program = f"""
import resource
from llm_cht.data.settings import DataSettings
from llm_cht.data.text import load_text
for limit in (12_000, 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        load_text(DataSettings(**{vars(settings) | {"sequence_length": 4}!r} | {{"vocab_size": 290 + limit % 290}}), 0)
    except ValueError as error:
        print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        f"UserError the data cache {settings.cache_dir} cannot be written"
    ] * 2
    assert [name.split("-")[0] for name in folders(settings)] == ["tokenizer"]


def test_jsonl_and_text_of_the_same_documents_agree(settings, tmp_path):
    texts = Path(settings.source).read_text().split("\n\n")
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    other = prepared(settings, source=str(tmp_path / "a.jsonl.xz"), text_field="body")
    data = prepared(settings)
    assert other.counts == data.counts
    assert torch.equal(other.train.batch(0, 9)["input_ids"], data.train.batch(0, 9)["input_ids"])


def test_wikitext(tmp_path, data_dir):
    folder = data_dir / "wikitext2"
    data = load_text(
        DataSettings(
            source=str(folder / "wiki.test.tokens"),
            validation=str(folder / "wiki.valid.tokens"),
            vocab_size=1000,
            tokenizer_bytes=200_000,
            cache_dir=str(tmp_path),
        ),
        seed=0,
    )
    assert (data.counts["train"].documents, data.counts["validation"].documents) == (60, 60)
    assert data.counts["validation"].words == 217_646 - 3_760  # of the known count, less the ends of its lines


def test_openwebtext(tmp_path, data_dir):
    data = load_text(
        DataSettings(
            source=str(data_dir / "openwebtext_1k"),
            vocab_size=1000,
            tokenizer_bytes=200_000,
            validation_fraction=0.02,
            cache_dir=str(tmp_path),
        ),
        seed=0,
    )
    assert data.counts["train"].documents + data.counts["validation"].documents == 1000
