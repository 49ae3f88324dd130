"""``TopologyUpdater``: the topology of a live model, its updates and its state, on one process or shared out over many.

Every group of layers has one owner among the ranks. An update has three phases. *Gather*: the owners, and nobody else,
get the fp32 weights of their layers (as values of existing links: all ranks know the masks) and the dense gradients
where the method looks at them. *Compute*: each owner evolves its groups, one after the other. *Exchange*: the positions
that changed go to all ranks, a byte each, with the first weights of new links, and every rank writes them to its mask,
its working copy and its piece of master and moments. History, averaged gradients and the union of all links that ever
existed stay with the owner. Random numbers are functions of (seed, update, layer, index), so the same inputs give the
same masks on any number of ranks. After every update the ranks compare a fingerprint of each mask.

All of it is kept and sent as layers store their weights: a flat position is the same link in a mask, a weight, a shard
and a code, and GPT-2's are (in, out). Only the rules of ``topology`` see (out, in): what goes to them and comes from
them is turned where they are called.

On one process everything is owned, nothing is sent, and the weights are read where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_cht import dist
from llm_cht.errors import UserError
from llm_cht.evolve.across import links_of_layers
from llm_cht.evolve.exchange import Change, Sizes, exchange
from llm_cht.evolve.figures import COUNTS, Clock, figures
from llm_cht.evolve.ownership import balance, group_cost, owners
from llm_cht.evolve.shards import Shards, check_optimizer
from llm_cht.evolve.transfer import Weights, gather_weights
from llm_cht.sparse.surgery import SparseModel
from llm_cht.topology import bits
from llm_cht.topology.keys import Keys
from llm_cht.topology.link import cost
from llm_cht.topology.method import Method, Target
from llm_cht.topology.percolate import Group
from llm_cht.topology.update import Inputs, LayerChange, Moment, active_neurons, pruning_candidates, update_group
from llm_cht.topology.weights import Scale, draw


class TopologyUpdater:
    """Evolves the sparse layers of a model whose first topology is drawn (``draw_start``) or loaded.

    Call ``watch(step)`` before the optimizer step ``step``, ``learned(step)`` after it, then ``update(step)`` wherever
    ``due(step)``; on many ranks all of them do. ``shards`` says what this rank holds of weights and moments.
    """

    def __init__(self, sparse: SparseModel, method: Method, shards: Shards, seed: int) -> None:
        self.sparse = sparse
        self.method = method
        self.shards = shards
        self.seed = seed
        self.last_update: int | None = None
        """optimizer step of the last update"""
        self.stopped: set[str] = set()
        """layers that evolve no longer (early stop)"""
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in sparse.layers.items()}
        shapes = [[self.shapes[name] for name in group.layers] for group in sparse.groups]
        costs = [max(group_cost(s, rule, method.density(0)) for rule in method.rules or {"random"}) for s in shapes]
        by_group = owners(costs, dist.world_size())
        self.owner = {name: by_group[i] for i, group in enumerate(sparse.groups) for name in group.layers}
        """the rank that computes each layer"""
        self.balance = balance(costs, by_group, dist.world_size())
        """mean over largest load of a rank, as predicted"""
        self.owned: tuple[Group, ...] = tuple(
            g for g, owner in zip(sparse.groups, by_group, strict=True) if owner == dist.rank()
        )
        mine = {name: layer.mask for name, layer in sparse.layers.items() if self.owner[name] == dist.rank()}
        self.union = {name: mask.clone() for name, mask in mine.items()}
        """links that have existed at any time, of the owned layers"""
        self.history = _numbers(mine) if method.settings.new_weight == "history" else {}
        """last weight of links that existed, fp32, of the owned layers; empty unless the method uses it"""
        self.momenta = _numbers(mine) if method.needs_momentum(1) else {}
        """average of the dense gradient over steps, fp32, of the owned layers; empty unless it is used"""
        self.own_std: dict[str, float] = {}
        """of each layer's weights before the start (``Start.own_std``), for new links that are drawn as then"""
        self._gradients: dict[str, Tensor] = {}  # of this step, where ``learned`` has gathered them
        self._has_bias = frozenset(name for name, layer in sparse.layers.items() if layer.bias is not None)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks, bool by layer name, each in the order in which its layer stores the weight."""
        return self.sparse.masks

    def due(self, step: int) -> bool:
        """Whether an update follows optimizer step ``step`` (1, 2, ...)."""
        return self.method.due(step)

    def watch(self, step: int) -> None:
        """Capture the dense gradients of optimizer step ``step`` if an update will look at them.

        Costs an fp32 number per position of the sparse layers on every rank: for this one step, or, where the method
        averages gradients over steps (SNFS), at every step up to the last update.
        """
        if self.method.needs_gradient(step) or self.method.needs_momentum(step):
            for name, layer in self.sparse.layers.items():
                if name not in self.stopped:
                    layer.captured = torch.zeros_like(layer.mask, dtype=torch.float32)

    @torch.no_grad()
    def learned(self, step: int, sound: bool = True) -> None:
        """Take in the gradients of optimizer step ``step``, or drop them if they are not finite; a collective."""
        if not sound:
            for layer in self.sparse.layers.values():
                layer.captured = None
        elif self.method.needs_momentum(step):
            gradients = self._gather_gradients()
            for name, gradient in gradients.items():
                self.momenta[name].lerp_(gradient, 1 - self.method.settings.momentum_beta)
            self._gradients = gradients if self.method.needs_gradient(step) else {}

    @torch.no_grad()
    def update(self, step: int, prune_only: bool = False) -> dict[str, Any]:
        """One topology update after optimizer step ``step``; returns its figures for the metrics. A collective.

        ``prune_only``: nothing is removed and regrown, for lack of a gradient.

        Raises:
            UserError: weights that are not finite, which have no order; gradients that were not watched; ranks whose
                masks differ after the update.
        """
        clock = Clock()
        check_optimizer(self.shards.optimizer)
        self.agree(f"before the topology update of step {step}")  # or the ranks send each other links that are none
        moment = Moment(step, self.method.updates.index(step), self.seed)
        weights = gather_weights(self.sparse.layers, self.owner, self.shards)
        gradients = self._gradients or self._gather_gradients()
        self._gradients = {}
        clock.lap("gather")
        targets = self._targets(step, weights)
        changes: dict[str, LayerChange] = {}
        with dist.together():
            for group in self.owned:
                inputs = replace(self._inputs(group, weights, targets, gradients), prune_only=prune_only)
                _check_finite(inputs.weights, step)
                if not prune_only:
                    self._check_watched(inputs, step)
                for name, evolved in update_group(self.method, group, inputs, moment).items():
                    changes[name] = replace(evolved, mask=self.sparse.layers[name].as_stored(evolved.mask))
                    self._remember(name, weights, changes[name].mask)
        clock.lap("compute")
        own = {name: self._change(name, change.mask, moment) for name, change in changes.items()}
        counts = self._count(changes, own)
        sent = 0
        for name, change in self._exchange(own, counts):
            sent += len(change.code) + (0 if change.weights is None else change.weights.nbytes)
            self._apply(name, change)
        self.agree(f"after the topology update of step {step}")
        clock.lap("exchange")
        self.last_update = step
        self._stop_settled(counts)
        positions = {name: layer.mask.numel() for name, layer in self.sparse.layers.items()}
        when = {"update": moment.update, "zeta": self.method.zeta(step), "temperature": self.method.temperature(step)}
        told = when | figures(positions, counts, self.active()) | self.memory()
        if self.method.settings.early_stop > 0:
            told["stopped"] = len(self.stopped)
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

    def _targets(self, step: int, weights: Weights) -> dict[str, Target]:
        """Links of every layer after the update; a collective where layers are compared with each other."""
        present = None
        if self.method.settings.budget == "kept":
            present = {name: int(layer.mask.count_nonzero()) for name, layer in self.sparse.layers.items()}
        targets = self.method.targets(self.shapes, step, present)
        if self.method.settings.pruning_scope == "layer":
            return targets
        scores: dict[str, Tensor] = {}
        with dist.together():
            for group in self.owned:
                inputs = self._inputs(group, weights, targets, {})
                _check_finite(inputs.weights, step)
                scores |= {name: pruning_candidates(self.method, name, inputs)[1] for name in group.layers}
        total = sum(target.links for target in targets.values())
        return {name: Target(links) for name, links in links_of_layers(scores, list(targets), total).items()}

    def _inputs(
        self, group: Group, weights: Weights, targets: Mapping[str, Target], gradients: Mapping[str, Tensor]
    ) -> Inputs:
        return Inputs(
            weights=self._seen(group, {name: weights.dense(name) for name in group.layers}),
            masks=self._seen(group, self.masks),
            targets=targets,
            gradients=self._seen(group, gradients),
            momenta=self._seen(group, self.momenta),
            memory=self._seen(group, self.history),
            has_bias=self._has_bias,
            stopped=frozenset(self.stopped),
        )

    def _seen(self, group: Group, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a group's layers as the rules see them: (out, in)."""
        return {name: self.sparse.layers[name].as_OI(stored[name]) for name in group.layers if name in stored}

    def _check_watched(self, inputs: Inputs, step: int) -> None:
        if self.method.needs_gradient(step):
            missing = inputs.masks.keys() - inputs.gradients.keys() - self.stopped
            if missing:
                raise UserError(
                    f"the topology update of step {step} needs the dense gradients of that step, and those of "
                    f"`{min(missing)}` were not kept; call `watch({step})` before its backward pass"
                )

    def _stop_settled(self, counts: Tensor) -> None:
        """Early stop: layers most of whose regrown links had just been removed (000, section 3.2)."""
        threshold = self.method.settings.early_stop
        if threshold > 0:
            regrown, returned = (counts[:, COUNTS.index(kind)].tolist() for kind in ("regrown", "returned"))
            for name, new, back in zip(self.sparse.layers, regrown, returned, strict=True):
                if new > 0 and back >= threshold * new:
                    self.stopped.add(name)

    def _remember(self, name: str, weights: Weights, new_mask: Tensor) -> None:
        history = self.history.get(name)
        if history is not None:
            torch.where(self.sparse.layers[name].mask, weights.dense(name), history, out=history)
        self.union[name] |= new_mask

    def _change(self, name: str, new_mask: Tensor, moment: Moment) -> Change:
        flipped = (new_mask ^ self.sparse.layers[name].mask).view(-1)
        rule = self.method.settings.new_weight
        if rule == "zero":
            return Change(bits.encode(flipped), None)
        grown = flipped & new_mask.view(-1)
        if rule == "history":
            return Change(bits.encode(flipped), self.history[name].view(-1)[grown])
        settings, (_, num_inputs) = self.method.settings, self.shapes[name]
        density = int(new_mask.count_nonzero()) / new_mask.numel()
        scale = Scale(num_inputs, density, settings.initial_gain, self.own_std[name])
        keys = Keys(moment.seed, moment.update, name)
        index = self.sparse.layers[name].index_OI(grown.nonzero().squeeze(1))
        return Change(bits.encode(flipped), draw(settings.initial_weight, index, scale, keys))

    def _count(self, changes: Mapping[str, LayerChange], own: Mapping[str, Change]) -> Tensor:
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

    def _exchange(self, own: Mapping[str, Change], counts: Tensor) -> Iterator[tuple[str, Change]]:
        """The changes of all layers, from their owners."""
        grown, sizes = (counts[:, COUNTS.index(kind)].tolist() for kind in ("grown", "bytes"))
        known = {
            name: Sizes(self.owner[name], size, count)
            for name, size, count in zip(self.sparse.layers, sizes, grown, strict=True)
        }
        device = next(iter(self.sparse.layers.values())).mask.device
        return exchange(own, known, self.method.settings.new_weight != "zero", device)

    def _apply(self, name: str, change: Change) -> None:
        """Give a layer its new mask: survivors keep weight and moments, all others start or end at 0 (or history)."""
        layer = self.sparse.layers[name]
        flipped = bits.decode(change.code, layer.mask.numel())
        mask = layer.mask.view(-1).logical_xor_(flipped)
        grown = (flipped & mask).nonzero().squeeze(1)
        first = grown.new_zeros(len(grown), dtype=torch.float32) if change.weights is None else change.weights
        self.shards.write(layer.weight, flipped, grown, first)

    def agree(self, when: str) -> None:
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
                    f"{when} the mask of `{name}` on rank(s) {odd} differs from the "
                    "other ranks'. The masks no longer agree: memory or network of a node is faulty; resume from the "
                    "last checkpoint without it"
                )

    def flops(self, step: int) -> float:
        """FLOPs of the link predictors at the update of ``step``."""
        if not self.method.evolves(step):
            return 0.0
        rule, density = self.method.regrowth(step), self.method.density(step)
        return sum(cost(rule, shape, density) for name, shape in self.shapes.items() if name not in self.stopped)

    def memory(self) -> dict[str, int]:
        """Bytes of the masks on every rank, and of what the owners remember, over all ranks; a collective."""
        kept = [*self.union.values(), *self.history.values(), *self.momenta.values()]
        state = dist.total([sum(tensor.nbytes for tensor in kept)])[0]
        return {"mask_bytes": sum(mask.nbytes for mask in self.masks.values()), "topology_bytes": int(state)}

    def density(self) -> float:
        """Existing links over all positions of the sparse layers, now."""
        return self.sparse.density

    def active(self) -> tuple[int, int]:
        """Active and all neurons of the percolation units, over all groups; trial percolations shared out."""
        counts = [self._active(group) for group in self.owned]
        active, neurons = dist.total([sum(a for a, _ in counts), sum(n for _, n in counts)])
        return int(active), int(neurons)

    def _active(self, group: Group) -> tuple[int, int]:
        return active_neurons(self.method, group, self._seen(group, self.masks), self._has_bias)

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
            if name in self.momenta:
                tensors[f"momentum.{name}"] = self.momenta[name]
        return tensors, {
            "last_update": self.last_update,
            "digest": self.digest(),
            "stopped": sorted(self.stopped),
            "own_std": self.own_std,
        }

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
        for name, average in self.momenta.items():
            average.copy_(tensors[f"momentum.{name}"])
        self.last_update = values["last_update"]
        self.stopped = set(values.get("stopped", ()))  # unknown to the first checkpoints, whose methods had no use
        self.own_std = dict(values.get("own_std", {}))  # for either


def _numbers(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in masks.items()}


def _check_finite(weights: Mapping[str, Tensor], step: int) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(
                f"the weights of `{name}` are not finite after step {step}; start another run (`--run`) with a lower "
                "`optimizer.lr` or `train.clip_norm`"
            )
