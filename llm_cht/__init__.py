"""Sparse pre-training of language models whose topology evolves while they learn (Cannistraci-Hebb training).

The rooms, from the bottom up: ``config`` and ``dist``; ``topology`` (pure rules on masks); ``sparse`` (layers and model
surgery); ``models`` and ``data``; ``evolve`` (topology updates of a live model); ``train`` and ``report``; ``cli``.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["MethodSettings", "SparseSettings", "TopologyCallback", "__version__", "sparsify"]

_HOMES = {
    "sparsify": "llm_cht.evolve.library",
    "TopologyCallback": "llm_cht.evolve.callback",
    "MethodSettings": "llm_cht.topology.settings",
    "SparseSettings": "llm_cht.sparse.surgery",
}


def __getattr__(name: str) -> Any:
    """The library's own names, imported when they are asked for: the command line must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
