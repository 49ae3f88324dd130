"""``TopologyUpdater``: the topology of a live model, its updates and its state, on one process or shared out over many.

Every group of layers has one owner among the ranks. An update has three phases. *Gather*: the owners, and nobody else,
get the fp32 weights of their layers (as values of existing links: all ranks know the masks) and the dense gradients
where the method looks at them. *Compute*: each owner evolves its groups, one after the other. *Exchange*: the positions
that changed go to all ranks, a byte each, with the first weights of new links, and every rank writes them to its mask,
its working copy and its piece of master and moments. History and the union of all links that ever existed stay with the
owner. Random numbers are functions of (seed, update, layer, index), so the same inputs give the same masks on any
number of ranks. After every update the ranks compare a fingerprint of each mask.

On one process everything is owned, nothing is sent, and the weights are read where they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.figures import COUNTS, figures
from llm_cht.evolve.ownership import balance, group_cost, owners
from llm_cht.evolve.shards import Shards, check_optimizer
from llm_cht.evolve.transfer import gather_weights
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology import bits
from llm_cht.topology.budget import num_links
from llm_cht.topology.initial import unlinked
from llm_cht.topology.keys import Keys
from llm_cht.topology.method import Inputs, LayerChange, Method, Moment, active_neurons, update_group
from llm_cht.topology.percolate import Group


def draw_start(sparse: SparseModel, method: Method, seed: int) -> dict[str, int]:
    """Draw the first topology of a fresh model; weights of missing links become 0.

    The weights must be whole here: before ZeRO cuts them. Every rank draws the same.

    Returns:
        The number of neurons that start without a link: ``outputs`` and ``inputs``.

    Raises:
        UserError: the sparsity leaves a layer without a link; nothing is changed then.
    """
    _check_links(sparse, method)
    lonely = {"outputs": 0, "inputs": 0}
    for name, layer in sparse.layers.items():
        # Drawn on the CPU: the first topology then is the same on every device.
        shape = (layer.out_features, layer.in_features)
        mask = method.start(shape, Keys(seed, 0, name))
        layer.set_mask(mask.to(layer.mask.device))
        outputs, inputs = unlinked(mask)
        lonely["outputs"] += outputs
        lonely["inputs"] += inputs
    return lonely


def _check_links(sparse: SparseModel, method: Method) -> None:
    """Refuse a sparsity that leaves a layer without a link."""
    for name, layer in sparse.layers.items():
        shape = (layer.out_features, layer.in_features)
        if num_links(shape, min(method.density(0), method.density.final)) < 1:
            raise UserError(
                f"`method.sparsity` = {method.settings.sparsity} leaves no link in `{name}` {shape}; lower it"
            )


@dataclass(frozen=True)
class _Change:
    """A layer's part of the exchange: where its mask flips, and the first weights of the new links, in flat order."""

    code: Tensor
    """the flips, uint8, by ``bits.encode``"""
    weights: Tensor | None


class TopologyUpdater:
    """Evolves the sparse layers of a model whose first topology is drawn (``draw_start``) or loaded.

    Call ``watch(step)`` before the optimizer step ``step`` and ``update(step)`` after it wherever ``due(step)``; on
    many ranks all of them do. ``shards`` says what this rank holds of weights and moments.
    """

    def __init__(self, sparse: SparseModel, method: Method, shards: Shards, seed: int) -> None:
        self.sparse = sparse
        self.method = method
        self.shards = shards
        self.seed = seed
        self.last_update: int | None = None
        """optimizer step of the last update"""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in sparse.layers.items()}
        regrowth, density = method.settings.regrowth, method.density(0)
        costs = [group_cost([shapes[name] for name in g.layers], regrowth, density) for g in sparse.groups]
        by_group = owners(costs, dist.world_size())
        self.owner = {name: by_group[i] for i, group in enumerate(sparse.groups) for name in group.layers}
        """the rank that computes each layer"""
        self.balance = balance(costs, by_group, dist.world_size())
        """mean over largest load of a rank, as predicted"""
        self.owned: tuple[Group, ...] = tuple(
            g for g, owner in zip(sparse.groups, by_group, strict=True) if owner == dist.rank()
        )
        mine = [name for name in sparse.layers if self.owner[name] == dist.rank()]
        self.union = {name: sparse.layers[name].mask.clone() for name in mine}
        """links that have existed at any time, of the owned layers"""
        self.history: dict[str, Tensor] = {}
        """last weight of links that existed, fp32 (out, in), of the owned layers; empty unless the method uses it"""
        if method.settings.new_weight == "history":
            masks = {name: sparse.layers[name].mask for name in mine}
            self.history = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in masks.items()}
        self._has_bias = frozenset(name for name, layer in sparse.layers.items() if layer.bias is not None)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks, bool (out, in) by layer name."""
        return {name: layer.mask for name, layer in self.sparse.layers.items()}

    def due(self, step: int) -> bool:
        """Whether an update follows optimizer step ``step`` (1, 2, ...)."""
        return self.method.due(step)

    def watch(self, step: int) -> None:
        """Capture the dense gradients of optimizer step ``step`` if the update after it will look at them.

        Costs an fp32 number per position of the sparse layers, on every rank, for this one step.
        """
        if self.method.needs_gradient and self.due(step):
            for layer in self.sparse.layers.values():
                layer.captured = torch.zeros_like(layer.mask, dtype=torch.float32)

    @torch.no_grad()
    def update(self, step: int) -> dict[str, Any]:
        """One topology update after optimizer step ``step``; returns its figures for the metrics. A collective.

        Raises:
            UserError: weights that are not finite, which have no order; ranks whose masks differ after the update.
        """
        clock = _Clock()
        check_optimizer(self.shards.optimizer)
        moment = Moment(step, self.method.updates.index(step), self.seed)
        weights = gather_weights(self.sparse.layers, self.owner, self.shards)
        gradients = self._gather_gradients()
        clock.lap("gather")
        changes: dict[str, LayerChange] = {}
        with dist.together():
            for group in self.owned:
                dense = {name: weights.dense(name) for name in group.layers}
                _check_finite(dense, step)
                inputs = Inputs(dense, {name: self.sparse.layers[name].mask for name in group.layers}, gradients)
                changes |= update_group(self.method, group, inputs, self._has_bias, moment)
                for name in group.layers:
                    self._remember(name, dense[name], changes[name].mask)
        clock.lap("compute")
        own = {name: self._change(name, change.mask) for name, change in changes.items()}
        counts = self._count(changes, own)
        sent = 0
        for name, change in self._exchange(own, counts):
            sent += len(change.code) + (0 if change.weights is None else change.weights.nbytes)
            self._apply(name, change)
        self._agree(step)
        clock.lap("exchange")
        self.last_update = step
        positions = {name: layer.mask.numel() for name, layer in self.sparse.layers.items()}
        when = {"update": moment.update, "zeta": self.method.zeta(step), "temperature": self.method.temperature(step)}
        told = when | figures(positions, counts, self.active())
        return told | clock.figures(weights.bytes_received, sent, self.balance)

    def _gather_gradients(self) -> dict[str, Tensor]:
        """The captured gradients of the owned layers, averaged over the ranks."""
        gradients = {}
        for name, layer in self.sparse.layers.items():
            if layer.captured is None:
                continue
            dist.sum_at(layer.captured, self.owner[name])
            if self.owner[name] == dist.rank():
                gradients[name] = layer.captured.div_(dist.world_size())
            layer.captured = None
        return gradients

    def _remember(self, name: str, weight: Tensor, new_mask: Tensor) -> None:
        history = self.history.get(name)
        if history is not None:
            torch.where(self.sparse.layers[name].mask, weight, history, out=history)
        self.union[name] |= new_mask

    def _change(self, name: str, new_mask: Tensor) -> _Change:
        flipped = (new_mask ^ self.sparse.layers[name].mask).view(-1)
        history = self.history.get(name)
        first = None if history is None else history.view(-1)[flipped & new_mask.view(-1)]
        return _Change(bits.encode(flipped), first)

    def _count(self, changes: Mapping[str, LayerChange], own: Mapping[str, _Change]) -> Tensor:
        """Counts of links, int64 (layers, ``COUNTS``), in the order of the model, and the same on all ranks."""
        counts = torch.zeros(len(self.sparse.layers), len(COUNTS), dtype=torch.int64)
        for row, name in enumerate(self.sparse.layers):
            if name in changes:
                change, mask = changes[name], self.sparse.layers[name].mask
                grown = int((change.mask & ~mask).count_nonzero())
                links, explored = int(change.mask.count_nonzero()), int(self.union[name].count_nonzero())
                kinds = (change.pruned, change.removed, change.percolated, change.regrown, change.returned)
                counts[row] = torch.tensor([*kinds, grown, links, explored, len(own[name].code)])
        return dist.total_counts(counts)

    def _exchange(self, own: Mapping[str, _Change], counts: Tensor) -> Iterator[tuple[str, _Change]]:
        """The changes of all layers, from their owners."""
        if dist.world_size() == 1:
            yield from own.items()
            return
        layers = self.sparse.layers
        grown, sizes = (dict(zip(layers, counts[:, COUNTS.index(k)].tolist(), strict=True)) for k in ("grown", "bytes"))
        by_rank = [[n for n in layers if self.owner[n] == r] for r in range(dist.world_size())]
        device = next(iter(layers.values())).mask.device
        mine = [own[n].code for n in by_rank[dist.rank()]]
        codes = dist.spread(_joined(mine, torch.uint8, device), [sum(sizes[n] for n in names) for names in by_rank])
        first = [w for n in by_rank[dist.rank()] if (w := own[n].weights) is not None]
        remembered = self.method.settings.new_weight == "history"
        lengths = [sum(grown[n] for n in names) * remembered for names in by_rank]
        weights = dist.spread(_joined(first, torch.float32, device), lengths)
        for names, joined, values in zip(by_rank, codes, weights, strict=True):
            parts = joined.split([sizes[n] for n in names])
            starts = values.split([grown[n] if remembered else 0 for n in names])
            for name, code, start in zip(names, parts, starts, strict=True):
                yield name, _Change(code, start if remembered else None)

    def _apply(self, name: str, change: _Change) -> None:
        """Give a layer its new mask: survivors keep weight and moments, all others start or end at 0 (or history)."""
        layer = self.sparse.layers[name]
        flipped = bits.decode(change.code, layer.mask.numel())
        mask = layer.mask.view(-1).logical_xor_(flipped)
        grown = (flipped & mask).nonzero().squeeze(1)
        first = grown.new_zeros(len(grown), dtype=torch.float32) if change.weights is None else change.weights
        self.shards.write(layer.weight, flipped, grown, first)

    def _agree(self, step: int) -> None:
        """All ranks must have the same masks; what differs is named, and no rank says a word to another afterwards."""
        if dist.world_size() == 1:
            return
        own = torch.tensor([bits.fingerprint(layer.mask) for layer in self.sparse.layers.values()])
        everybody = dist.gather_counts(own)
        for row, name in enumerate(self.sparse.layers):
            values = everybody[:, row].tolist()
            most = max(values, key=values.count)  # of equally many, what the lowest rank has
            odd = [rank for rank, value in enumerate(values) if value != most]
            if odd:
                raise dist.agreed(
                    f"after the topology update of step {step} the mask of `{name}` on rank(s) {odd} differs from the "
                    "other ranks'. The masks no longer agree: memory or network of a node is faulty; resume from the "
                    "last checkpoint without it"
                )

    def density(self) -> float:
        """Existing links over all positions of the sparse layers, now."""
        links = sum(int(layer.mask.count_nonzero()) for layer in self.sparse.layers.values())
        return links / sum(layer.mask.numel() for layer in self.sparse.layers.values())

    def active(self) -> tuple[int, int]:
        """Active and all neurons of the percolation units, over all groups; trial percolations shared out."""
        counts = [self._active(group) for group in self.owned]
        active, neurons = dist.total([sum(a for a, _ in counts), sum(n for _, n in counts)])
        return int(active), int(neurons)

    def _active(self, group: Group) -> tuple[int, int]:
        masks = {name: self.sparse.layers[name].mask for name in group.layers}
        return active_neurons(self.method, group, masks, self._has_bias)

    def digest(self) -> str:
        """SHA-256 over all masks."""
        return bits.digest(self.masks)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of this rank and plain values from which ``load_state_dict`` goes on bit for bit.

        Masks come from the main rank, union and history of a layer from its owner. History is kept for links that once
        existed and do not now: an existing link's memory is overwritten by its weight before it is ever read.
        """
        tensors = {}
        for name, layer in self.sparse.layers.items():
            if dist.is_main():
                tensors[f"mask.{name}"] = bits.pack(layer.mask)
            if name in self.union:
                tensors[f"union.{name}"] = bits.pack(self.union[name])
            if name in self.history:
                tensors[f"history.{name}"] = self.history[name][self.union[name] & ~layer.mask]
        return tensors, {"last_update": self.last_update, "digest": self.digest()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a saved topology, by any number of ranks. Weights are loaded apart from it.

        ``tensors``: those of all ranks that saved; only what this rank needs is read from it.

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
            layer.mask.copy_(masks[name])
        for name, union in self.union.items():
            union.copy_(bits.unpack(tensors[f"union.{name}"], union.shape))
        for name, history in self.history.items():
            remembered = self.union[name] & ~layers[name].mask
            history.zero_()[remembered] = tensors[f"history.{name}"].to(history.device)
        self.last_update = values["last_update"]


class _Clock:
    """Seconds of the phases of an update."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now

    def figures(self, gathered: int, exchanged: int, predicted: float) -> dict[str, Any]:
        """Seconds of the whole and of each phase (of every rank, where there are many), bytes, balance."""
        figures: dict[str, Any] = {"seconds_update": sum(self._seconds.values())}
        if dist.world_size() == 1:
            return figures | {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        everybody = dist.gather([[round(s, 6) for s in self._seconds.values()], gathered])
        for i, phase in enumerate(self._seconds):
            figures[f"seconds_{phase}"] = [seconds[i] for seconds, _ in everybody]
        compute = figures["seconds_compute"]
        sent = {"bytes_gathered": sum(count for _, count in everybody), "bytes_exchanged": exchanged}
        return figures | sent | {"balance": sum(compute) / len(compute) / max(compute), "balance_predicted": predicted}


def _joined(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(
                f"the weights of `{name}` are not finite after step {step}; start another run (`--run`) with a lower "
                "`optimizer.lr` or `train.clip_norm`"
            )
