"""Every method of the papers on a live model, update by update, against what section 2 of the algorithms asks for."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht.errors import UserError
from llm_cht.evolve.shards import Whole
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology import update
from llm_cht.topology.method import resolve
from llm_cht.topology.presets import PRESETS
from llm_cht.topology.settings import MethodSettings

HEADS, KV_HEADS = 4, 2
MIXES = {
    "global granet": {"preset": "granet", "pruning_scope": "global"},
    "global gmp": {"preset": "gmp", "pruning_scope": "global"},
    "er budget": {"preset": "rigl", "budget": "er"},
    "per head": {"preset": "chts", "per_head": True},
    "dead heads": {"preset": "chts", "dead_heads": True, "sparsity": 0.95},
    "mixed": {"preset": "set", "regrowth_from": {20: "momentum", 30: "ch3_l3p", 40: "gradient"}},
    "table": {"preset": "set", "density": "table", "density_table": {0: 0.5, 10: 0.7, 25: 0.8}},
    "new weights": {"preset": "chtss", "new_weight": "init"},
    "linear": {"preset": "set", "density": "linear", "removal": "snip", "removal_choice": "soft"},
    "subrank": {"preset": "esml", "ties": "subrank"},
    "small world": {"preset": "chts", "initial": "bsw", "regrowth": "ch3_l3p", "initial_weight": "scaled"},
}
CASES = {name: {"preset": name} for name in PRESETS if name != "dense"} | MIXES
UPDATES = 50


class Live:
    """A tiny LLaMA in training."""

    def __init__(self, seed: int = 0, size: tuple[int, int] = (24, 36), **settings) -> None:
        torch.manual_seed(seed)
        hidden, inner = size
        sizes = dict(vocab_size=32, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1)
        heads = dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
        self.sparse = sparsify(self.model, SparseSettings())
        self.layers = self.sparse.layers
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.method = resolve(MethodSettings(**({"sparsity": 0.8, "update_interval": 1} | settings)), 4 * UPDATES // 3)
        start = draw_start(self.sparse, self.method, seed)
        self.updater = TopologyUpdater(self.sparse, self.method, Whole(self.optim), seed)
        self.updater.own_std = start.own_std

    def learn(self, step: int) -> None:
        tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(step))
        self.updater.watch(step)
        self.model(tokens, labels=tokens).loss.backward()
        self.optim.step()
        self.optim.zero_grad()
        self.updater.learned(step)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {"mask": layer.mask.clone(), "weight": layer.weight.detach().clone()}
            | {k: v.clone() for k, v in self.optim.state[layer.weight].items() if k != "step"}
            for name, layer in self.layers.items()
        }


@pytest.mark.parametrize("case", CASES)
def test_fifty_updates(case):
    check_updates(CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 36), (40, 20)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("case", CASES)
def test_fifty_updates_over_a_grid(case, sparsity, size):
    if "density_table" not in CASES[case]:
        check_updates(CASES[case] | {"sparsity": sparsity}, size)


def check_updates(settings: dict, size: tuple[int, int] = (24, 36)) -> None:
    live = Live(size=size, **settings)
    union = {name: layer.mask.clone() for name, layer in live.layers.items()}
    last = {name: torch.zeros_like(layer.weight) for name, layer in live.layers.items()}
    positions = sum(mask.numel() for mask in union.values())
    for step in range(1, UPDATES + 1):
        live.learn(step)
        before = live.state()
        for name in live.layers:
            last[name] = torch.where(before[name]["mask"], before[name]["weight"], last[name])
        if not live.updater.due(step):
            continue
        stopped = set(live.updater.stopped)
        removed = masks_after_removal(live, step)
        figures = live.updater.update(step)
        check_links(live, before, stopped, step)
        check_weights(live, before, last)
        for name, layer in live.layers.items():
            union[name] |= layer.mask
        new = sum(int((layer.mask & ~before[name]["mask"]).sum()) for name, layer in live.layers.items())
        if figures["pruned"] == 0:
            gone, now = removed, {name: layer.mask for name, layer in live.layers.items()}
            back = sum(int((before[name]["mask"] & ~gone[name] & now[name]).sum()) for name in now)
            assert figures["regrown"] == new + back
            assert figures["overlap"] == pytest.approx(back / max(1, new + back))
        assert figures["itop"] == pytest.approx(sum(int(u.sum()) for u in union.values()) / positions)
        assert figures["anp"] == pytest.approx(slow_anp(live))


def masks_after_removal(live: Live, step: int) -> dict[str, Tensor]:
    """Masks as they stand before regrowth, caught on their way into it."""
    caught: dict[str, Tensor] = {name: layer.mask.clone() for name, layer in live.layers.items()}
    honest = update._Layer.regrown

    def catch(layer, mask, decayed):
        caught[layer.name] = mask.clone()
        return honest(layer, mask, decayed)

    twin = copy.deepcopy(live.updater)
    with patch.object(update._Layer, "regrown", catch):
        twin.update(step)
    return caught


def check_links(live: Live, before: dict, stopped: set[str], step: int) -> None:
    shapes = {name: tuple(layer.mask.shape) for name, layer in live.layers.items()}
    targets = live.method.targets(shapes, step)
    links = {name: int(layer.mask.sum()) for name, layer in live.layers.items()}
    if live.method.settings.pruning_scope == "global":
        assert sum(links.values()) == sum(target.links for target in targets.values())
        assert min(links.values()) >= 1
    else:
        assert links == {name: target.links for name, target in targets.items()}
    for name in stopped:
        assert torch.equal(live.layers[name].mask, before[name]["mask"])


def check_weights(live: Live, before: dict, last: dict[str, Tensor]) -> None:
    new_weight = live.method.settings.new_weight
    for name, now in live.state().items():
        old = before[name]
        stayed, grown, gone = (
            now["mask"] & old["mask"],
            now["mask"] & ~old["mask"],
            ~now["mask"],
        )
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(now[key][stayed], old[key][stayed])
            assert (now[key][gone] == 0).all()
        assert (now["exp_avg"][grown] == 0).all()
        assert (now["exp_avg_sq"][grown] == 0).all()
        if new_weight == "zero":
            assert (now["weight"][grown] == 0).all()
        elif new_weight == "history":
            assert torch.equal(now["weight"][grown], last[name][grown])
        else:
            assert (now["weight"][grown] != 0).all()


def slow_anp(live: Live) -> float:
    """Section 6 by loops over neurons, swept until nothing changes."""
    settings = live.method.settings
    m = {name.rpartition(".")[2]: layer.mask.clone() for name, layer in live.layers.items()}
    q, k, v, o = (m[f"{name}_proj"] for name in "qkvo")
    gate, up, down = (m[f"{name}_proj"] for name in ("gate", "up", "down"))
    size, group = len(q) // HEADS, HEADS // KV_HEADS
    while True:
        links = sum(int(mask.sum()) for mask in m.values())
        active = total = 0
        for n in range(len(gate)):
            total += 1
            if gate[n].any() and up[n].any() and down[:, n].any():
                active += 1
            else:
                gate[n] = up[n] = down[:, n] = False
        for n in range(len(v)):
            total += 1
            head, place = divmod(n, size)
            columns = [(head * group + i) * size + place for i in range(group)]
            if v[n].any() and o[:, columns].any():
                active += 1
            else:
                v[n] = o[:, columns] = False
        for kv in range(KV_HEADS):
            for place in range(size // 2):
                keys = [kv * size + place, kv * size + place + size // 2]
                dead_everywhere = True
                for i in range(group):
                    total += 1
                    queries = [(kv * group + i) * size + place + half for half in (0, size // 2)]
                    if q[queries].any() and k[keys].any():
                        active += 1
                        dead_everywhere = False
                    else:
                        q[queries] = False
                if dead_everywhere:
                    k[keys] = False
        if settings.dead_heads:
            for kv in range(KV_HEADS):
                silent = [not o[:, h * size : (h + 1) * size].any() for h in range(kv * group, (kv + 1) * group)]
                for i, is_silent in enumerate(silent):
                    if is_silent:
                        h = kv * group + i
                        q[h * size : (h + 1) * size] = False
                if all(silent):
                    k[kv * size : (kv + 1) * size] = False
        if links == sum(int(mask.sum()) for mask in m.values()):
            return active / total


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_masks_and_a_loaded_state_goes_on(case):
    live, other = Live(**CASES[case]), Live(**CASES[case])
    for step in range(1, 31):
        for run in (live, other):
            run.learn(step)
            if run.updater.due(step):
                run.updater.update(step)
        assert live.updater.digest() == other.updater.digest()
    loaded = Live(**CASES[case])
    weights, moments = copy.deepcopy((live.model.state_dict(), live.optim.state_dict()))
    loaded.model.load_state_dict(weights)
    loaded.optim.load_state_dict(moments)
    loaded.updater.own_std = {}
    loaded.updater.load_state_dict(*copy.deepcopy(live.updater.state_dict()))
    for step in range(31, 51):
        for run in (live, loaded):
            run.learn(step)
            if run.updater.due(step):
                run.updater.update(step)
        assert live.updater.digest() == loaded.updater.digest()
        for name, layer in live.layers.items():
            assert torch.equal(layer.weight, loaded.layers[name].weight)
    assert live.updater.stopped == loaded.updater.stopped


def test_gmp_brings_links_back_with_their_remembered_weight():
    live = Live(preset="gmp", sparsity=0.9)
    back = 0
    for step in range(1, UPDATES + 1):
        live.learn(step)
        before = live.state()
        live.updater.update(step)
        for name, layer in live.layers.items():
            grown = layer.mask & ~before[name]["mask"]
            weakest = layer.weight[layer.mask].abs().min()
            assert (layer.weight[grown].abs() >= weakest).all()
            back += int(grown.sum())
    assert back > 0


def test_snfs_grows_the_links_of_the_largest_average_gradient():
    live = Live(preset="snfs", update_interval=5)
    average = {name: torch.zeros_like(layer.weight) for name, layer in live.layers.items()}
    for step in range(1, 6):
        dense = dense_gradients(live, step)
        for name in average:
            average[name] = 0.9 * average[name] + 0.1 * dense[name]
        live.learn(step)
    for name in average:
        torch.testing.assert_close(live.updater.momenta[name], average[name], rtol=1e-4, atol=1e-7)
    check_best_grow(live, {name: value.abs() for name, value in live.updater.momenta.items()}, 5)


def test_rigl_grows_the_links_of_the_largest_gradient_of_a_dense_twin():
    live = Live(preset="rigl")
    dense = dense_gradients(live, 1)
    live.learn(1)
    for name, layer in live.layers.items():
        torch.testing.assert_close(layer.captured, dense[name], rtol=1e-4, atol=1e-7)
    check_best_grow(live, {name: layer.captured.abs().clone() for name, layer in live.layers.items()}, 1)


def dense_gradients(live: Live, step: int) -> dict[str, Tensor]:
    """By autograd, through a dense copy of the model with the same weights."""
    config = live.model.config
    twin = AutoModelForCausalLM.from_config(config)
    twin.load_state_dict(live.model.state_dict())
    tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(step))
    twin(tokens, labels=tokens).loss.backward()
    return {name: twin.get_submodule(name).weight.grad for name in live.layers}


def check_best_grow(live: Live, score: dict[str, Tensor], step: int) -> None:
    before = live.state()
    live.updater.update(step)
    for name, layer in live.layers.items():
        links = int(before[name]["mask"].sum())
        removed = int(live.method.zeta(step) * links)
        size = before[name]["weight"].abs().masked_fill(~before[name]["mask"], -1)
        expected = torch.zeros_like(layer.mask)
        expected.view(-1)[size.view(-1).topk(links - removed)[1]] = True
        best = score[name].masked_fill(expected, -1).view(-1).topk(removed)[1]
        expected.view(-1)[best] = True
        assert torch.equal(layer.mask, expected), name


def test_early_stop_settles_layer_by_layer():
    live = Live(preset="cht", early_stop=0.3)
    seen = []
    for step in range(1, UPDATES + 1):
        live.learn(step)
        before = set(live.updater.stopped)
        figures = live.updater.update(step)
        seen.append(figures["stopped"])
        for name in live.layers:
            overlap = figures["layers"][name]["overlap"]
            assert (name in live.updater.stopped) == (name in before or overlap >= 0.3), (name, overlap)
    assert seen == sorted(seen)
    assert seen[-1] > 0


def test_per_head_every_head_keeps_its_number_of_links():
    live = Live(preset="chts", per_head=True)
    blocks = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}

    def counts() -> dict[str, list[int]]:
        return {
            name: [int(part.sum()) for part in layer.mask.chunk(blocks[name.rpartition(".")[2]])]
            for name, layer in live.layers.items()
            if name.rpartition(".")[2] in blocks
        }

    first = counts()
    for step in range(1, 11):
        live.learn(step)
        live.updater.update(step)
        assert counts() == first


def test_an_update_without_its_gradients_says_what_to_call():
    for preset in ("rigl", "mest"):
        live = Live(preset=preset)
        live.optim.step()
        with pytest.raises(UserError, match=r"needs the dense gradients of that step, .*call `watch\(1\)`"):
            live.updater.update(1)
