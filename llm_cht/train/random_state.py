"""The global random generators of this rank (torch CPU and CUDA, numpy, Python), to and from a checkpoint.

Everything is a tensor, and its name begins with the rank (``3.torch``), so that the states of all ranks stand side by
side in a checkpoint. A rank that has none there, since the run was saved by fewer ranks, seeds its generators from
(seed, rank, step): no two ranks draw the same, and the same resume draws the same again. Ranks that are no longer
there leave theirs behind.

CUDA: the generator of the current device alone. Asking for those of all devices would occupy memory on each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_cht import dist
from llm_cht.train.checkpoint import Checkpoint

_NO_GAUSS = float("nan")  # numpy and Python draw normals in pairs and may hold back the second


def random_state() -> dict[str, Tensor]:
    """Take the state of the generators of this rank."""
    _, key, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray([*key, position], dtype=np.int64)),
        "numpy.gauss": _real(float(gauss) if has_gauss else None),
        "python": torch.tensor([version, *words]),
        "python.gauss": _real(gauss_next),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {f"{dist.rank()}.{name}": tensor for name, tensor in tensors.items()}


def restore_random_state(checkpoint: Checkpoint, seed: int) -> None:
    """Undo ``random_state``, or seed the generators if ``checkpoint`` has none for this rank.

    A CUDA generator of which nothing was saved keeps its own state.
    """
    tensors = {name: checkpoint.tensor("random", name) for name in checkpoint.names("random") if _is_own(name)}
    if "torch" in tensors:
        tensors = _from_format_1(tensors, checkpoint.state["random"])
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    if not own:
        return seed_rank(seed, checkpoint.step)
    torch.set_rng_state(own["torch"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    *key, position = own["numpy"].tolist()
    gauss = own["numpy.gauss"].item()
    held = not np.isnan(gauss)
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, int(held), gauss if held else 0.0))
    version, *words = own["python"].tolist()
    gauss = own["python.gauss"].item()
    random.setstate((version, tuple(words), None if np.isnan(gauss) else gauss))
    return None


def seed_rank(seed: int, step: int) -> None:
    """Seed the generators of this rank, at ``step``: dropout must not fall alike on all ranks.

    At the start of a run torch's on the main rank goes on from the drawing of the weights, as in any other program.
    """
    for_torch, for_python, *for_numpy = np.random.SeedSequence([seed, dist.rank(), step]).generate_state(6).tolist()
    if step > 0 or not dist.is_main():
        torch.manual_seed(for_torch)  # CUDA's too
    random.seed(for_python)
    np.random.seed(for_numpy)


def _real(value: float | None) -> Tensor:
    return torch.tensor(_NO_GAUSS if value is None else value, dtype=torch.float64)


def _is_own(name: str) -> bool:
    first = name.partition(".")[0]
    return first == str(dist.rank()) or (dist.is_main() and not first.isdecimal())


def _from_format_1(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """One process, names without a rank, all devices, and plain values in state.json."""
    _, position, has_gauss, gauss = values["numpy"]
    version, gauss_next = values["python"]
    result = {
        "0.torch": tensors["torch"],
        "0.numpy": torch.cat([tensors["numpy"], torch.tensor([position])]),
        "0.numpy.gauss": _real(gauss if has_gauss else None),
        "0.python": torch.cat([torch.tensor([version]), tensors["python"]]),
        "0.python.gauss": _real(gauss_next),
    }
    return result | ({"0.cuda": tensors["cuda.0"]} if "cuda.0" in tensors else {})
