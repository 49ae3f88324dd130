"""The updater on a live model: what new, surviving and removed links have in weight, moments and history; its state."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht.errors import UserError
from llm_cht.evolve.shards import Whole
from llm_cht.evolve.start import draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.budget import num_links
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings


def make(preset="chts", seed=0, optimizer=torch.optim.AdamW, **overrides):
    """A tiny LLaMA with grouped-query attention, its optimizer and its updater, started."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    sparse = sparsify(model, SparseSettings())
    optim = optimizer(model.parameters(), lr=1e-2)
    method = resolve(MethodSettings(preset=preset, sparsity=0.8, update_interval=5, **overrides), total_steps=100)
    draw_start(sparse, method, seed)
    updater = TopologyUpdater(sparse, method, Whole(optim), seed)
    return model, optim, updater


def train(model, optim, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 64, (4, 16), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        optim.step()
        optim.zero_grad()


def assert_zero_off_the_masks(optim, updater) -> None:
    for layer in updater.sparse.layers.values():
        off = ~layer.mask
        assert (layer.weight[off] == 0).all()
        for key in ("exp_avg", "exp_avg_sq"):
            assert (optim.state[layer.weight][key][off] == 0).all()


@pytest.mark.parametrize("preset", ["static", "set", "chts", "chtss"])
def test_start_draws_exact_counts_and_zeroes_the_rest(preset):
    _, _, updater = make(preset)
    for name, layer in updater.sparse.layers.items():
        assert int(layer.mask.sum()) == num_links(layer.mask.shape, updater.method.density(0))
        assert torch.equal(layer.weight != 0, layer.mask)
        assert torch.equal(updater.union[name], layer.mask)


@pytest.mark.parametrize("preset", ["set", "chts", "chtss"])
def test_weights_and_moments_after_each_update(preset):
    model, optim, updater = make(preset)
    for step in range(5, 76, 5):
        train(model, optim, 5, seed=step)
        before = {
            name: (layer.mask.clone(), layer.weight.clone(), optim.state[layer.weight]["exp_avg"].clone())
            for name, layer in updater.sparse.layers.items()
        }
        figures = updater.update(step)
        assert_zero_off_the_masks(optim, updater)
        for name, layer in updater.sparse.layers.items():
            mask, weight, moment = before[name]
            stayed, grown = mask & layer.mask, layer.mask & ~mask
            state = optim.state[layer.weight]
            assert torch.equal(layer.weight[stayed], weight[stayed])
            assert torch.equal(state["exp_avg"][stayed], moment[stayed])
            assert grown.any()
            assert (state["exp_avg"][grown] == 0).all()
            assert (state["exp_avg_sq"][grown] == 0).all()
            if preset == "set":
                assert (layer.weight[grown] == 0).all()
        links = sum(int(layer.mask.sum()) for layer in updater.sparse.layers.values())
        positions = sum(layer.mask.numel() for layer in updater.sparse.layers.values())
        assert figures["density"] == links / positions
        train(model, optim, 1)
        assert_zero_off_the_masks(optim, updater)


def test_history_gives_a_returning_link_its_last_weight():
    model, optim, updater = make("chts")
    last = {name: torch.zeros_like(layer.weight) for name, layer in updater.sparse.layers.items()}
    restored = 0
    for step in range(5, 76, 5):
        train(model, optim, 5, seed=step)
        before = {name: layer.mask.clone() for name, layer in updater.sparse.layers.items()}
        for name, layer in updater.sparse.layers.items():
            last[name] = torch.where(layer.mask, layer.weight.detach(), last[name])
        updater.update(step)
        for name, layer in updater.sparse.layers.items():
            grown = layer.mask & ~before[name]
            assert torch.equal(layer.weight[grown], last[name][grown])
            restored += int((layer.weight[grown] != 0).sum())
    assert restored > 0


def test_rigl_grows_the_links_of_the_largest_dense_gradient():
    model, optim, updater = make("rigl")
    train(model, optim, 4)
    updater.watch(4)
    assert all(layer.captured is None for layer in updater.sparse.layers.values())  # no update follows step 4
    updater.watch(5)
    train(model, optim, 1)
    layers = updater.sparse.layers
    gradients = {name: layer.captured.abs() for name, layer in layers.items()}
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    size = {name: layer.weight.detach().abs().clone() for name, layer in layers.items()}
    updater.update(5)
    for name, layer in layers.items():
        removed = int(updater.method.zeta(5) * int(before[name].sum()))
        kept = torch.zeros_like(before[name])
        kept.view(-1)[size[name].masked_fill(~before[name], -1).view(-1).topk(int(before[name].sum()) - removed)[1]] = 1
        best = gradients[name].masked_fill(kept, -1).view(-1).topk(removed)[1]
        expected = kept.clone()
        expected.view(-1)[best] = True
        assert torch.equal(layer.mask, expected), name
        assert layer.captured is None


def test_figures_equal_a_slow_recount():
    model, optim, updater = make("chts")
    union = {name: layer.mask.clone() for name, layer in updater.sparse.layers.items()}
    for step in range(5, 26, 5):
        train(model, optim, 5, seed=step)
        before = {name: layer.mask.clone() for name, layer in updater.sparse.layers.items()}
        figures = updater.update(step)
        for name, layer in updater.sparse.layers.items():
            union[name] |= layer.mask
        rates = [u.float().mean().item() for u in union.values()]
        assert figures["itop_mean"] == pytest.approx(sum(rates) / len(rates))
        total = sum(u.numel() for u in union.values())
        assert figures["itop"] == pytest.approx(sum(int(u.sum()) for u in union.values()) / total)
        new = sum(int((layer.mask & ~before[name]).sum()) for name, layer in updater.sparse.layers.items())
        returned = round(figures["overlap"] * figures["regrown"])
        assert new == figures["regrown"] - returned
        assert figures["regrown"] == figures["removed"] + figures["percolated"]
        assert 0 < figures["anp"] <= 1


@pytest.mark.parametrize("preset", ["set", "chts", "chtss"])
def test_a_loaded_updater_goes_on_bit_for_bit(preset):
    model, optim, updater = make(preset)
    for step in range(5, 41, 5):
        train(model, optim, 5, seed=step)
        updater.update(step)
    tensors, values = updater.state_dict()
    weights, moments = copy.deepcopy((model.state_dict(), optim.state_dict()))  # torch hands out and takes live tensors

    model2, optim2, updater2 = make(preset)
    model2.load_state_dict(weights)
    optim2.load_state_dict(moments)
    updater2.load_state_dict(tensors, values)
    assert updater2.last_update == updater.last_update == 40
    for step in range(45, 61, 5):
        for m, o, u in ((model, optim, updater), (model2, optim2, updater2)):
            train(m, o, 5, seed=step)
            u.update(step)
        assert updater.digest() == updater2.digest()
        for a, b in zip(model.parameters(), model2.parameters(), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(updater.union[name], updater2.union[name]) for name in updater.union)


def test_a_state_of_other_layers_or_with_a_changed_mask_is_refused():
    _, _, updater = make()
    tensors, values = updater.state_dict()
    name = next(key for key in tensors if key.startswith("mask."))
    flipped = tensors | {name: tensors[name] ^ 1}
    with pytest.raises(UserError, match="digest"):
        updater.load_state_dict(flipped, values)
    del tensors[name]
    with pytest.raises(UserError, match=r"sparse layers differ .*q_proj"):
        updater.load_state_dict(tensors, values)


def test_an_optimizer_with_unknown_state_is_refused():
    model, optim, updater = make("set", optimizer=torch.optim.RMSprop)
    train(model, optim, 1)
    with pytest.raises(UserError, match=r"RMSprop keeps \['square_avg'\]"):
        updater.update(5)


def test_a_density_that_leaves_no_link_names_the_layer():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    sparse = sparsify(model, SparseSettings())
    method = resolve(MethodSettings(sparsity=0.9999, update_interval=5), 100)
    with pytest.raises(UserError, match=r"`method.sparsity` = 0.9999 leaves no link in `.*q_proj`"):
        draw_start(sparse, method, 0)
