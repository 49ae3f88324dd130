"""Scores of classifications: accuracy, Matthews correlation, their standard errors, and the balance of labels.

The Matthews correlation is the multi-class one (Gorodkin, Comput. Biol. Chem. 28, 2004), which for two classes is
Matthews' own and is what ``sklearn.metrics.matthews_corrcoef`` computes. It is 0 by definition where either side has
one class only: a model that says one label to everything has accuracy, and no correlation.

A bootstrap draws as many documents as there are, with replacement. What a draw makes of the figures depends only on how
often each combination of label and predictions was drawn, which is multinomial: so the counts of a few combinations are
drawn instead of the numbers of thousands of documents, with the same distribution. Rejected: scikit-learn in the
program (one figure a call, no error), and lm-eval's own errors (none over seeds, and a process pool for the others).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Figures of one model on one task, in fractions; means over the seeds, and errors of those means."""

    accuracy: float
    accuracy_error: float
    accuracy_seeds: list[float]
    mcc: float
    mcc_error: float
    mcc_seeds: list[float]


def accuracy_and_mcc(
    counts_BU: Numbers, labels_U: Numbers, predictions_U: Numbers, num_classes: int
) -> tuple[Floats, Floats]:
    """Accuracy and Matthews correlation (B,) of B multisets of documents: counts of each (label, prediction)."""
    exact_BU = counts_BU.astype(np.float64)  # as are the squares below, for less than 94 million documents
    one_hot_KK = np.eye(num_classes)
    total_B, right_B = exact_BU.sum(1), exact_BU @ (labels_U == predictions_U)
    labels_BK, predictions_BK = exact_BU @ one_hot_KK[labels_U], exact_BU @ one_hot_KK[predictions_U]
    covariance_B = right_B * total_B - (labels_BK * predictions_BK).sum(1)
    labels_B = total_B**2 - (labels_BK**2).sum(1)
    predictions_B = total_B**2 - (predictions_BK**2).sum(1)
    deviations_B = np.sqrt(labels_B) * np.sqrt(predictions_B)
    mcc_B = np.divide(covariance_B, deviations_B, out=np.zeros_like(covariance_B), where=deviations_B > 0)
    return right_B / total_B, mcc_B


def balance(labels: Numbers, num_classes: int) -> list[float]:
    """Share of each class among labels or predictions of any shape; sums to 1."""
    counts = np.bincount(np.asarray(labels).ravel(), minlength=num_classes)
    return (counts / counts.sum()).tolist()


def score(labels_N: Numbers, predictions_SN: Numbers, num_classes: int, resamples: int, seed: int) -> Scores:
    """Figures of predictions (seeds, documents), averaged over the seeds, with bootstrap errors of the averages.

    A resample draws documents, the same ones for all seeds; its errors say how much the average would vary over other
    documents, not over other seeds. At least two resamples.
    """
    rows, counts_U = np.unique(np.vstack([labels_N, predictions_SN]), axis=1, return_counts=True)
    drawn_BU = np.random.default_rng(seed).multinomial(counts_U.sum(), counts_U / counts_U.sum(), size=resamples)
    of_all, of_drawn = (
        np.array([accuracy_and_mcc(counts_BU, rows[0], row, num_classes) for row in rows[1:]])  # (seeds, 2, B)
        for counts_BU in (counts_U[None], drawn_BU)
    )
    errors = of_drawn.mean(0).std(1, ddof=1).tolist()
    accuracies, mccs = of_all[:, 0, 0], of_all[:, 1, 0]
    return Scores(
        *(float(accuracies.mean()), errors[0], accuracies.tolist()),
        *(float(mccs.mean()), errors[1], mccs.tolist()),
    )
