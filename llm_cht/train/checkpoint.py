"""Checkpoints: folders of tensors and JSON that are whole or not there.

    root/step-00001000/model.safetensors ...   one file per name in ``tensors``
    root/step-00001000/state.json              everything that is no tensor
    root/step-00001000/manifest.json           size and SHA-256 of each file, step, format, and its own SHA-256
    root/best.json                             {"folder": the checkpoint with the best validation loss}

This module knows nothing of models. A folder is written under a hidden name, forced to disk and renamed
(``sparse.folder.new_folder``), so a kill or a full disk at any moment costs at most the checkpoint that was being
written; older ones are deleted after the new one is in place. A hash per file finds what a disk or a copy did later.
Which one is the best is told by the manifests; ``best.json`` is derived from them for people and scripts.

Rejected: ``torch.save`` (pickle: loading runs code, and a damaged file often loads), ``accelerate.save_state`` (not
atomic, no integrity check), writing in the background (a second copy of everything in memory for a few seconds' gain).
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.files import discard, disk_errors, new_folder, settle, sync, write_whole

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(new|old|trash)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back and found intact; the tensors are on the CPU."""

    path: Path
    step: int  # optimizer steps done
    tensors: dict[str, dict[str, Tensor]]  # by the stem of their file
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run below ``root``: the last ``keep_last`` and, beyond those, the best.

    One process at a time may use a store; any number may ``load``. Making a store does not touch the disk.
    """

    def __init__(self, root: Path, keep_last: int) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last = {keep_last}: at least one checkpoint must be kept, give 1 or more")
        self.root = root
        self.keep_last = keep_last

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool = False
    ) -> Path:
        """Write a checkpoint and return its folder, then delete those that are no longer kept.

        ``state`` must be JSON (tuples come back as lists). A checkpoint of the same step is replaced, and stays the
        best if it was. Steps after this one, left by a run that was resumed from an older checkpoint, are deleted: the
        newest step must be the one saved last. Raises ``UserError`` if it cannot be written; every other checkpoint is
        then as it was.
        """
        target = self.root / f"step-{step:08d}"
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        earlier = self._folders()
        kept = f"The last checkpoint, {earlier[-1].name}, is untouched." if earlier else "There is no earlier one."
        with disk_errors(target, needed, kept):
            self._sweep()
            with new_folder(target) as folder:
                for stem, group in tensors.items():
                    save_file(_storable(group), folder / f"{stem}.safetensors")
                (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                _write_manifest(folder, step, best or self.best() == target)
            self._discard_others(target)
            self._point_to_best()
        return target

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint; ``UserError`` naming the file if one is missing, damaged or of a newer format."""
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            _check_file(path, name, entry)
        stems = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
        tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(path, manifest["step"], tensors, state)

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Read the checkpoint of the highest step that is intact; ``warn`` hears of each one skipped.

        None if there is none at all; ``UserError`` if there are some and all are damaged.
        """
        self._sweep()
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return self.load(folder)
            except UserError as error:
                warn(f"skipped a damaged checkpoint: {error}")
        if folders:
            raise UserError(
                f"all {len(folders)} checkpoints in {self.root} are damaged: restore one from a copy, or start anew in "
                "another run folder"
            )
        return None

    def best(self) -> Path | None:
        """Return the checkpoint last saved as the best one, if there is one."""
        for folder in reversed(self._folders()):
            try:
                if _read_manifest(folder)["best"]:
                    return folder
            except UserError:  # damaged: said where it matters, in newest() and load()
                continue
        return None

    def _folders(self) -> list[Path]:
        """Folders of checkpoints by ascending step."""
        return sorted((self.root / name for name in self._names() if _NAME.fullmatch(name)), key=_step)

    def _sweep(self) -> None:
        """Remove what killed saves left behind."""
        for name in self._names():
            if leftover := _LEFTOVER.fullmatch(name):
                settle(self.root / leftover[1])

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:  # no checkpoint yet
            return []
        except OSError as error:
            raise UserError(f"cannot look for checkpoints in {self.root}: {error}; give a readable folder") from error

    def _point_to_best(self) -> None:
        best, pointer = self.best(), self.root / "best.json"
        if best is None:
            pointer.unlink(missing_ok=True)
        else:
            write_whole(pointer, json.dumps({"folder": best.name}) + "\n")
        sync(self.root)

    def _discard_others(self, newest: Path) -> None:
        folders = self._folders()
        done, abandoned = folders[: folders.index(newest) + 1], folders[folders.index(newest) + 1 :]
        for folder in reversed(abandoned):
            discard(folder)
        best = self.best()
        for folder in done[: -self.keep_last]:
            if folder != best:
                discard(folder)


def resolve(resume: str | None, root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Find the checkpoint that a run should resume from; None for a fresh start.

    ``resume``: None, ``auto`` (the newest good one below ``root``, if any), the folder of one checkpoint, or a run
    folder, whose newest good one is taken. Raises ``UserError`` if nothing is found there.
    """
    if resume is None:
        return None
    if resume == "auto":
        return CheckpointStore(root, keep_last=1).newest(warn)
    path = Path(resume)
    if _NAME.fullmatch(path.name) or os.path.exists(path / "manifest.json"):
        return CheckpointStore(path.parent, keep_last=1).load(path)
    for folder in (path / "checkpoints", path):
        found = CheckpointStore(folder, keep_last=1).newest(warn)
        if found is not None:
            return found
    raise UserError(f"no checkpoint to resume from in {path}: give a run folder, a step-... folder in it, or auto")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what safetensors refuses: tensors that are not contiguous, or lie in the storage of one before them."""
    result, storages = {}, set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        result[name] = stored
    return result


# ---- integrity ----


def _write_manifest(folder: Path, step: int, best: bool) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "best": best, "files": files}
    text = json.dumps(manifest | {"sha256": _hash_manifest(manifest)}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise _damaged(folder, "manifest.json", "is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, "manifest.json", f"cannot be read ({error})") from error
    if stated != _hash_manifest(manifest):
        raise _damaged(folder, "manifest.json", "does not have the content it was written with")
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: update llm-cht")
    return manifest


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    try:
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise _damaged(folder, name, f"has {size} bytes, not the {entry['size']} that were written")
        if _hash(folder / name) != entry["sha256"]:
            raise _damaged(folder, name, "does not have the content it was written with (SHA-256)")
    except FileNotFoundError as error:
        raise _damaged(folder, name, "is missing") from error
    except OSError as error:
        raise _damaged(folder, name, f"cannot be read ({error})") from error


def _damaged(folder: Path, name: str, fault: str) -> UserError:
    return UserError(
        f"checkpoint {folder}: {name} {fault}. Resume from another checkpoint in {folder.parent}; --resume auto takes "
        "the newest good one"
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ---- random state ----


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the state of every global generator (torch CPU and CUDA, numpy, Python) as tensors and JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, key, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(key, dtype=np.int64))
    version, words, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(words)
    values = {"numpy": [name, position, has_gauss, gauss], "python": [version, gauss_next]}
    return tensors, values


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Undo ``random_state``; a CUDA device that was not there when it was taken keeps its own state."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    name, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, gauss_next = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))
