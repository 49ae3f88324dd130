import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from llm_cht.errors import UserError
from llm_cht.report import page
from llm_cht.report.page import write_report
from tests.report.synthetic_run import SMALL, make_run

ALWAYS = ["learning", "rate", "cost", "config", "versions"]
SPARSE = ["density", "exploration", "degrees", "masks"]


class Outline(HTMLParser):
    """Anchors, images, links and text of a page; every tag must be closed."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def pictures(self):
        return [base64.b64decode(a.partition(",")[2]).decode() for a in self.addresses if a.startswith("data:")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Pages by (preset, ended), each rendered once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def render(preset, ended=True):
        key = f"{preset}-{'ended' if ended else 'going'}"
        if key not in made:
            path = write_report(make_run(folder / key, preset, ended))
            made[key] = path.read_text(encoding="utf-8")
        return made[key]

    return render


@pytest.mark.parametrize("preset", ["chtss", "static", "dense"])
def test_page_is_self_contained(report, preset):
    text = report(preset)
    outline = Outline(text)
    assert outline.addresses
    assert all(address.startswith(("data:", "#")) for address in outline.addresses)
    assert not re.search(r"url\(|@import|<script|<link", text)
    for picture in outline.pictures:
        ET.fromstring(picture)
        assert set(re.findall(r'(?:href|src)="([^"]{5})', picture)) <= {"data:"} | set(
            re.findall(r'href="(#[^"]{4})', picture)
        )
        assert set(re.findall(r"url\((.)", picture)) <= {"#"}


def test_sparse_page_has_all_sections_and_pictures(report):
    outline = Outline(report("chtss"))
    assert set(outline.ids) == {*ALWAYS, *SPARSE}
    assert {f"#{key}" for key in outline.ids} <= set(outline.addresses)  # the line of contents
    assert len(outline.pictures) == 9
    text = "".join(outline.pictures)
    for words in ("ITOP rate", "ANP", "ELM overlap", "percolated", "unigram model 812.4", "down at the end"):
        assert words in text
    for kind in ("q", "k", "v", "o", "gate", "up", "down"):
        assert f"{kind}, outputs" in text
        assert f"{kind}, inputs" in text


def test_headline_figures_of_a_run_counted_by_hand(report):
    text = " ".join(" ".join(Outline(report("chts")).texts).split())
    assert "Unigram perplexity 812.4" in text
    assert "Density 10 % sparsity 90 %" in text
    assert "Average density 10 % over all steps" in text
    assert "400 steps, 52.4 M tokens" in text
    assert "Time 9 min 08 s" in text  # 400 * 1.37 s


def test_links_moved_leaves_out_links_that_came_back(tmp_path):
    records = page.load(make_run(tmp_path / "run", "chts"))
    update = {"regrown": 100, "overlap": 0.25}
    moved = page.RunRecords(**{**vars(records), "topology": [update, update | {"overlap": 1.0}]})
    figures = {figure.label: figure for figure in page.headlines(moved)}
    assert figures["Links moved"].value == "75"


def test_dense_page_says_why_there_is_no_topology(report):
    outline = Outline(report("dense"))
    assert set(outline.ids) == {*ALWAYS, "topology"}
    assert page._DENSE in outline.texts
    assert not any("ITOP" in picture for picture in outline.pictures)


def test_static_page_shows_the_topology_without_updates(report):
    outline = Outline(report("static"))
    assert set(outline.ids) == {*ALWAYS, *SPARSE}
    assert page._STILL in outline.texts
    assert "100.0 %" in "".join(outline.texts)  # first links kept


def test_unfinished_page_says_so_and_shows_the_start(report):
    outline = Outline(report("chtss", ended=False))
    text = " ".join(outline.texts)
    assert "This run has not ended" in text
    assert "step 240" in text
    assert "not yet" in text  # the unigram perplexity
    assert "q at the start" in "".join(outline.pictures)
    assert "at the end" not in "".join(outline.pictures)


def test_torn_last_line_and_first_records_alone_are_enough(tmp_path):
    run = make_run(tmp_path / "run", ended=False)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first_train = next(number for number, line in enumerate(lines) if json.loads(line)["kind"] == "train")
    path.write_text("".join(lines[: first_train + 1]) + '{"kind": "tra')
    assert "This run has not ended" in write_report(run).read_text()


def test_null_figures_leave_gaps(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    gaps = {"train": ("loss", "grad_norm"), "topology": ("overlap",), "validation": ("perplexity", "loss")}
    for kind, names in gaps.items():
        record = next(record for record in records if record["kind"] == kind)
        record |= dict.fromkeys(names)
    next(record for record in reversed(records) if record["kind"] == "validation")["perplexity"] = None
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "not finite" in write_report(run).read_text()


def test_config_is_escaped_and_collapsed(report):
    text = report("chtss")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert re.search(r"<details><summary>.*?</summary><pre>", text, flags=re.DOTALL)


def test_same_run_gives_the_same_page(tmp_path):
    run = make_run(tmp_path / "run", "dense")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", "dense")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for content in ("", lines[0]):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match="no training record yet"):
            write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_what_a_finished_run_has_lost_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    for stem, remedy in (
        ("model/topology.json", rf"`llm-cht train {run}/config.yaml --resume auto` writes it again"),
        ("topology_start.safetensors", "put back a copy"),
        ("metrics.jsonl", "a run that has trained: put back a copy"),
    ):
        content = (run / stem).read_bytes()
        (run / stem).unlink()
        with pytest.raises(UserError, match=f"{run / stem}.*{remedy}"):
            write_report(run)
        (run / stem).write_bytes(content)
    (run / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"metrics\.jsonl.* a run that has trained: put back a copy"):
        write_report(run)


@pytest.mark.parametrize("line", ["[1]", "3", "{}", '{"kind": [1], "step": 1, "seconds": 1}', '{"kind": "train"}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4 is no record of a run: remove that line"):
        write_report(run)


def test_page_that_cannot_be_written_is_one_clear_error(tmp_path):
    run = make_run(tmp_path / "run", "dense")
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_report(run)


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10 s"), (312, "5 min 12 s"), (25_380, "7 h 03 min")])
def test_durations_read_well(seconds, text):
    assert page._duration(seconds) == text


def test_page_is_small_enough_to_mail(report):
    assert SMALL.blocks == 2
    assert len(report("chtss")) < 2_000_000
