"""The manifest of a checkpoint: what was written, by how many ranks, and a hash that tells whether it still is that.

Sizes and SHA-256 of all files stand in ``manifest.json``, with a SHA-256 of its own. Rejected: a checksum per tensor
(a reader of one tensor would still not know that a file is missing), CRC32 (no faster than the disk, and weaker).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_cht.errors import UserError

FORMAT = 2  # 1: written by one process, random state partly in state.json; still read


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as a manifest has them."""
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def write_manifest(folder: Path, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``manifest.json``: ``about`` the checkpoint, and what ``describe`` says of each file by its name."""
    manifest = {"format": FORMAT, **about, "files": files}
    text = json.dumps(manifest | {"sha256": _hash_manifest(manifest)}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``manifest.json``: ``step``, ``best``, ``world_size``, ``files``.

    Raises:
        UserError: it is missing, damaged or of a newer format.
    """
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
    if manifest["format"] not in range(1, FORMAT + 1):
        raise UserError(f"{path} has format {manifest['format']}, this version reads 1 to {FORMAT}: update llm-cht")
    return {"world_size": 1} | manifest  # format 1 knew one process only


def check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        UserError: it is missing or damaged.
    """
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
