"""The methods of the papers as rows of data over ``MethodSettings``; the engine has no branch on their names.

A row sets every open setting, so that what a method is can be read in one place: the baseline that evolves nothing, and
what each method changes of it. The rows are the papers' LLaMA runs; ``preset`` gives those of other tasks.
"""

from __future__ import annotations

from typing import Any

_STILL: dict[str, Any] = {
    "initial": "er",
    "brf_r": 0.2,
    "brf_degree": "fixed",
    "bsw_beta": 0.25,
    "bsf_equal_partition": False,
    "bsf_resort": False,
    "csti_inner": False,
    "initial_weight": "keep",
    "initial_gain": 1.0,
    "budget": "uniform",
    "repair": False,
    "removal": "magnitude",
    "removal_alpha": 1.0,
    "removal_choice": "hard",
    "temperature_start": 1.0,
    "temperature_end": 9.0,
    "interpolate": "temperature",
    "zeta": 0.0,
    "zeta_schedule": "constant",
    "regrowth": "random",
    "regrowth_from": {},
    "regrowth_choice": "hard",
    "regrowth_delta": 0.5,
    "ties": "random",
    "momentum_beta": 0.9,
    "density": "constant",
    "density_table": {},
    "start_sparsity": 0.5,
    "density_start_step": 0,
    "half_window": False,
    "pruning": "magnitude",
    "pruning_memory": False,
    "pruning_scope": "layer",
    "percolate": False,
    "percolate_bias": "exact",
    "qk_pairing": "rotary",
    "dead_heads": False,
    "per_head": False,
    "new_weight": "zero",
    "early_stop": 0.0,
}
_SET = _STILL | {"zeta": 0.1}
_RIGL = _SET | {"regrowth": "gradient", "zeta_schedule": "cosine"}
_ESML = _SET | {"regrowth": "ch3_l3p", "percolate": True}
_CHTS = _SET | {
    "initial": "brf",
    "removal_choice": "soft",
    "regrowth": "ch2_l3n",
    "regrowth_choice": "soft",
    "percolate": True,
    "new_weight": "history",
}
PRESETS: dict[str, dict[str, Any]] = {
    "dense": _STILL,
    "static": _STILL,
    "set": _SET,
    "rigl": _RIGL,
    "snfs": _RIGL | {"regrowth": "momentum"},
    "mest": _STILL | {"removal": "mest", "density": "em_s"},
    "gmp": _STILL | {"density": "cubic", "pruning_memory": True, "new_weight": "history"},
    "granet": _RIGL | {"density": "cubic"},
    "esml": _ESML,
    "cht": _ESML | {"initial_weight": "swi", "early_stop": 0.9},
    "chts": _CHTS,
    "chtss": _CHTS | {"density": "sigmoid", "half_window": True, "pruning": "relative_importance"},
}

TASKS: dict[str, dict[str, Any]] = {
    "language_modelling": {},
    "translation": {"brf_r": 0.25, "temperature_end": 3.0, "zeta": 0.3},
}
"""what the papers set otherwise in runs of a task (002, Tables 4 to 6 and Fig. 7a)"""

SOURCES = {
    "dense": "the unmodified model",
    "static": "a random topology that stays",
    "set": "Mocanu et al. 2018",
    "rigl": "Evci et al. 2020",
    "snfs": "Dettmers and Zettlemoyer 2019",
    "mest": "Yuan et al. 2021, with EM&S",
    "gmp": "Zhu and Gupta 2017",
    "granet": "Liu et al. 2021",
    "esml": "000, section 3.1",
    "cht": "000, section 3.2",
    "chts": "002",
    "chtss": "002",
}
"""where each method is defined; 000 and 002 are the papers of CHT and of CHTs"""


def preset(name: str, task: str) -> dict[str, Any]:
    """Every setting of a method as the papers have it in runs of ``task``; what removes no links goes on doing so."""
    row = PRESETS[name]
    other = TASKS[task] if name != "dense" else {}
    return row | {key: value for key, value in other.items() if key != "zeta" or row["zeta"] > 0}


def overview() -> list[tuple[str, ...]]:
    """A head and a line for each method: what ``llm-cht methods`` prints."""
    head = ("method", "first links", "removal", "regrowth", "density", "besides", "defined by")
    dense = ("dense", "all", "-", "-", "1", "", SOURCES["dense"])
    rows = ((name, *_summary(row), SOURCES[name]) for name, row in PRESETS.items() if name != "dense")
    return [head, dense, *rows]


def _summary(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    evolves = row["zeta"] > 0 or row["density"] == "em_s"
    share = "down to the target" if row["density"] == "em_s" else f"{row['zeta']:.0%} {row['zeta_schedule']}"
    removal = f"{row['removal']} {row['removal_choice']}, {share}" if evolves else "-"
    regrowth = f"{row['regrowth']} {row['regrowth_choice']}" if evolves else "-"
    decays = row["density"] not in ("constant", "em_s")
    besides = {
        "percolation": row["percolate"],
        f"pruning by {row['pruning'].replace('_', ' ')}": decays,
        "pruned links can come back": row["pruning_memory"],
        "new links keep their last weight": row["new_weight"] == "history" and evolves,
        f"weights {row['initial_weight']}": row["initial_weight"] != "keep",
        f"a layer stops at overlap {row['early_stop']}": row["early_stop"] > 0,
        "half window": row["half_window"],
    }
    density = f"{row['density']} from {1 - row['start_sparsity']}" if decays else row["density"]
    return (row["initial"], removal, regrowth, density, ", ".join(name for name, is_on in besides.items() if is_on))
