"""``eval/scores.py`` against scikit-learn, a bootstrap document by document, and cases by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, matthews_corrcoef

from eval.scores import accuracy_and_mcc, balance, score


def figures(labels: np.ndarray, predictions: np.ndarray, classes: int) -> tuple[float, float]:
    """Accuracy and Matthews correlation, each document counted once."""
    accuracies, mccs = accuracy_and_mcc(np.ones((1, len(labels)), dtype=int), labels, predictions, classes)
    return accuracies.item(), mccs.item()


@st.composite
def labelled(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    classes, number = draw(st.integers(2, 5)), draw(st.integers(1, 60))
    labels = st.lists(st.integers(0, classes - 1), min_size=number, max_size=number)
    constant = st.integers(0, classes - 1).map(lambda label: [label] * number)
    return classes, np.array(draw(labels | constant)), np.array(draw(labels | constant))


@given(labelled())
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_figures_are_those_of_scikit_learn(drawn: tuple[int, np.ndarray, np.ndarray]):
    classes, labels, predictions = drawn
    accuracy, mcc = figures(labels, predictions, classes)
    assert mcc == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)
    assert accuracy == pytest.approx(accuracy_score(labels, predictions))
    if len(set(labels)) == 1 or len(set(predictions)) == 1:
        assert mcc == 0


def test_a_confusion_matrix_by_hand():
    accuracy, mcc = figures(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]), 2)  # [[1, 1], [1, 2]]
    assert accuracy == 0.6
    assert mcc == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_counts_stand_for_so_many_documents():
    labels, predictions, counts = np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([[3, 1, 2], [10**7, 0, 10**7]])
    accuracies, mccs = accuracy_and_mcc(counts, labels, predictions, 2)
    assert (accuracies[0], mccs[0]) == pytest.approx(
        figures(np.repeat(labels, counts[0]), np.repeat(predictions, counts[0]), 2)
    )
    assert (accuracies[1], mccs[1]) == (1, 1)


def test_balance_is_the_share_of_each_class():
    assert balance(np.array([[1, 1], [1, 0]]), 3) == [0.25, 0.75, 0]


@given(labelled(), st.integers(0, 3))
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_averages_over_seeds_are_those_of_each(drawn: tuple[int, np.ndarray, np.ndarray], seed: int):
    classes, labels, predictions = drawn
    both = np.stack([predictions, (predictions + 1) % classes])
    found = score(labels, both, classes, 20, seed)
    assert found.accuracy == pytest.approx(np.mean([accuracy_score(labels, row) for row in both]))
    assert found.mcc == pytest.approx(np.mean([matthews_corrcoef(labels, row) for row in both]), abs=1e-12)
    assert found == score(labels, both, classes, 20, seed)


@pytest.mark.parametrize("classes", [2, 3])
def test_errors_are_those_of_drawing_documents(classes: int):
    draw = np.random.default_rng(classes)
    labels = draw.choice(classes, 120, p=[0.7, *[0.3 / (classes - 1)] * (classes - 1)])
    predictions = np.where(draw.random((2, 120)) < 0.5, labels, draw.integers(classes, size=(2, 120)))
    found = score(labels, predictions, classes, 4000, 0)
    slow = []
    for _ in range(4000):
        chosen = draw.integers(120, size=120)
        slow.append(np.mean([figures(labels[chosen], row[chosen], classes) for row in predictions], axis=0))
    errors = np.std(slow, axis=0, ddof=1)
    assert [found.accuracy_error, found.mcc_error] == pytest.approx(errors, rel=0.06)
    assert score(labels, predictions, classes, 100, 1) != score(labels, predictions, classes, 100, 2)


def test_a_constant_predictor_is_accurate_and_has_no_correlation():
    labels = np.repeat([0, 1], [30, 70])
    found = score(labels, np.ones((1, 100), dtype=int), 2, 1000, 0)
    assert (found.accuracy, found.mcc, found.mcc_error) == (0.7, 0, 0)
    assert found.accuracy_error == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.1)
