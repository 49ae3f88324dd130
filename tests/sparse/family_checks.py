"""What the tests of all model families do: cut links, percolate, train with updates, load a folder again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology.percolate import percolate, with_dead_heads

ABOUT = {"architectures", "_name_or_path", "dtype"}
"""keys of a config that say where its model comes from"""


def cut(sparse: SparseModel, density: float, seed: int) -> None:
    """Random masks; single rows and columns lose all their links, so that there are dead neurons at any density."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sparse.layers.values():
        mask = torch.rand(layer.mask.shape, generator=generator) < density
        mask[torch.rand(len(mask), generator=generator) < 0.2] = False
        mask[:, torch.rand(mask.shape[1], generator=generator) < 0.2] = False
        layer.set_mask(mask)


def percolated(sparse: SparseModel, has_bias: frozenset[str], dead_heads: bool) -> dict[str, int]:
    """Percolate all groups of a live model; the links removed in each layer."""
    removed = {}
    for group in sparse.groups:
        units = with_dead_heads(group.units) if dead_heads else group.units
        masks = {name: sparse.layers[name].as_OI(sparse.layers[name].mask) for name in group.layers}
        new, active, total = percolate(replace(group, units=units), masks, has_bias)
        assert 0 <= active <= total
        for name, mask in new.items():
            removed[name] = int((masks[name] & ~mask).sum())
            sparse.layers[name].set_mask(sparse.layers[name].as_stored(mask))
    return removed


def biased(sparse: SparseModel) -> frozenset[str]:
    """Layers with a bias."""
    return frozenset(name for name, layer in sparse.layers.items() if layer.bias is not None)


def learn(get_loss: Callable[[], Tensor], optimizer: Any, updater: TopologyUpdater, steps: int = 20) -> list[float]:
    """Steps on one batch, with updates; the losses."""
    losses, anps = [], []
    for step in range(1, steps + 1):
        updater.watch(step)
        loss = get_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if updater.due(step):
            anps.append(updater.update(step)["anp"])
    assert anps
    assert all(0 < anp <= 1 for anp in anps)
    return losses


def tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """A word is its number."""
    words = WordLevel({str(number): number for number in range(num_words)}, unk_token="2")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1")


def same(folder: Path, model: Any, outputs: Callable[[Any], Tensor]) -> None:
    """Stock transformers loads the folder, and its model gives the same logits, bit for bit, and ties the same."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).__module__.startswith("transformers.")
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    own, other = ({k: v for k, v in m.config.to_dict().items() if k not in ABOUT} for m in (model, loaded))
    assert own == other
    if model.can_generate():
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert verify_folder(folder).keys() == read_topology(folder).masks.keys()
