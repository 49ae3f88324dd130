"""The settings of a method: every key that a preset may set and a user may override.

Apart from the code that runs them, because they are what a researcher reads. A rule is chosen by the name of its row
in the table of the module that owns it: plain strings, checked against those tables, so that a new rule needs no edit
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class MethodSettings:
    """How the topology starts and evolves; null means: as the preset says."""

    preset: str = "chts"
    """Row of defaults for every setting below (`llm-cht methods`): dense, static, set, rigl, snfs, mest, gmp, granet,
    esml, cht, chts, chtss; dense has no topology, and refuses settings of one."""
    sparsity: float = 0.9
    """Fraction of missing links at the end, in [0, 1)."""
    update_interval: int = 100
    """Optimizer steps between topology updates."""
    end_step: int | None = None
    """Last step with removal and regrowth; null: 0.75 of the run."""
    initial: str | None = None
    """First links: er, brf, bsw, bsf (random graphs), csti (from calibration samples), file (of a finished run), or
    checkpoint (the model's own strongest weights, by the score of `pruning`)."""
    initial_path: str | None = None
    """For file: RUN/model, or another folder with topology.safetensors."""
    brf_r: float | None = None
    """Spatial randomness of brf, 0 (nearest inputs) to 1 (uniform)."""
    brf_degree: Literal["fixed", "uniform"] | None = None
    """Degrees of the output neurons under brf."""
    bsw_beta: float | None = None
    """Fraction of links that bsw rewires, 0 to 1 (uniform)."""
    bsf_equal_partition: bool | None = None
    """Level the degrees of the inputs under bsf, in the layers that see the input of the model."""
    bsf_resort: bool | None = None
    """Sort neurons by degree under bsf, so that hubs meet hubs in the next layer."""
    csti_inner: bool | None = None
    """csti in every layer; else only in those that see the input of the model, and er in the others."""
    calibration_sequences: int = 64
    """Training sequences that csti looks at."""
    initial_weight: str | None = None
    """First weights: keep (the model's own), swi and kaiming (normal, for the density or not), or scaled (its own over
    sqrt(density))."""
    initial_gain: float | None = None
    """Gain of swi and kaiming: sqrt(2) after ReLU, 1 after a norm."""
    budget: Literal["uniform", "er", "erk", "kept"] | None = None
    """How links are shared out between layers; kept: every layer keeps the number that a file gave it."""
    repair: bool | None = None
    """Move one link to every neuron that starts without any."""
    removal: str | None = None
    """Score by which links are kept: magnitude, relative_importance, general, mest, snip, sensitivity,
    reciprocal_sensitivity, two_sided, random."""
    removal_alpha: float | None = None
    """Of the general score: 1 is the magnitude, 0 half the relative importance."""
    removal_choice: Literal["hard", "soft"] | None = None
    """hard: the best stay; soft: sampled by score ** temperature."""
    temperature_start: float | None = None
    """Exponent of soft removal at step 0."""
    temperature_end: float | None = None
    """Exponent of soft removal at end_step."""
    interpolate: Literal["temperature", "delta"] | None = None
    """What runs linearly from start to end: T, or delta with T = delta / (1 - delta)."""
    zeta: float | None = None
    """Fraction of a layer's links removed at one update, in [0, 1)."""
    zeta_schedule: Literal["constant", "cosine"] | None = None
    """cosine: falls to 0 at end_step."""
    regrowth: str | None = None
    """Link predictor: random, preferential (by degrees; choose soft), gradient, momentum, cn_l3, ch2_l3n, ch3_l3n,
    ch2_l3p, ch3_l3p."""
    regrowth_from: dict[int, str] | None = None
    """Other link predictors from later steps on, e.g. {2000: gradient}."""
    regrowth_choice: Literal["hard", "soft"] | None = None
    """hard: the best missing links; soft: sampled."""
    regrowth_delta: float | None = None
    """Soft regrowth samples by score ** (delta / (1 - delta)), in [0, 1)."""
    ties: Literal["random", "subrank"] | None = None
    """Order of missing links with equal scores: random, or by the paths between their neurons (000 App. N; slow)."""
    momentum_beta: float | None = None
    """Decay of the average gradient under momentum."""
    density: str | None = None
    """Density over time, from 1 - start_sparsity to 1 - sparsity: constant, linear, cubic, sigmoid, em_s (MEST's two
    stages), or table."""
    density_table: dict[int, float] | None = None
    """Sparsity from each step on, e.g. {0: 0.5, 1000: 0.7, 3000: 0.9}."""
    start_sparsity: float | None = None
    """Sparsity at the start of a decaying density."""
    density_start_step: int | None = None
    """Start of the density window."""
    density_end_step: int | None = None
    """End of the density window; null: end_step."""
    half_window: bool | None = None
    """Halve the density window, so that sigmoid and cubic decay cost equal FLOPs (002 App. I)."""
    pruning: str | None = None
    """Score of the links that density decay keeps: magnitude or relative_importance, or a removal score without a
    gradient."""
    pruning_memory: bool | None = None
    """Pruned links compete with their remembered weights and can come back (GMP)."""
    pruning_scope: Literal["layer", "global"] | None = None
    """global: density decay compares the links of all layers; the density of each then finds itself."""
    percolate: bool | None = None
    """Remove links that cannot carry signal."""
    percolate_bias: Literal["exact", "paper"] | None = None
    """exact: a row with a bias is not empty; paper: biases are ignored."""
    qk_pairing: Literal["rotary", "position"] | None = None
    """Percolation unit of query and key: the model's rotary pair, or row by row as in 002 App. F (changes logits)."""
    dead_heads: bool | None = None
    """A head whose values reach no output loses its queries and keys too."""
    per_head: bool | None = None
    """Removal, link prediction and regrowth work on the rows of each head of query, key and value apart."""
    new_weight: Literal["zero", "history", "init"] | None = None
    """First weight of a link that did not exist before the update."""
    early_stop: float | None = None
    """A layer stops to evolve when this share of its regrown links was just removed; 0: never."""
    force: bool = False
    """Run link predictors on layers where they take minutes."""
    workspace_mb: int = 256
    """Bound on the temporaries of a link score, in MiB."""
