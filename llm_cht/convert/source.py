"""A checkpoint to be converted: where it is, what it holds, and its tensors in blocks of rows.

Memory stays bounded whatever the size of a file: headers are checked by the library of safetensors, data are read at
the places that they name. Rejected: slices of that library's, which map the file such that what was read once stays
resident, and that a file larger than the machine's memory cannot be opened; ``from_pretrained`` (the whole model in
memory); ``pytorch_model.bin`` (unpickling).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_cht.data.tokenizer import has_tokenizer
from llm_cht.errors import UserError
from llm_cht.files import is_path
from llm_cht.models import meant

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOAT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIGNED = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_UNSIGNED = {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool}
TYPES = _FLOAT | _SIGNED | _UNSIGNED | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""by the names that safetensors has"""
FLOATS = frozenset(_FLOAT)
BLOCK = 1 << 25
"""bytes read at a time"""
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of safetensors."""

    path: Path
    key: str
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    place: int
    """of its first byte in the file"""

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return TYPES[self.dtype].itemsize * math.prod(self.shape)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and rows of each part of at most ``BLOCK`` bytes (or one row); a number is one row.

        Raises:
            UserError: the file ends before.
        """
        num_rows = self.shape[0] if self.shape else 1
        width = self.nbytes // max(1, num_rows)
        step = max(1, BLOCK // max(1, width))
        for begin in range(0, num_rows, step):
            count = min(step, num_rows - begin)
            data = torch.empty(count * width, dtype=torch.uint8)
            with open(self.path, "rb") as file:
                file.seek(self.place + begin * width)
                if file.readinto(data.numpy().data) != len(data):
                    raise UserError(f"{self.path} has become shorter; leave it alone until it is converted")
            block = data.view(TYPES[self.dtype])
            yield begin, block.view(count, *self.shape[1:]) if self.shape else block.view(())

    def floats(self) -> Tensor:
        """The whole tensor in fp32."""
        whole = torch.empty(self.shape)
        for begin, block in self.blocks():
            whole[begin : begin + len(block)] = block
        return whole


@dataclass(frozen=True)
class Source:
    """A checkpoint in a folder."""

    folder: Path
    config: dict[str, Any]
    """what stands in its config.json"""
    tensors: Mapping[str, Stored]

    def others(self, code: bool) -> list[Path]:
        """Files that go with the weights: configs, tokenizer, chat template, licence; modelling code if ``code``."""
        patterns = (*_COPIED, "*.py") if code else _COPIED
        own = {"config.json", "topology.json"}
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(p for p in found if p.name not in own and not p.name.endswith(".index.json"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a file of a tokenizer."""
        return has_tokenizer(self.folder)


def locate(place: str, code: bool) -> Path:
    """The folder of a checkpoint; one of the hub is downloaded (only what is used; modelling code if ``code``).

    Raises:
        UserError: no such folder, and no such name on the hub, or no answer from it.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if is_path(place) or folder.exists():
        raise UserError(f"SOURCE = {place!r}: no folder here; give the folder of a Hugging Face model or a hub name")
    patterns = [*_COPIED, "model*.safetensors", "topology.safetensors", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(place, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HFValidationError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"SOURCE = {place!r}: no folder here, and the hub does not give it ({reason}); correct the name, or try "
            "again with network (a private model needs `hf auth login`)"
        ) from error


def open_source(folder: Path) -> Source:
    """Read config and headers of a checkpoint; no weights.

    Raises:
        UserError: no config, index or shard, a damaged one, or quantised weights.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model there, as it has no config.json{meant(folder)}")
    config = _json(folder / "config.json")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} has no `model_type`: it is no config of transformers; correct it")
    if "quantization_config" in config:
        raise UserError(f"{folder}: its weights are quantised, which a mask cannot cut; give the unquantised model")
    return Source(folder, config, read_headers(folder))


def read_headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint in the order of their names, whatever file each is in."""
    names, index = _files(folder)
    tensors: dict[str, Stored] = {}
    for file in names:
        for stored in _header(folder / file):
            if stored.key in tensors:
                raise UserError(f"{folder}: `{stored.key}` stands in two files; copy the model again")
            tensors[stored.key] = stored
    for key, file in index.items():
        if key not in tensors or tensors[key].path.name != file:
            raise UserError(f"{folder / file} lacks `{key}`, which {INDEX} says is there; copy both again")
    return {name: tensors[name] for name in sorted(tensors)}


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    if (folder / INDEX).is_file():
        index = _json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) and Path(f).name == f for f in index.values()):
            raise UserError(f"{folder / INDEX} has no `weight_map` of file names; copy it again")
        return sorted(set(index.values())), index
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if any(folder.glob("model-*.safetensors")):
        raise UserError(f"{folder} has shards of a model but no {INDEX}, which lists them; copy it too")
    kinds = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
    rest = f"; {kinds[0]} is not read: save the model again with `save_pretrained`" if kinds else ""
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}; give the folder of a Hugging Face model{rest}")


def _header(path: Path) -> Iterator[Stored]:
    try:
        with safe_open(path, framework="np"):  # checks the header, and that the file is as long as it says
            pass
        with open(path, "rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, and {INDEX} names it; copy it too") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from error
    for key, about in header.items():
        if key == "__metadata__":
            continue
        if about["dtype"] not in TYPES:
            raise UserError(f"{path}: `{key}` is of type {about['dtype']}, which is not supported; leave it out")
        yield Stored(path, key, about["dtype"], tuple(about["shape"]), 8 + start + about["data_offsets"][0])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; copy it again")
    return values
