"""What a sweep shows: each setting over its seeds, and the values of one factor against each other.

A pair is two runs that agree in every factor but the compared one, and in the seed. The test is Wilcoxon's signed-rank
test (Biometrics Bulletin 1, 1945) on the differences of the pairs: it asks nothing of their distribution, and settings
of different difficulty may stand together. Rejected: a test of the unpaired means, which the spread between settings
would drown; bold type for the best mean, which says more than a few seeds can.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_cht.errors import UserError
from llm_cht.files import disk_errors, write_whole
from llm_cht.sweep.run import KEPT, Records, check_folders, is_finished, load_records
from llm_cht.sweep.settings import Run, Setting, Sweep, text

TABLE = "table.md"

MIN_PAIRS = 6
"""With fewer, all in one direction, the two-sided p is 2 / 2**5 = 0.0625 or more."""

_FIGURES = {
    "average_density": "average density",
    "flops": "training FLOPs",
    "flops_relative": "relative FLOPs",
    "seconds": "seconds",
}
"""key of a summary -> title of its column, which is there if a run has the key"""


class Result(NamedTuple):
    """The metric of one run."""

    run: str
    """its name"""
    value: float


Block = dict[str, Result]
"""The runs that agree in everything but the compared factor: value of that factor -> run."""


def write_table(sweep: Sweep, runs: Sequence[Run]) -> str:
    """Write FOLDER/table.md; what stands in it.

    Raises:
        UserError: no run has finished, or what lies in the folder is not of this sweep.
    """
    records = load_records(sweep.folder)
    check_folders(runs, records)
    if not any(is_finished(run, records) for run in runs):
        raise UserError(f"no run of {sweep.file} has finished in {sweep.folder}; start it without `--table`")
    table = summarise(sweep, runs, records)
    with disk_errors(sweep.folder / TABLE, len(table), KEPT):
        write_whole(sweep.folder / TABLE, table)
    return table


def summarise(sweep: Sweep, runs: Sequence[Run], records: Records) -> str:
    """The tables of a sweep as Markdown, of the runs that have finished."""
    finished = {run.name: records[run.name]["summary"] for run in runs if is_finished(run, records)}
    better = "higher" if sweep.higher else "lower"
    lines = [
        f"# {sweep.folder.name}: {len(finished)} of {len(runs)} runs",
        "",
        *_settings_table(sweep, runs, finished),
        "",
        f"{sweep.metric}: mean over seeds ± its standard error; {better} is better. The other figures are means.",
    ]
    odd = [name for name, summary in finished.items() if summary.get(sweep.metric) is None]
    if odd:
        lines.append(f"Left out, because their {sweep.metric} is not finite: {', '.join(odd)}.")
    if sweep.compare is not None:
        results = {name: Result(name, s[sweep.metric]) for name, s in finished.items() if name not in odd}
        lines += ["", *_comparison(sweep, runs, blocks(sweep, runs, results))]
    return "\n".join(lines) + "\n"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error (of the sample, n - 1); None for the error of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def blocks(sweep: Sweep, runs: Sequence[Run], results: Mapping[str, Result]) -> list[Block]:
    """All sets of runs that agree in every factor but the compared one, and in the seed.

    A run whose case sets a key of the grid itself is compared with the others at each value of that key, so it may
    stand in several blocks. A value whose run has no result is missing in the block.
    """
    assert sweep.compare is not None
    others: dict[str, list[str]] = {}
    for run in runs:
        for factor, value in run.setting.factors.items():
            if factor != sweep.compare and value not in others.setdefault(factor, []):
                others[factor].append(value)
    found: list[Block] = []
    for seed in sweep.seeds:
        here = [run for run in runs if run.settings.seed == seed and run.name in results]
        for values in itertools.product(*others.values()):
            at = dict(zip(others, values, strict=True)).items()
            block = {
                run.setting.factors[sweep.compare]: results[run.name]
                for run in here
                if {item for item in run.setting.factors.items() if item[0] != sweep.compare} <= set(at)
            }
            if block and block not in found:
                found.append(block)
    return found


def win_rates(found: Sequence[Block], values: Sequence[str], higher: bool) -> tuple[dict[str, float], int]:
    """Share of the complete blocks in which each value is best, ties split; and the number of complete blocks."""
    complete = [block for block in found if set(block) == set(values)]
    wins = dict.fromkeys(values, 0.0)
    for block in complete:
        best = (max if higher else min)(result.value for result in block.values())
        winners = [value for value, result in block.items() if result.value == best]
        for value in winners:
            wins[value] += 1 / len(winners)
    return {value: won / len(complete) if complete else math.nan for value, won in wins.items()}, len(complete)


def signed_rank(differences: Sequence[float]) -> tuple[float | None, int]:
    """Two-sided p of Wilcoxon's signed-rank test, None with fewer than ``MIN_PAIRS``; and the pairs that differ.

    Differences of 0 are left out, as Wilcoxon did. Exact up to 50 pairs (ties beyond 13 by the normal approximation).
    """
    nonzero = [difference for difference in differences if difference != 0]
    if len(nonzero) < MIN_PAIRS:
        return None, len(nonzero)
    from scipy.stats import wilcoxon  # here, because the import takes a second

    return float(wilcoxon(nonzero).pvalue), len(nonzero)


def _settings_table(sweep: Sweep, runs: Sequence[Run], finished: Mapping[str, dict[str, Any]]) -> list[str]:
    settings = {run.setting.name: run.setting for run in runs}
    factors = list(dict.fromkeys(factor for setting in settings.values() for factor in setting.factors))
    figures = [key for key in _FIGURES if any(summary.get(key) is not None for summary in finished.values())]
    titles = [_title(factor, factors) for factor in factors]
    rows = [[*titles, "runs", sweep.metric, *(_FIGURES[key] for key in figures)]]
    for name, setting in settings.items():
        all_runs = [run.name for run in runs if run.setting.name == name]
        summaries = [finished[run] for run in all_runs if run in finished]
        row = [_shown(setting, factor) for factor in factors]
        row += [f"{len(summaries)} of {len(all_runs)}", _with_error(summaries, sweep.metric)]
        row += [_mean(summaries, key) for key in figures]
        rows.append(row)
    return markdown(rows)


def _shown(setting: Setting, factor: str) -> str:
    """The value of a factor, or in brackets what the case sets instead."""
    return setting.factors.get(factor) or f"({text(setting.overrides[factor])})"


def _comparison(sweep: Sweep, runs: Sequence[Run], found: Sequence[Block]) -> list[str]:
    assert sweep.compare is not None
    assert sweep.reference is not None
    values = list(dict.fromkeys(run.setting.factors[sweep.compare] for run in runs))
    rates, complete = win_rates(found, values, sweep.higher)
    reference = sweep.reference
    rows = [[_title(sweep.compare, []), "win rate", f"mean difference to {reference}", "pairs", "p"]]
    shared = False
    for value in values:
        rate = f"{rates[value]:.0%}" if complete else "-"
        pairs = [(block[value], block[reference]) for block in found if value in block and reference in block]
        if value == reference:
            rows.append([value, rate, "reference", "", ""])
            continue
        differences = [one.value - other.value for one, other in pairs]
        p, differing = signed_rank(differences)
        few = f"- ({differing} differ; fewer than {MIN_PAIRS} cannot reach 0.05)"
        again = any(len({pair[side].run for pair in pairs}) < len(pairs) for side in (0, 1))
        shared |= again
        mean = f"{statistics.fmean(differences):+.4g}" if differences else "-"
        rows.append([value, rate, mean, f"{len(pairs)}{' *' if again else ''}", few if p is None else f"{p:.3g}"])
    left = f" ({len(found) - complete} more lack a run)" if len(found) > complete else ""
    notes = [
        f"Win rate: share of the {complete} comparisons{left} at equal other settings and seed in which it has the "
        f"best {sweep.metric}, ties split. p: Wilcoxon's signed-rank test of the pairs with {reference}, two-sided, "
        "not corrected for the number of tests.",
    ]
    if shared:
        notes.append("\\* One run stands in several pairs, so these are not independent, and p is too small.")
    return [*markdown(rows), "", *notes]


def _title(factor: str, factors: Sequence[str]) -> str:
    """The last word of a dotted name, unless another factor has the same."""
    word = factor.rpartition(".")[2]
    return factor if [other.rpartition(".")[2] for other in factors].count(word) > 1 else word


def _with_error(summaries: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [summary[metric] for summary in summaries if summary.get(metric) is not None]
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    if not error:
        return _number(mean) if error is None else f"{_number(mean)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _mean(summaries: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [summary[key] for summary in summaries if summary.get(key) is not None]
    return _number(statistics.fmean(values)) if values else "-"


def _number(value: float) -> str:
    return f"{value:.2f}" if 10 <= abs(value) < 1e6 else f"{value:.4g}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row is its head."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *body]
