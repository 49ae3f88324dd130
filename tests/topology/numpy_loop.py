"""Path rules the plain way: an outer product for every link, in numpy. What the tests and ``eval`` compare with."""

import numpy as np
from numpy.typing import NDArray


def path_scores_by_loop(mask_OI: NDArray[np.bool_], rule: str = "ch3") -> NDArray[np.float32]:
    """CH3-L3p or CH2-L3p (``rule`` "ch3", "ch2"), fp32 (out, in)."""
    links = mask_OI.astype(np.float32)
    p, q = _weights(links, rule), _weights(links.T, rule)
    outputs_of = [np.flatnonzero(column) for column in mask_OI.T]
    score = np.zeros_like(links)
    for z1, inputs in enumerate(np.flatnonzero(row) for row in mask_OI):
        for z2 in inputs:
            outputs = outputs_of[z2]
            score[np.ix_(outputs, inputs)] += np.outer(p[outputs, z1], q[inputs, z2])
    score[mask_OI] = 0
    return score


def _weights(links_UV: NDArray[np.float32], rule: str) -> NDArray[np.float32]:
    """P[u, z]: (d_z - UU[u, z])**-1/2, 0 where the difference is 0; CH2 times (1 + UU[u, z])**1/2."""
    common = links_UV @ links_UV.T
    others = links_UV.sum(axis=1) - common
    weights = np.divide(1, np.sqrt(others), out=np.zeros_like(others), where=others > 0)
    return weights * np.sqrt(1 + common) if rule == "ch2" else weights
