"""From settings to sentence pairs: the split, the filters, what the cache is keyed by, what is refused, real data."""

import dataclasses
import itertools
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llm_cht.data.pair_settings import PairSettings
from llm_cht.data.pairs import check, describe, load_pairs, with_absolute_paths
from llm_cht.errors import UserError

WORDS = "a man woman dog runs sits with in on street house red green old and then".split()  # noqa: SIM905


def sentence(draw: random.Random, most: int = 9) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(2, most)))


def corpus(folder: Path, name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Made-up pairs (the target is the source backwards) and two aligned files of them."""
    draw = random.Random(seed)
    sources = [sentence(draw) for _ in range(count)]
    pairs = [(source, " ".join(reversed(source.split()))) for source in sources]
    write(folder, name, pairs)
    return pairs


def write(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    for language, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        (folder / f"{name}.{language}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


@pytest.fixture
def settings(tmp_path) -> PairSettings:
    corpus(tmp_path, "train", 300, 0)
    corpus(tmp_path, "val", 20, 1)
    corpus(tmp_path, "test", 10, 2)
    return PairSettings(
        train=str(tmp_path / "train"),
        validation=str(tmp_path / "val"),
        test=str(tmp_path / "test"),
        vocabulary="word",
        vocab_size=100,
        cache_dir=str(tmp_path / "cache"),
    )


def prepared(settings: PairSettings, batch_tokens: int = 60, seed: int = 0, tokenizer=None, **changes):
    return load_pairs(dataclasses.replace(settings, **changes), batch_tokens, seed, tokenizer)


def refused(settings: PairSettings, batch_tokens: int = 60, **changes) -> str:
    with pytest.raises(UserError) as error:
        prepared(settings, batch_tokens, **changes)
    return str(error.value)


def source_texts(data) -> list[str]:
    """Sources of training, in any order, as the tokenizer writes them."""
    batches = range(len(data.train))
    rows = itertools.chain.from_iterable(data.train.next(0, 1, 1)[0][0]["input_ids"] for _ in batches)
    return [data.tokenizer.decode(row, skip_special_tokens=True, use_source_tokenizer=True) for row in rows]


def test_pairs_become_batches_and_held_out_sets(settings, tmp_path):
    data = prepared(settings)
    train, validation, test = (data.counts[name] for name in ("train", "validation", "test"))
    assert (train.read, validation.read, test.read) == (300, 20, 10)
    assert train.kept + train.dropped_shared == 300
    assert (validation.kept, test.kept) == (20, 10)
    lines = (tmp_path / "train.en").read_text().splitlines()
    held = set(data.validation.sources) | set(data.test.sources)
    assert sorted(source_texts(data)) == sorted(line for line in lines if line not in held)
    assert data.validation.sources == (tmp_path / "val.en").read_text().splitlines()
    assert data.test.references == (tmp_path / "test.de").read_text().splitlines()
    assert (
        train.source_tokens == train.target_tokens == sum(len(text.split()) + 1 for text in lines if text not in held)
    )
    assert data.longest == 10
    assert data.sizes == (len(data.tokenizer),) * 2
    (batch,) = data.test.batches(10**4)
    order = [
        data.test.sources.index(data.tokenizer.decode(row, skip_special_tokens=True)) for row in batch["input_ids"]
    ]
    assert sorted(order) == list(range(10))
    labels = batch["labels"][0]
    assert data.tokenizer.decode(labels[labels != -100][:-1]) == data.test.references[order[0]]


def test_second_call_opens_the_cache(settings, monkeypatch):
    first = prepared(settings)
    monkeypatch.setattr("llm_cht.data.pairs._prepare", lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr("llm_cht.data.pairs.train_vocabulary", lambda *_: pytest.fail("trained again"))
    second = prepared(settings)
    assert (first.fingerprint, first.counts, first.longest) == (second.fingerprint, second.counts, second.longest)
    for _ in range(5):
        (one,), (two,) = first.train.next(0, 1, 1)[0], second.train.next(0, 1, 1)[0]
        assert torch.equal(one["labels"], two["labels"])
    assert prepared(settings, 61).fingerprint != first.fingerprint
    assert prepared(settings, seed=1).fingerprint == first.fingerprint
    moved = prepared(settings, cache_dir=settings.cache_dir)
    assert moved.cache == first.cache


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 9, "validation": None, "test": None},
        {"max_ratio": 2.0},
        {"vocab_size": 15},
        {"vocabulary": "bpe"},
        {"lowercase": True},
        {"joint": False},
        {"validation": None},
        {"validation_fraction": 0.1, "validation": None},
        {"test": None},
        {"source": "de", "target": "en"},
    ],
)
def test_a_changed_setting_prepares_anew(settings, change):
    _, *others = change
    before = {other: change[other] for other in others}
    assert prepared(settings, **change).fingerprint != prepared(settings, **before).fingerprint


def test_changed_content_prepares_anew(settings, tmp_path):
    before = prepared(settings).fingerprint
    for name, count in (("train", 299), ("val", 19), ("test", 9)):
        corpus(tmp_path, name, count, 7)
        after = prepared(settings).fingerprint
        assert after != before
        before = after


def test_the_tokenizer_of_a_checkpoint_gives_the_same_data(settings, tmp_path):
    for kind, joint in (("bpe", True), ("word", False)):
        first = prepared(settings, vocabulary=kind, joint=joint)
        first.tokenizer.save_pretrained(tmp_path / kind)
        stock = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert prepared(settings, tokenizer=stock, vocabulary="never/read").fingerprint == first.fingerprint
        assert prepared(settings, vocabulary=str(tmp_path / kind)).fingerprint == first.fingerprint


def test_held_out_pairs_share_no_source_sentence_with_training(settings, tmp_path):
    draw = random.Random(3)
    sources = [sentence(draw, 4) for _ in range(200)]
    pairs = [(draw.choice(sources), sentence(draw)) for _ in range(2000)]
    write(tmp_path, "train", pairs)
    data = prepared(settings, validation=None, test=None, validation_fraction=0.2)
    assert data.test is None
    train, validation = set(source_texts(data)), set(data.validation.sources)
    assert not train & validation
    assert 10 < len(validation) < 70
    assert data.counts["train"].read + data.counts["validation"].read == 2000
    assert set(data.counts) == {"train", "validation"}


def test_what_is_dropped_is_counted(settings, tmp_path):
    kept, shared = ("a man", "a man"), ("a dog runs", "in a house")
    write(tmp_path, "val", [shared])
    write(tmp_path, "test", [("a dog runs", "a")])
    rows = [
        kept,
        kept,
        shared,
        ("a dog runs", "elsewhere"),
        ("", "a"),
        ("a", " \t"),
        ("a " * 30, "a"),
        ("a", "a a a a"),
    ]
    write(tmp_path, "train", [*rows, ("  a dog runs ", "in a house"), ("a", "\u200b"), ("a " * 9, "a " * 9)])
    train = prepared(settings, max_length=10, max_ratio=3).counts["train"]
    assert dataclasses.astuple(train)[:6] == (11, 4, 3, 1, 1, 2)
    assert (train.source_tokens, train.target_tokens) == (3 + 3 + 4 + 10, 3 + 3 + 2 + 10)
    train = prepared(settings, max_length=10).counts["train"]
    assert (train.kept, train.dropped_ratio) == (5, 0)


def test_describe_says_what_there_is(settings, tmp_path):
    write(tmp_path, "train", [("a man", "man a"), ("red dog runs", "runs red dog"), ("", "")] + [("a", "a")] * 8)
    text = describe(prepared(settings))
    for part in ("tokens, joint", "train        10 of 11 pairs", "left out: 1 with an empty side", "% padding"):
        assert part in text
    for part in ("source       a man", "target       runs red dog", "▁red ▁dog ▁runs </s>", "cache        /"):
        assert part in text
    assert "tokens for the source" in describe(prepared(settings, joint=False))


def test_paths_mean_the_same_from_anywhere(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRS_HERE", str(tmp_path))
    (tmp_path / "tok").mkdir()
    given = PairSettings(
        train="train", validation="$PAIRS_HERE/val", test=["test.en", "./test.de"], vocabulary="tok", cache_dir="cache"
    )
    found = with_absolute_paths(given)
    names = (found.train, found.validation, found.test, found.vocabulary, found.cache_dir)
    here = str(tmp_path)
    expected = (f"{here}/train", f"{here}/val", [f"{here}/test.en", f"{here}/test.de"], f"{here}/tok", f"{here}/cache")
    assert names == expected
    assert with_absolute_paths(found) == found
    hub = PairSettings(train="wmt/wmt17", subset="de-en", validation="validation", test="test[:50%]")
    assert with_absolute_paths(hub) == hub
    assert with_absolute_paths(PairSettings()) == PairSettings()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train": None}, ["`pairs.train` is not set"]),
        ({"train": ["a"]}, ["`pairs.train` lists 1 files; give two"]),
        ({"test": ["a", "b", "c"]}, ["`pairs.test` lists 3 files"]),
        ({"validation": ""}, ["`pairs.validation` = '': names no file"]),
        ({"validation": ["a", ""]}, ["names no file"]),
        ({"vocabulary": ""}, ["`pairs.vocabulary` is empty"]),
        ({"target": "en"}, ["both 'en'"]),
        ({"validation_fraction": 0.0}, ["`pairs.validation_fraction` = 0.0"]),
        ({"validation_fraction": 1.0}, ["`pairs.validation_fraction` = 1.0"]),
        ({"vocab_size": 3}, ["`pairs.vocab_size` = 3: must be at least 4"]),
        ({"max_length": 1}, ["`pairs.max_length` = 1: must be at least 2"]),
        ({"max_ratio": 0.5}, ["`pairs.max_ratio` = 0.5"]),
        ({"max_ratio": float("nan")}, ["`pairs.max_ratio` = nan"]),
    ],
)
def test_values_that_cannot_work(change, parts):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(PairSettings(train="a"), **change))
    assert all(part in str(error.value) for part in parts)
    check(PairSettings(train="a"))


def test_lines_of_validation_and_test_that_cannot_be_used(settings, tmp_path):
    write(tmp_path, "val", [("a", "a"), ("a", " ")])
    assert "val.de:2: an empty line in `pairs.validation`" in refused(settings)
    write(tmp_path, "val", [("", "a")])
    assert "val.en:1: an empty line in `pairs.validation`" in refused(settings)
    write(tmp_path, "val", [("a", "a"), ("\u200b", "a")])
    assert "val.en:2: no text that the vocabulary could read, in `pairs.validation`" in refused(settings)
    write(tmp_path, "val", [("a", "a"), ("a", "a " * 128)])
    told = refused(settings)
    assert "val.de:2: 129 tokens in `pairs.validation`, more than `pairs.max_length` = 128" in told
    write(tmp_path, "val", [("a", "a")])
    write(tmp_path, "test", [("a", "a")] * 3 + [("a " * 200, "a " * 150)])
    assert "test.en:4: 201 tokens in `pairs.test`" in refused(settings)
    assert not list(Path(settings.cache_dir).glob("pairs-*/*"))


def test_nothing_left_to_train_or_validate_on(settings, tmp_path):
    write(tmp_path, "train", [("", "a"), ("a", "")])
    assert "no training pair; give pairs with text" in refused(settings)
    write(tmp_path, "train", [("a " * 500, "a"), ("", "a")])
    told = refused(settings)
    assert "no pair is left for train (1 empty, 1 longer than `pairs.max_length`)" in told
    write(tmp_path, "train", [("a man", "a dog")] * 20)
    told = refused(settings, validation=None, test=None, validation_fraction=1e-6)
    assert "no pair is left for validation (none read); raise `pairs.validation_fraction`" in told


def test_a_budget_smaller_than_a_pair(settings, tmp_path):
    write(tmp_path, "train", [("a", "a"), ("a man sits", "a man sits in"), ("a", "a")])
    told = refused(settings, 8)
    assert f"`train.batch_tokens` = 8: the pair at {tmp_path}/train.en:2 alone has 9 tokens" in told
    assert len(prepared(settings, 9).train) == 2


def test_a_cache_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("")
    assert "`pairs.cache_dir`" in refused(settings, cache_dir=str(tmp_path / "file" / "cache"))


def test_two_processes_prepare_once(settings):
    code = (
        "import sys; from llm_cht.data.pairs import *; s = sys.argv;"
        "print(load_pairs(PairSettings(train=s[1], validation=s[2], cache_dir=s[3], vocab_size=60), 99, 0).fingerprint)"
    )
    arguments = [sys.executable, "-c", code, settings.train, settings.validation, settings.cache_dir]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1] != ""


def test_settings_are_light_to_import():
    code = "import sys, llm_cht.data.pair_settings; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_multi30k(data_dir, tmp_path):
    folder = data_dir / "multi30k"
    data = load_pairs(
        PairSettings(
            train=f"{folder}/train",
            validation=f"{folder}/val",
            test=f"{folder}/test_2016_flickr",
            cache_dir=str(tmp_path),
        ),
        batch_tokens=1024,
        seed=0,
    )
    assert {name: counts.read for name, counts in data.counts.items()} == {
        "train": 29_000,
        "validation": 1_014,
        "test": 1_000,
    }
    train = data.counts["train"]
    assert train.kept + train.dropped_shared == 29_000
    assert (len(data.validation), len(data.test)) == (1_014, 1_000)
    assert data.sizes == (8000, 8000)
    assert data.train.padding() < 0.05
    assert sum(map(len, data.train.epoch(3))) == train.kept
    for text in data.test.references[:100]:
        assert data.tokenizer.decode(data.tokenizer(text_target=text)["input_ids"][:-1]) == text


def test_tatoeba_shares_no_source_sentence(data_dir, tmp_path):
    path = data_dir / "tatoeba_en_de" / "deu-eng.zip"
    data = load_pairs(PairSettings(train=str(path), vocab_size=2000, cache_dir=str(tmp_path)), 4000, 0)
    counts = data.counts
    assert counts["train"].read + counts["validation"].read == 169_813
    assert 0.005 < counts["validation"].kept / 169_813 < 0.02
    held = set(data.validation.sources)
    rows = zipfile.ZipFile(path).read("deu.txt").decode().splitlines()
    train = [row.split("\t")[0] for row in rows if row.split("\t")[0] not in held]
    assert len(train) == counts["train"].read
    assert len(data.validation.sources) == counts["validation"].kept
