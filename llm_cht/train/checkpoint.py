"""Checkpoints: folders of tensors and JSON that are whole or not there, written and read by any number of ranks.

    root/step-00001000/model.safetensors ...             one file per group of tensors, of rank 0
    root/step-00001000/model-rank-00001.safetensors ...  what other ranks hold of it
    root/step-00001000/state.json                        everything that is no tensor
    root/step-00001000/manifest.json                     size and SHA-256 of each file, step, format, number of ranks
    root/best.json                                       {"folder": the checkpoint with the best validation loss}

This module knows nothing of models. Rank 0 makes a folder under a hidden name, every rank writes its files into it,
forces them to disk and hashes them; when all have, rank 0 adds the manifest and renames the folder
(``files.finish_folder``). So a kill or a full disk on any rank at any moment costs at most the checkpoint that was
being written; older ones are deleted after the new one is in place. A hash per file finds what a disk or a copy did
later; the ranks share the hashing. Which one is the best is told by the manifests; ``best.json`` is derived from them
for people and scripts.

Rejected: ``torch.save`` (pickle: loading runs code, and a damaged file often loads), ``accelerate.save_state`` (not
atomic, no integrity check), writing in the background (a second copy of everything in memory for a few seconds' gain).
"""

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.files import begin_folder, discard, disk_errors, finish_folder, settle, sync, unfinished, write_whole
from llm_cht.train.integrity import check_file, describe, read_manifest, write_manifest
from llm_cht.train.pieces import Group, GroupReader, by_stem, file_name, write_group
from llm_cht.train.shared import not_shared, see

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(new|old|trash)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found intact; its tensors are read when asked for, onto the CPU, by each rank for itself."""

    path: Path
    step: int
    """optimizer steps done"""
    world_size: int
    """number of ranks that saved it"""
    state: dict[str, Any]
    groups: Mapping[str, GroupReader]
    """by the stem of their files"""

    def names(self, stem: str) -> set[str]:
        """Names of the tensors of a group."""
        return self.groups[stem].names()

    def shape(self, stem: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.groups[stem].shape(name)

    def read(self, stem: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop - 1`` of a flattened tensor, 1-D, whoever saved them; nothing else is read."""
        return self.groups[stem].read(name, start, stop)

    def tensor(self, stem: str, name: str) -> Tensor:
        """A whole tensor in its shape."""
        return self.groups[stem].tensor(name)

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """All tensors of a group."""
        return {name: self.tensor(stem, name) for name in sorted(self.names(stem))}


class CheckpointStore:
    """The checkpoints of one run below ``root``: the last ``keep_last`` and, beyond those, the best.

    Every rank has a store on the same folder; ``save``, ``load`` and ``newest`` are collectives: all ranks call them,
    and all get their result or all raise. One job at a time may save; any number may ``load``. Making a store does not
    touch the disk.
    """

    def __init__(self, root: Path, keep_last: int) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last = {keep_last}: at least one checkpoint must be kept, give 1 or more")
        self.root = root
        self.keep_last = keep_last

    def save(self, step: int, tensors: Mapping[str, Group], state: Mapping[str, Any], best: bool = False) -> Path:
        """Write a checkpoint and return its folder, then delete those that are no longer kept.

        ``tensors``: what this rank holds, by group and name: whole tensors, or pieces that over all ranks make up
        whole ones. ``state`` must be JSON (tuples come back as lists); that of rank 0 is written. A checkpoint of the
        same step is replaced, and stays the best if it was. Steps after this one, left by a run that was resumed from
        an older checkpoint, are deleted: the newest step must be the one saved last.

        Raises:
            UserError: it cannot be written, on whatever rank; every other checkpoint is then as it was.
        """
        target = self.root / f"step-{step:08d}"
        needed, kept = self._announce(tensors)
        try:
            with dist.together(), disk_errors(target, needed, kept):
                if dist.is_main():
                    self._sweep()
                    begin_folder(target)
            with dist.together(patient=True), disk_errors(target, needed, kept):
                own = _write_own(unfinished(target), tensors)
            written = dist.gather(own)
            with dist.together(patient=True), disk_errors(target, needed, kept):
                if dist.is_main():
                    _complete(target, state, {"step": step, "best": best or self.best() == target}, written)
                    self._discard_others(target)
                    self._point_to_best()
        finally:
            if dist.is_main():
                settle(target)
        return target

    def _announce(self, tensors: Mapping[str, Group]) -> tuple[int, str]:
        """Bytes that all ranks will write, and what the user will have if that fails."""
        with dist.together():
            earlier = self.folders() if dist.is_main() else []
        kept = f"The last checkpoint, {earlier[-1].name}, is untouched." if earlier else "There is no earlier one."
        own = sum(values.nbytes for group in tensors.values() for values in group.values())
        told = dist.gather([own, kept])
        return sum(size for size, _ in told), told[0][1]

    def load(self, path: Path) -> Checkpoint:
        """Check a checkpoint and open it; the ranks share the check.

        Raises:
            UserError: naming the file that is missing, damaged or of a newer format.
        """
        with dist.together(patient=True):
            manifest = read_manifest(path)
            files = manifest["files"]
            by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
            for name in {*by_size[dist.rank() :: dist.world_size()], "state.json"}:
                check_file(path, name, files[name])
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        groups = {stem: GroupReader(path / name for name in names) for stem, names in by_stem(files).items()}
        return Checkpoint(path, manifest["step"], manifest["world_size"], state, groups)

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Open the checkpoint of the highest step that is intact; ``warn``, on rank 0, hears of each one skipped.

        None if there is none at all.

        Raises:
            UserError: there are some and all are damaged.
        """
        with dist.together():
            if dist.is_main():
                self._sweep()
            names = [folder.name for folder in self.folders()] if dist.is_main() else []
        names = dist.from_main(names)
        for name in reversed(names):
            try:
                return self.load(self.root / name)
            except UserError as error:
                if dist.is_main():
                    warn(f"skipped a damaged checkpoint: {error}")
        if names:
            raise UserError(
                f"all {len(names)} checkpoints in {self.root} are damaged: restore one from a copy, or start anew in "
                "another run folder"
            )
        return None

    def best(self) -> Path | None:
        """Return the checkpoint last saved as the best one, if there is one."""
        for folder in reversed(self.folders()):
            try:
                if read_manifest(folder)["best"]:
                    return folder
            except UserError:  # damaged: said where it matters, in newest() and load()
                continue
        return None

    def folders(self) -> list[Path]:
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
        folders = self.folders()
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
    folder, whose newest good one is taken. Every rank calls it, and all get the same one.

    Raises:
        UserError: nothing is found there.
    """
    if resume is None:
        return None
    if resume == "auto":
        return CheckpointStore(root, keep_last=1).newest(warn)
    path = Path(resume)
    if dist.from_main(bool(_NAME.fullmatch(path.name)) or os.path.exists(path / "manifest.json")):
        return CheckpointStore(path.parent, keep_last=1).load(path)
    for folder in (path / "checkpoints", path):
        found = CheckpointStore(folder, keep_last=1).newest(warn)
        if found is not None:
            return found
    raise UserError(f"no checkpoint to resume from in {path}: give a run folder, a step-... folder in it, or auto")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _write_own(folder: Path, tensors: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """Write the files of this rank into ``folder`` and describe them."""
    files = {}
    for stem, group in tensors.items():
        if group or dist.is_main():  # a file of rank 0 tells that there is such a group
            see(folder)
            path = folder / file_name(stem, dist.rank())
            write_group(path, group)
            sync(path)
            files[path.name] = describe(path)
    return files


def _complete(
    target: Path, state: Mapping[str, Any], about: dict[str, Any], written: Sequence[dict[str, dict[str, Any]]]
) -> None:
    """On rank 0: see that all is there that the ranks have written, add what is no tensor, put it in its place."""
    folder, files = unfinished(target), {}
    for rank, own in enumerate(written):
        for name, entry in own.items():
            if not os.path.exists(folder / name):
                raise not_shared(platform.node(), folder / name, f"rank {rank} has written")
            files[name] = entry
    for names in by_stem(files).values():
        GroupReader(folder / name for name in names).check()
    path = folder / "state.json"
    path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    files[path.name] = describe(path)
    write_manifest(folder, about | {"world_size": dist.world_size()}, files)
    for name in (path.name, "manifest.json"):
        sync(folder / name)
    finish_folder(target)
