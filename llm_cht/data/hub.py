"""Data sets of the hub as sources, streamed or not.

The hub is asked once whether it knows a name before a library downloads from it: without an answer those retry for half
a minute per file, and then speak of the cache. Offline use of what was downloaded before is asked for with the
libraries' own HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from llm_cht.data.readers import as_text, missing_field
from llm_cht.data.sources import digest_of
from llm_cht.errors import UserError
from llm_cht.files import is_path

_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class HubSource:
    """One split of a hub data set; its shards are its files when streamed, else it is one shard."""

    place: str
    dataset: Any
    """`Dataset` or `IterableDataset`; both know shard and skip"""
    text_field: str
    version: str

    @property
    def num_shards(self) -> int:
        """Files of the data set when streamed, else 1."""
        return getattr(self.dataset, "num_shards", 1)

    def content(self, sampled: bool) -> str:
        """Digest of the data set's version, split and field; nothing is read."""
        return digest_of([self.version, self.text_field])

    def documents(self, shard: int, start: int = 0) -> Iterator[str]:
        """Documents of one shard."""
        with reading_rows(self.place):
            for row in self.dataset.shard(num_shards=self.num_shards, index=shard).skip(start):
                if self.text_field not in row:
                    raise missing_field(self.place, self.text_field, row)
                yield as_text(row[self.text_field], self.place, self.text_field)


def hub_source(name: str, subset: str | None, split: str, text_field: str, streaming: bool) -> HubSource:
    """A split of the data set ``name``; downloaded and prepared by ``datasets`` unless ``streaming``.

    Raises:
        UserError: no such data set, subset or split, or the hub does not answer.
    """
    dataset, version = load_split(name, subset, split, streaming)
    return HubSource(f"hub data set {name}", dataset, text_field, version)


def load_split(
    name: str, subset: str | None, split: str, streaming: bool, setting: str = "data.source"
) -> tuple[Any, str]:
    """A split of the data set ``name`` and its version; ``setting`` is where messages say the name stands.

    Raises:
        UserError: no such data set, subset or split, or the hub does not answer.
    """
    try:
        builder = load_dataset_builder(name, subset)
        if streaming:
            dataset = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).splitlines()[0]
        section = setting.split(".")[0]
        raise UserError(
            f"hub data set {name}: {reason}; see `{setting}`, `{section}.subset`, `{section}.split`"
        ) from error
    return dataset, f"{builder.hash} {builder.config.name} {split}"


@contextmanager
def reading_rows(place: str) -> Iterator[None]:
    """Turn what can go wrong while rows are read into a ``UserError``."""
    try:
        yield
    except (OSError, httpx.HTTPError, DatasetsError) as error:
        raise UserError(f"{place}: reading stopped: {error}; start again when the hub answers") from error


def reach(name: str, kind: Literal["data set", "tokenizer"], place: str) -> None:
    """Ask the hub for ``name``, unless HF_HUB_OFFLINE is set.

    Raises:
        UserError: it does not answer, or does not know the name, or the name can be none of the hub.
    """
    place = f"`{place}` = {name!r}"
    if is_path(name):
        raise UserError(f"{place}: no such file or folder here; correct the path, or give a name of the hub")
    if constants.HF_HUB_OFFLINE:
        return
    ask = HfApi().dataset_info if kind == "data set" else HfApi().model_info
    try:
        ask(name, timeout=_TIMEOUT_SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{place}: neither a file or folder here nor a {kind} the hub knows (a private one needs "
            "`hf auth login`); correct the name"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{place}: no such file or folder here, and the hub cannot be reached ({reason}); correct the "
            f"path, or set HF_HUB_OFFLINE=1 to use a {kind} downloaded before"
        ) from error
