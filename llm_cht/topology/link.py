"""Link predictors: how likely a missing link is to be grown, from the topology alone or from the dense gradient.

One signature, so that a method names its predictor as data: ``(mask_OI, gradient_OI, workspace_mb) -> score_OI``, fp32,
at least 0 and exactly 0 on existing links. The gradient, that of the dense weight, is None unless ``NEEDS_GRADIENT``
has the predictor; those in ``NEEDS_MOMENTUM`` get its average over the steps in the same place.

A layer is a bipartite graph. The Cannistraci-Hebb (CH) rules add up the paths of length three from an output to an
input: node rules (``node_rules``) weigh a path by one of its inner nodes, which makes them a few matrix products; path
rules (``path_rules``) by both, which costs as many FLOP as there are pairs of links.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from llm_cht.topology.node_rules import SPARSE_BELOW, node_scores
from llm_cht.topology.path_rules import PATHS_BELOW, path_scores

Predictor = Callable[[Tensor, Tensor | None, int], Tensor]


def random(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return 1 on every missing link (SET): all are equally likely."""
    return (~mask_OI).float()


def gradient(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the size of the loss's gradient by the missing link, averaged over ranks and micro-batches.

    The gradient of the last step (RigL), or an average of it over steps (momentum: SNFS; paper 003, eq. 10).
    """
    assert gradient_OI is not None, "the updater captures the gradient for predictors in NEEDS_GRADIENT"
    return gradient_OI.abs().masked_fill_(mask_OI, 0)


def preferential(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the product of the degrees of the two neurons (paper 000, App. M)."""
    links_OI = mask_OI.float()
    return (links_OI.sum(dim=1, keepdim=True) * links_OI.sum(dim=0)).masked_fill_(mask_OI, 0)


def cn_l3(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the number of paths of length three, A A^T A (paper 000, section 3.1)."""
    return node_scores(mask_OI, workspace_mb, "cn")


def ch2_l3n(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the CH2-L3n scores (paper 002, Algorithm 1), see ``node_scores``."""
    return node_scores(mask_OI, workspace_mb, "ch2")


def ch3_l3n(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the CH3-L3n scores: CH2-L3n with numerator 1."""
    return node_scores(mask_OI, workspace_mb, "ch3")


def ch2_l3p(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the CH2-L3p scores, see ``path_scores``."""
    return path_scores(mask_OI, workspace_mb, "ch2")


def ch3_l3p(mask_OI: Tensor, gradient_OI: Tensor | None, workspace_mb: int) -> Tensor:
    """Return the CH3-L3p scores (papers 000 eq. 2 and 002 eq. 5), see ``path_scores``."""
    return path_scores(mask_OI, workspace_mb, "ch3")


PREDICTORS: dict[str, Predictor] = {
    "random": random,
    "gradient": gradient,
    "momentum": gradient,
    "preferential": preferential,
    "cn_l3": cn_l3,
    "ch2_l3n": ch2_l3n,
    "ch3_l3n": ch3_l3n,
    "ch2_l3p": ch2_l3p,
    "ch3_l3p": ch3_l3p,
}
NEEDS_GRADIENT = frozenset({"gradient"})
NEEDS_MOMENTUM = frozenset({"momentum"})
"""predictors that look at an average of the gradient over all steps"""

PATH_RULES = frozenset({"ch2_l3p", "ch3_l3p"})
"""predictors whose time grows with the square of the density"""

LINK_SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ch2_l3n": partial(node_scores, rule="ch2", on_links=True),
    "ch3_l3n": partial(node_scores, rule="ch3", on_links=True),
    "ch2_l3p": partial(path_scores, rule="ch2", on_links=True),
    "ch3_l3p": partial(path_scores, rule="ch3", on_links=True),
}
"""``(mask_OI, workspace_mb) -> score_OI``: the existing links' own CH scores, each as if it alone were missing"""


def cost(predictor: str, shape: tuple[int, int], density: float) -> float:
    """Work of an update that regrows by ``predictor`` in a layer of ``shape``, in FLOP; choosing counts 100 a position.

    What does not run as dense products counts as the FLOP that they would do in that time on a CPU: below
    ``SPARSE_BELOW`` and ``PATHS_BELOW`` by fits to the tables in ``node_rules`` and ``path_rules``.
    """
    out, inputs = shape
    positions = float(out * inputs)
    sparse = 0.08 + 2.6 * density if density < SPARSE_BELOW else 1.0
    products = {
        "cn_l3": 4 * positions * out * sparse,
        "ch2_l3n": 4 * positions * (out + inputs) * sparse,
        "ch2_l3p": 2 * (positions * density) ** 2 * min(1.0, density / PATHS_BELOW),
    }
    return products.get(predictor.replace("ch3", "ch2"), 0.0) + 100 * positions


def estimated_seconds(predictor: str, shape: tuple[int, int], density: float) -> float:
    """Time of ``cost`` at 10 GFLOP/s; one core of an AMD EPYC did 20 to 100 (*measured*), path rules the least."""
    return cost(predictor, shape, density) / 1e10
