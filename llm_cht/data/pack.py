"""Documents to sequences on disk, and sequences to tensors.

`pack` joins the tokens of all documents and cuts the line into full sequences; `pad` takes the first tokens of each
document, as the papers did, and fills up. What is stored has no padding; it is an Arrow file of ``datasets``, memory
mapped, two bytes a token where the vocabulary allows. Padding stands on the right of a causal model, so it needs no
attention mask: no real token sees it, and its labels are -100.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_cht.data.tokenizer import encode, smallest_vocabulary

Packing = Literal["pack", "pad"]
IGNORED = -100
_CHUNK_CHARACTERS = 2**22  # of text encoded at once: enough to occupy all cores, some hundred MiB at work


@dataclass
class Counts:
    """What became of the documents of one side."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    """runs of characters without white space"""
    tokens: int = 0
    """end tokens included"""
    sequences: int = 0
    unused_tokens: int = 0
    """the end of the line that fills no sequence (pack), or what was cut off (pad)"""
    blank: int = 0
    """documents left out because they hold white space only"""
    shared: int = 0
    """documents left out because validation has the same text"""


class Packer:
    """Writes the sequences of one side to ``path``; add documents, then close."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int, packing: Packing) -> None:
        self.counts = Counts()
        self._tokenizer, self._length, self._packing = tokenizer, length, packing
        kind = "uint16" if smallest_vocabulary(tokenizer) <= 2**16 else "int32"
        self._dtype = np.dtype(kind)
        self._writer = ArrowWriter(path=str(path), features=Features({"input_ids": List(Value(kind))}))
        self._texts: list[str] = []
        self._waiting = 0
        self._rest = np.zeros(0, dtype=np.int64)

    def add(self, text: str) -> None:
        """Take one document."""
        self._texts.append(text)
        self._waiting += len(text)
        if self._waiting >= _CHUNK_CHARACTERS:
            self._flush()

    def close(self) -> Counts:
        """Write what is waiting; the last sequence that is not full is dropped."""
        self._flush()
        self.counts.unused_tokens += len(self._rest)
        self._write([])  # a schema, even for no sequence
        self._writer.finalize()
        return self.counts

    def _flush(self) -> None:
        if not self._texts:
            return
        documents = encode(self._tokenizer, self._texts)
        self.counts.documents += len(documents)
        self.counts.bytes += sum(len(text.encode()) for text in self._texts)
        self.counts.words += sum(len(text.split()) for text in self._texts)
        self.counts.tokens += sum(map(len, documents))
        self._texts, self._waiting = [], 0
        if self._packing == "pad":
            self.counts.unused_tokens += sum(max(0, len(tokens) - self._length) for tokens in documents)
            self._write([tokens[: self._length] for tokens in documents])
        else:
            line = np.concatenate([self._rest, *documents])
            full = len(line) // self._length * self._length
            self._rest = line[full:]
            self._write(list(line[:full].reshape(-1, self._length)))

    def _write(self, sequences: list[np.ndarray]) -> None:
        self.counts.sequences += len(sequences)
        ends = np.cumsum([0, *map(len, sequences)])
        values = np.concatenate(sequences) if sequences else np.zeros(0)
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.astype(self._dtype)))
        self._writer.write_table(pa.table({"input_ids": lists}))


class Sequences:
    """Stored sequences by number, as tensors of ``length`` tokens."""

    def __init__(self, path: Path, length: int, pad: int) -> None:
        self._rows = Dataset.from_file(str(path)).with_format("arrow")
        self.length, self._pad = length, pad

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, both (len(numbers), length) int64; labels are -100 on padding."""
        lists = self._rows[numbers]["input_ids"].combine_chunks()
        return fill(lists.flatten().to_numpy(), lists.value_lengths().to_numpy(), self.length, self._pad)

    def part(self, max_tokens: int | None) -> int:
        """How many sequences have about ``max_tokens`` predicted tokens; None: all have."""
        if max_tokens is None:
            return len(self)
        stored = pc.sum(pc.list_value_length(self._rows.data.column("input_ids"))).as_py()
        return min(max(1, max_tokens * len(self) // (stored - len(self))), len(self))

    def batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[dict[str, Tensor]]:
        """All sequences in order, or about ``max_tokens`` predicted tokens, always the same and spread evenly."""
        count = self.part(max_tokens)
        numbers = np.arange(count) * len(self) // count
        for first in range(0, count, batch_size):
            yield self.take(numbers[first : first + batch_size])


def fill(values: np.ndarray, lengths: np.ndarray, length: int, pad: int) -> dict[str, Tensor]:
    """Tensors (len(lengths), length) of ``input_ids`` and ``labels`` from the joined tokens of some sequences."""
    real = np.arange(length) < lengths[:, None]
    tensors = {}
    for name, filler in (("input_ids", pad), ("labels", IGNORED)):
        array = np.full(real.shape, filler, dtype=np.int64)
        array[real] = values
        tensors[name] = torch.from_numpy(array)
    return tensors


def unigram_perplexity(validation: Sequences) -> float:
    """The lowest perplexity any unigram model can reach on ``validation``.

    The exponential of the entropy of the predicted tokens' own frequencies: the first token of a sequence and padding
    are not predicted.
    """
    counts = np.zeros(0, dtype=np.int64)
    for batch in validation.batches(1024):
        targets = batch["labels"][:, 1:]
        seen = np.bincount(targets[targets != IGNORED].numpy(), minlength=len(counts))
        seen[: len(counts)] += counts
        counts = seen
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
