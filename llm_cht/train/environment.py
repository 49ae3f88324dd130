"""What a run depends on besides its settings, and whether all ranks have the same of it.

A rank that runs another version or reads another config would train another model, and nothing would say so: gradients
are summed all the same.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from importlib import metadata
from typing import Any

from llm_cht import __version__, dist

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "deepspeed")


def versions() -> dict[str, str]:
    """Versions of what a run depends on; those of packages that are not installed are left out."""
    found = {"llm_cht": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # a test tells one rank to report another version
    return found | json.loads(os.environ.get("LLM_CHT_REPORTED_VERSIONS", "{}"))


def check_same(settings: dict[str, Any]) -> None:
    """All ranks must have the same flat ``settings`` and versions. A collective.

    Raises:
        UserError: on every rank, naming the first that differs from rank 0, what, and the two values.
    """
    own = {f"`{key}`": value for key, value in settings.items()}
    own |= {f"the version of {package}": version for package, version in versions().items()}
    everybody = dist.gather([socket.gethostname(), own], patient=True)
    _, first = everybody[0]
    for rank, (host, theirs) in enumerate(everybody):
        for key in {**first, **theirs}:
            if theirs.get(key) != first.get(key):
                raise dist.agreed(
                    f"{key} is {theirs.get(key)!r} on rank {rank} ({host}) and {first.get(key)!r} on rank 0; start all "
                    "ranks with one config and one environment"
                )
