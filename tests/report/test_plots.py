import numpy as np
import pytest

from llm_cht.report import plots
from tests.report.synthetic_run import Shape, make_records


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (999_900, "1 M"), (1_234_000, "1.23 M"), (5.1e9, "5.1 G")],
)
def test_compact_numbers(value, text):
    assert plots.compact(value) == text


def test_moving_mean_skips_gaps_and_follows_the_start():
    values = np.array([4.0, 2.0, np.nan, 6.0, 8.0])
    assert plots._smooth(values, 3).tolist() == [4.0, 3.0, 4.0, 7.0, 7.0]
    assert np.isnan(plots._smooth(np.array([np.nan]), 1)).all()


def test_columns_turn_null_and_absent_into_gaps():
    column = plots.column([{"a": 1}, {"a": None}, {}], "a")
    assert column[0] == 1
    assert np.isnan(column[1:]).all()


def test_attention_and_mlp_have_colours_of_their_own():
    colours = plots.kind_colours(["q", "k", "v", "o", "gate", "up", "down"])
    assert len(set(colours.values())) == 7
    assert [colours[kind] for kind in "qkvo"] == list(plots.ATTENTION_COLOURS)
    assert colours["gate"] == plots.MLP_COLOURS[0]


def test_log_limits_hold_the_values_with_room():
    low, high = plots._log_limits([30.0, 32.0, float("nan")])
    assert low < 30 < 32 < high
    assert high / low >= 3
    assert plots._log_limits([]) == pytest.approx(plots._log_limits([1.0]))


def test_one_update_and_one_record_can_be_drawn():
    records = make_records("chts", True, Shape(steps=40, interval=20), {"model.layers.0.self_attn.q_proj": (8, 8)})
    train = [record for record in records if record["kind"] == "train"][:1]
    topology = [record for record in records if record["kind"] == "topology"][:1]
    validation = [record for record in records if record["kind"] == "validation"]
    for svg in (
        plots.learning(train, validation[:1], topology, None),
        plots.learning(train, [], [], 100.0),
        plots.learning_rate(train, topology),
        plots.density(train, topology),
        plots.exploration(topology),
        plots.moved(topology),
        plots.cost(train, topology),
    ):
        assert svg.startswith("<?xml")
