"""Correlated start (CSTI, 000 App. B): a layer that sees the input links each neuron to correlated input features.

``Correlation`` takes the calibration samples batch by batch, since they come from forward hooks, and keeps one fp64
(in, in) sum. Its update by means is exact for features of any offset; the textbook difference of raw second moments
was rejected: it cancels to noise for pixels that hardly vary. A feature without variance is told by its smallest and
largest value, which no rounding blurs. Letters in names: N samples, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.topology.keys import Keys
from llm_cht.topology.select import top_k


class Correlation:
    """Pearson correlations between the features of samples that arrive in batches.

    Memory: one fp64 (in, in) on the device of the samples, another while the result is computed.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean_I = self._low_I = self._high_I = self._product_II = torch.empty(0)

    @torch.no_grad()
    def add(self, samples: Tensor) -> None:
        """Take in samples (..., in), of any number and float type."""
        batch_NI = samples.detach().flatten(0, -2).double()
        if len(batch_NI) == 0:
            return
        low_I, high_I = torch.aminmax(batch_NI, dim=0)
        mean_I = batch_NI.mean(dim=0)
        batch_NI = batch_NI - mean_I  # not in place: the samples may be fp64 themselves
        if self._count == 0:
            self._low_I, self._high_I, self._mean_I = low_I, high_I, mean_I
            self._product_II = batch_NI.T @ batch_NI
        else:
            total = self._count + len(batch_NI)
            shift_I = mean_I - self._mean_I
            self._product_II.addmm_(batch_NI.T, batch_NI)
            self._product_II.addr_(shift_I, shift_I, alpha=self._count * len(batch_NI) / total)
            self._mean_I += shift_I * (len(batch_NI) / total)
            self._low_I, self._high_I = torch.minimum(self._low_I, low_I), torch.maximum(self._high_I, high_I)
        self._count += len(batch_NI)

    def result(self) -> Tensor:
        """Return the correlations, fp32 (in, in), 0 on the diagonal and wherever a feature does not vary."""
        assert self._count, "no samples"
        varies_I = self._low_I != self._high_I  # NaN counts as varying, and shows in the result
        inverse_I = torch.where(varies_I, self._product_II.diagonal().rsqrt(), 0)
        correlation_II = (self._product_II * inverse_I).mul_(inverse_I[:, None]).float()
        return correlation_II.masked_fill_(~(varies_I & varies_I[:, None]), 0).fill_diagonal_(0)


def correlation(samples: Tensor) -> Tensor:
    """Pearson correlations of the features of samples (..., in), as ``Correlation.result`` gives them."""
    together = Correlation()
    together.add(samples)
    return together.result()


def csti(shape: tuple[int, int], num_links: int, keys: Keys, correlation_II: Tensor) -> Tensor:
    """Links at the largest absolute correlations between input features (000, App. B). Returns bool (out, in).

    A layer of out = k * in is k such squares, one below the other, the first ones with the odd links. Where there are
    fewer correlations than links, the rest is drawn at random: first between features that vary, the feature itself
    included, then among all.

    Raises:
        UserError: out is no multiple of in; correlations that are not finite, or all 0.
    """
    num_outputs, num_inputs = shape
    if num_outputs % num_inputs:
        raise UserError(
            f"`method.initial` = csti: `{keys.layer}` has {num_outputs} outputs, which is no multiple of its "
            f"{num_inputs} inputs (keys and values of few heads are narrower); leave the layer out with "
            "`sparse.exclude`, choose such a width, or another `method.initial`"
        )
    assert correlation_II.shape == (num_inputs, num_inputs), (correlation_II.shape, shape)
    strength_II = correlation_II.detach().abs().fill_diagonal_(0)
    varies_I = (strength_II > 0).any(dim=0)
    if not strength_II.isfinite().all() or not varies_I.any():
        raise UserError(
            f"`method.initial` = csti: the calibration inputs of `{keys.layer}` are not finite, or no two of its "
            "features vary; give more, or sound, samples, or choose another `method.initial`"
        )
    strength_II.masked_fill_(~(varies_I & varies_I[:, None]), -1)
    num_tiles, area = num_outputs // num_inputs, num_inputs * num_inputs
    mask = torch.zeros(num_tiles, area, dtype=torch.bool)
    for tile in range(num_tiles):
        of_tile = num_links // num_tiles + (tile < num_links % num_tiles)
        mask[tile, top_k(strength_II.view(-1), of_tile, keys, f"tie {tile}").cpu()] = True
    return mask.view(shape)
