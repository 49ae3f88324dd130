"""``TopologyUpdater``: the topology of a live model, its first draw, its updates and its state.

One update has three phases: gather the inputs of the owned layers (fp32 weights), compute their changes, exchange the
changes and apply them to mask, weight, moments and history. On one process every layer is owned and the first and
last phase have nothing to send. All that a resume needs is in ``state_dict``: masks bit-packed, history, the union of
all links that ever existed, counters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_cht.errors import UserError
from llm_cht.evolve import shards
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology import bits
from llm_cht.topology.budget import num_links
from llm_cht.topology.initial import unlinked
from llm_cht.topology.keys import Keys
from llm_cht.topology.measure import elm_overlap, itop
from llm_cht.topology.method import LayerChange, Method, Moment, active_neurons, update_group


class TopologyUpdater:
    """Evolves the sparse layers of a model.

    Call ``start`` once on a fresh model (or ``load_state_dict`` on a resumed one), then ``update(step)`` after the
    optimizer step wherever ``due(step)``.
    """

    def __init__(self, sparse: SparseModel, method: Method, optimizer: Optimizer, seed: int) -> None:
        self.sparse = sparse
        self.method = method
        self.optimizer = optimizer
        self.seed = seed
        self.last_update: int | None = None
        """optimizer step of the last update"""
        self.union = {name: layer.mask.clone() for name, layer in sparse.layers.items()}
        """links that have existed at any time"""
        self.history: dict[str, Tensor] = {}
        """last weight of links that existed, fp32 (out, in) per layer; empty unless the method uses it"""
        self._has_bias = frozenset(name for name, layer in sparse.layers.items() if layer.bias is not None)
        self._check()

    def _check(self) -> None:
        for name, layer in self.sparse.layers.items():
            if num_links(layer.mask.shape, min(self.method.density(0), self.method.density.final)) < 1:
                shape = tuple(layer.mask.shape)
                raise UserError(
                    f"`method.sparsity` = {self.method.settings.sparsity} leaves no link in `{name}` {shape}; lower it"
                )

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks, bool (out, in) by layer name."""
        return {name: layer.mask for name, layer in self.sparse.layers.items()}

    def start(self) -> dict[str, int]:
        """Draw the first topology; weights of missing links become 0.

        Returns:
            The number of neurons that start without a link: ``outputs`` and ``inputs``.
        """
        lonely = {"outputs": 0, "inputs": 0}
        for name, layer in self.sparse.layers.items():
            # Drawn on the CPU: the first topology then is the same on every device.
            shape = (layer.out_features, layer.in_features)
            mask = self.method.start(shape, Keys(self.seed, 0, name)).to(layer.mask.device)
            layer.set_mask(mask)
            self.union[name] = mask.clone()
            outputs, inputs = unlinked(mask)
            lonely["outputs"] += outputs
            lonely["inputs"] += inputs
            if self.method.settings.new_weight == "history":
                self.history[name] = torch.zeros_like(layer.weight, dtype=torch.float32)
        return lonely

    def due(self, step: int) -> bool:
        """Whether an update follows optimizer step ``step`` (1, 2, ...)."""
        return self.method.due(step)

    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any]:
        """One topology update after optimizer step ``step``; returns its figures for the metrics.

        Raises:
            UserError: weights that are not finite, which have no order.
        """
        begin = time.perf_counter()
        shards.check_optimizer(self.optimizer)
        moment = Moment(step, self.method.updates.index(step), self.seed)
        changes: dict[str, LayerChange] = {}
        for group in self.sparse.groups:
            weights = {name: shards.master(self.sparse.layers[name].weight) for name in group.layers}
            _check_finite(weights, step)
            masks = {name: self.sparse.layers[name].mask for name in group.layers}
            changes |= update_group(self.method, group, weights, masks, self._has_bias, moment)
        for name, change in changes.items():
            self._apply(name, change.mask)
        self.last_update = step
        seconds = time.perf_counter() - begin
        return self._figures(step, moment.update, changes) | {"seconds_update": seconds}

    def _apply(self, name: str, mask: Tensor) -> None:
        """Give a layer its new mask: survivors keep weight and moments, all others start or end at 0 (or history)."""
        layer = self.sparse.layers[name]
        changed = mask ^ layer.mask
        grown = changed & mask
        history = self.history.get(name)
        if history is not None:
            torch.where(layer.mask, layer.weight.float(), history, out=history)
        layer.set_mask(mask)
        if history is not None:
            layer.weight[grown] = history[grown].to(layer.weight.dtype)
        shards.reset_moments(self.optimizer, layer.weight, changed)
        self.union[name] |= mask

    def _figures(self, step: int, update: int, changes: Mapping[str, LayerChange]) -> dict[str, Any]:
        neurons = [self._anp(group) for group in self.sparse.groups]
        all_neurons = sum(total for _, total in neurons)  # 0 where no layers belong together
        explored = itop(self.union)
        regrown = {name: change.regrown for name, change in changes.items()}
        overlap = elm_overlap({name: change.returned for name, change in changes.items()}, regrown)
        layers = {
            name: {
                "sparsity": 1 - int(change.mask.count_nonzero()) / change.mask.numel(),
                "itop": explored.layers[name],
                "overlap": overlap.layers[name],
            }
            for name, change in changes.items()
        }
        return {
            "update": update,
            "zeta": self.method.zeta(step),
            "temperature": self.method.temperature(step),
            "density": self.density(),
            "pruned": sum(change.pruned for change in changes.values()),
            "removed": sum(change.removed for change in changes.values()),
            "percolated": sum(change.percolated for change in changes.values()),
            "regrown": sum(regrown.values()),
            "overlap": overlap.overall,
            "anp": sum(active for active, _ in neurons) / all_neurons if all_neurons else None,
            "itop": explored.overall,
            "itop_mean": explored.mean,
            "layers": layers,
        }

    def _anp(self, group: Any) -> tuple[int, int]:
        masks = {name: self.sparse.layers[name].mask for name in group.layers}
        return active_neurons(self.method, group, masks, self._has_bias)

    def density(self) -> float:
        """Existing links over all positions of the sparse layers, now."""
        links = sum(int(layer.mask.count_nonzero()) for layer in self.sparse.layers.values())
        return links / sum(layer.mask.numel() for layer in self.sparse.layers.values())

    def digest(self) -> str:
        """SHA-256 over all masks."""
        return bits.digest(self.masks)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which ``load_state_dict`` goes on bit for bit.

        History is kept for links that once existed and do not now: an existing link's memory is overwritten by its
        weight before it is ever read.
        """
        tensors = {}
        for name, layer in self.sparse.layers.items():
            tensors[f"mask.{name}"] = bits.pack(layer.mask)
            tensors[f"union.{name}"] = bits.pack(self.union[name])
            if name in self.history:
                tensors[f"history.{name}"] = self.history[name][self.union[name] & ~layer.mask]
        return tensors, {"last_update": self.last_update, "digest": self.digest()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a saved topology. The model's weights must have been loaded before.

        Raises:
            UserError: the saved layers are not this model's, or the masks are not those that were saved.
        """
        layers = self.sparse.layers
        saved = {key.removeprefix("mask.") for key in tensors if key.startswith("mask.")}
        if saved != set(layers):
            odd = sorted(saved ^ set(layers))
            raise UserError(f"the checkpoint's sparse layers differ from the model's, e.g. `{odd[0]}`")
        masks = {name: bits.unpack(tensors[f"mask.{name}"], layer.mask.shape) for name, layer in layers.items()}
        if bits.digest(masks) != values["digest"]:
            raise UserError("the checkpoint's masks do not match their digest; resume from an older checkpoint")
        for name, layer in layers.items():
            device = layer.mask.device
            layer.set_mask(masks[name].to(device))
            self.union[name] = bits.unpack(tensors[f"union.{name}"], layer.mask.shape).to(device)
            if self.method.settings.new_weight == "history":
                history = torch.zeros(layer.mask.shape, dtype=torch.float32, device=device)
                history[self.union[name] & ~layer.mask] = tensors[f"history.{name}"].to(device)
                self.history[name] = history
        self.last_update = values["last_update"]


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(
                f"the weights of `{name}` are not finite after step {step}; start another run (`--run`) with a lower "
                "`optimizer.lr` or `train.clip_norm`"
            )
