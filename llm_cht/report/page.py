"""One self-contained page about a run: what it reached, what its topology did, what it cost, how it was set.

``page.html.jinja`` beside this file holds the layout; the figures are SVG in data URIs, so that the page can be
mailed, printed and opened without a network. Everything comes from the run folder, hence a page can be made while the
run goes on, and again later. Rejected: a notebook (needs a kernel to be read), TensorBoard alone (has no masks, and
nothing to hand on).
"""

import base64
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import llm_cht
from llm_cht.errors import UserError
from llm_cht.files import write_whole
from llm_cht.report import networks, plots
from llm_cht.report.networks import KindRow
from llm_cht.report.plots import compact
from llm_cht.sparse.folder import Topology, read_topology
from llm_cht.train.metrics import FILE_NAME, read_metrics

Record = Mapping[str, Any]

_DENSE = "This run is dense: no layer has missing links, so there are no pictures of a topology."
_STILL = "There has been no topology update, so nothing is shown of exploration and of moved links."


@dataclass(frozen=True)
class RunRecords:
    """What a run folder holds, read once."""

    name: str
    config: str
    start: Record
    train: list[Record]
    topology: list[Record]
    validation: list[Record]
    end: Record | None  # None: the run has not ended
    first_links: Topology | None  # None: dense
    last_links: Topology | None  # None: dense, or the run has not ended


@dataclass(frozen=True)
class Picture:
    """An SVG and the sentences under it."""

    svg: str
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """The SVG as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str  # the anchor
    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    kinds: list[KindRow] = field(default_factory=list)


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top."""

    label: str
    value: str
    note: str


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html`` from what the run folder holds, and return its path; a page already there is replaced.

    A run that has not ended gives a page of what there is. Raises ``UserError`` if the folder holds no run, no training
    record yet, or damaged files.
    """
    records = load(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        run=records,
        version=llm_cht.__version__,
        preset=_preset(records),
        headlines=headlines(records),
        sections=sections(records),
        last_step=records.train[-1]["step"],
        compact=compact,
    )
    path = run / "report.html"
    try:
        write_whole(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make the folder writable or free space") from error
    return path


def load(run: Path) -> RunRecords:
    """Read the run folder; raises ``UserError`` as ``write_report`` does."""
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} has no config.yaml: give the folder of a run")
    kinds: dict[str, list[Record]] = {"start": [], "train": [], "topology": [], "validation": [], "end": []}
    trained = any((run / name).exists() for name in ("model", "checkpoints"))
    for record in read_metrics(run / FILE_NAME) if (run / FILE_NAME).exists() or not trained else ():
        kinds.setdefault(record["kind"], []).append(record)
    if not kinds["start"] or not kinds["train"]:
        if trained:
            raise UserError(f"{run / FILE_NAME} lacks the records of a run that has trained: put back a copy of it")
        raise UserError(f"{run / FILE_NAME} has no training record yet: wait for the first ones and try again")
    sparse = bool(kinds["start"][-1]["layers"])
    ended = bool(kinds["end"])
    return RunRecords(
        name=run.resolve().name,
        config=config.read_text(encoding="utf-8"),
        start=kinds["start"][-1],
        train=kinds["train"],
        topology=kinds["topology"],
        validation=kinds["validation"],
        end=kinds["end"][-1] if ended else None,
        first_links=_links(run, run, "topology_start") if sparse else None,
        last_links=_links(run, run / "model", "topology") if sparse and ended else None,
    )


def _links(run: Path, folder: Path, stem: str) -> Topology:
    if lost := [path for path in (folder / f"{stem}.json", folder / f"{stem}.safetensors") if not path.is_file()]:
        again = f"`llm-cht train {run / 'config.yaml'} --resume auto` writes it again"
        raise UserError(f"{lost[0]} is missing: {again if stem == 'topology' else 'put back a copy of it'}")
    return read_topology(folder, stem)


def headlines(run: RunRecords) -> list[Headline]:
    """The figures at the top of the page; "not yet" where the run has none so far."""
    last = run.train[-1]
    figures = [Headline("Validation perplexity", _perplexity(run), "all of it" if run.end else "the latest")]
    if _translates(run):
        figures = _bleu_headlines(run) + figures
    else:
        figures.append(Headline("Unigram perplexity", _number(_unigram(run)), "knows token counts only"))
    if run.first_links is not None:
        figures += _sparse_headlines(run)
    else:
        figures.append(Headline("Parameters", compact(run.start["parameters"]), "dense"))
    if "flops" in last:  # runs of older versions counted none
        ended = run.end["summary"] if run.end else {}
        share = f"{ended['flops_relative']:.2f} of the dense model's" if ended else "so far, missing links not counted"
        figures.append(Headline("FLOPs", f"{last['flops']:.2g}", share))
    seconds = (run.end or last)["seconds"]
    speed = statistics.median(record["tokens_per_second"] for record in run.train)
    return [
        *figures,
        Headline("Time", _duration(seconds), f"{last['step']:,} steps, {compact(last['tokens'])} tokens"),
        Headline("Tokens per second", compact(speed), "median"),
    ]


def _number(value: float | None) -> str:
    return "not yet" if value is None else f"{value:,.4g}"


def _perplexity(run: RunRecords) -> str:
    if not run.validation:
        return _number(None)
    value = run.validation[-1]["perplexity"]
    return "not finite" if value is None else _number(value)


def _unigram(run: RunRecords) -> float | None:
    return None if run.end is None else run.end["summary"].get("unigram_perplexity")


def _translates(run: RunRecords) -> bool:
    return any("bleu" in record for record in run.validation)


def _bleu_headlines(run: RunRecords) -> list[Headline]:
    if run.end is None:
        return [Headline("BLEU", _number(run.validation[-1]["bleu"]), "validation, the latest")]
    end = run.end["summary"]
    return [
        Headline(f"BLEU, {where}", f"{end[f'{name}bleu']:.2f}", f"copying the source: {end[f'{name}copy_bleu']:.2f}")
        for name, where in (("", "validation"), ("test_", "test"))
        if f"{name}bleu" in end
    ]


def _sparse_headlines(run: RunRecords) -> list[Headline]:
    last = run.train[-1]
    density, parameters, positions = last["density"], run.start["parameters"], run.start["sparse_parameters"]
    moved = sum(record["regrown"] * (1 - (record["overlap"] or 0)) for record in run.topology)
    links = density * positions
    return [
        Headline("Density", f"{100 * density:.3g} %", f"sparsity {100 - 100 * density:.4g} %"),
        Headline("Average density", f"{100 * last['average_density']:.3g} %", "over all steps"),
        Headline("Links moved", compact(moved), f"{moved / links:.2g} times the links of the model"),
        Headline("Parameters", compact(parameters - positions + links), f"not zero, of {compact(parameters)}"),
    ]


def _preset(run: RunRecords) -> str:
    return "dense" if run.first_links is None else run.first_links.preset


def _duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 5 min 12 s, 7 h 03 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def sections(run: RunRecords) -> list[Section]:
    """The parts of the page, in order; those of the topology only where there is one."""
    if run.first_links is None:
        return [_learning(run), _rate(run), Section("topology", "Topology", _DENSE), _cost(run)]
    evolution = [_exploration(run)] if run.topology else [Section("exploration", "Exploration", _STILL)]
    return [_learning(run), _rate(run), _density(run), *evolution, *_networks(run), _cost(run)]


def _learning(run: RunRecords) -> Section:
    unigram = _unigram(run)
    caption = (
        "Left: mean loss of the training batches and its moving mean. Next: perplexity of held-out text, lower is "
        "better; equal distances are equal ratios."
    )
    if _translates(run):
        caption += " Right: BLEU of the validation sentences by beam search, higher is better."
    if unigram is not None:
        caption += " The red line is a model that knows nothing but how frequent each token is."
    if run.topology:
        caption += " Dotted: the last topology update."
    svg = plots.learning(run.train, run.validation, run.topology, unigram)
    return Section("learning", "Learning", pictures=[Picture(svg, "Training loss and validation perplexity", caption)])


def _rate(run: RunRecords) -> Section:
    if run.topology:
        caption = (
            "After each topology update the learning rate starts again from a fraction and climbs back within a few "
            "steps, so that new links, whose optimizer moments are 0, take no oversized first steps. Right: the shaded "
            "stretch, one dot per record (between two records the rate may lie lower); dotted: topology updates."
        )
    else:
        caption = "There has been no topology update, hence no re-warm-up."
    svg = plots.learning_rate(run.train, run.topology)
    return Section("rate", "Learning rate", pictures=[Picture(svg, "Learning rate over the steps", caption)])


def _density(run: RunRecords) -> Section:
    caption = (
        "Share of the positions of the sparse layers that hold a link. The average over the steps so far is what "
        "counts when methods are compared at equal compute."
    )
    picture = Picture(plots.density(run.train, run.topology), "Density over the steps", caption)
    return Section("density", "Density", pictures=[picture])


def _exploration(run: RunRecords) -> Section:
    measures = Picture(
        plots.exploration(run.topology),
        "ITOP, active neurons and overlap over the steps",
        "ITOP: share of all positions that have held a link at any time so far. ANP: share of the neurons that can "
        "still pass a signal; the others have lost all inputs or all outputs. ELM overlap: share of the regrown links "
        "that the same update had just taken away; near 100 % the topology has settled.",
    )
    moved = Picture(
        plots.moved(run.topology),
        "Links gained and lost at each update",
        "Up: links regrown. Down: links removed for their low score, percolated because a neuron at one of their ends "
        "could pass no signal, or pruned to lower the density. At constant density both sides are equal.",
    )
    return Section("exploration", "Exploration", pictures=[measures, moved])


def _networks(run: RunRecords) -> list[Section]:
    assert run.first_links is not None
    start = run.first_links.masks_OI
    end = None if run.last_links is None else run.last_links.masks_OI
    colours = (
        "Grey: start, its peak cut where a number says so; blue line: end."
        if end is not None
        else "The run has not ended: only its start is shown."
    )
    outputs = Picture(
        networks.degrees(start, end, "outputs"),
        "Degree distributions of output neurons",
        f"How many links an output neuron has, by layer kind, the layers of a kind pooled. {colours}",
    )
    inputs = Picture(
        networks.degrees(start, end, "inputs"),
        "Degree distributions of input neurons",
        "The same for input neurons. A tail to the right is hubs: neurons that gather many links.",
    )
    pictured = ", ".join(networks.pictured_layers(start))
    masks = Picture(
        networks.mask_images(start, end),
        "Masks as images",
        f"Each picture is one mask, stretched to a square of at most {networks.IMAGE_SIDE} x {networks.IMAGE_SIDE} "
        "cells; the shade of a cell is the share of its positions that hold a link. An even tone is links spread at "
        "random, a diagonal band is receptive fields, stripes are hubs and neurons that lost their links. "
        f"Layers: {pictured}.",
    )
    return [
        Section("degrees", "Degrees", pictures=[outputs, inputs], kinds=networks.kind_table(start, end)),
        Section("masks", "Masks", pictures=[masks]),
    ]


def _cost(run: RunRecords) -> Section:
    where = "the GPU's allocator" if "cuda" in run.start["device"] else "the process (resident set)"
    caption = f"Speed over the steps between two records. Peak memory so far of {where}."
    if run.topology:
        caption += " The third picture is the time that each topology update took."
    known = [record["mfu"] for record in run.train if "mfu" in record]
    if known:
        caption += f" Model FLOPs utilisation: {100 * statistics.median(known):.3g} % of the device's peak (median)."
    svg = plots.cost(run.train, run.topology)
    return Section("cost", "Time and memory", pictures=[Picture(svg, "Speed, memory and update time", caption)])
