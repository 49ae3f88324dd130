"""The first topology of a live model: what each start looks at, and what is refused before anything is changed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht.errors import UserError
from llm_cht.evolve.start import check_start, draw_start
from llm_cht.sparse.folder import write_topology
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.budget import num_links
from llm_cht.topology.correlated import correlation
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TOKENS = torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(0))


def make(preset="set", sizes=SIZES, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    return sparsify(model, SparseSettings()), resolve(MethodSettings(preset, update_interval=10, **settings), 100)


def calibrate(model) -> None:
    for rows in TOKENS.split(2):
        model(rows)


def masks_of(sparse) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in sparse.layers.items()}


def test_csti_links_correlated_inputs_in_the_layers_that_see_the_input():
    sparse, method = make(initial="csti")
    model = sparse.model
    with torch.no_grad():  # what q, k and v of the first block read
        samples = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS))
    expected = correlation(samples).abs()
    draw_start(sparse, method, 3, calibrate)
    best = expected.view(-1).topk(num_links((32, 32), 0.1)).indices
    for kind in "qkv":
        mask = sparse.layers[f"model.layers.0.self_attn.{kind}_proj"].mask
        assert set(mask.view(-1).nonzero().squeeze(1).tolist()) == set(best.tolist())
    er, at_random = make(initial="er")
    draw_start(er, at_random, 3)
    for name, layer in sparse.layers.items():
        if "layers.0.self_attn" not in name or name.endswith("o_proj"):
            assert torch.equal(layer.mask, er.layers[name].mask), name


def test_csti_in_every_layer_looks_at_the_input_of_each():
    sparse, method = make(initial="csti", csti_inner=True, sizes=SIZES | {"intermediate_size": 32})
    caught = {}
    name = "model.layers.1.mlp.down_proj"
    hook = sparse.layers[name].register_forward_pre_hook(lambda _, inputs: caught.setdefault(0, []).append(inputs[0]))
    calibrate(sparse.model)
    hook.remove()
    expected = correlation(torch.cat(caught[0]).detach()).abs()
    draw_start(sparse, method, 3, calibrate)
    best = expected.view(-1).topk(num_links((32, 32), 0.1)).indices
    assert set(sparse.layers[name].mask.view(-1).nonzero().squeeze(1).tolist()) == set(best.tolist())


def test_csti_refuses_what_it_cannot_do():
    sparse, method = make(initial="csti")
    before = {name: layer.weight.clone() for name, layer in sparse.layers.items()}
    with pytest.raises(UserError, match=r"`method.initial: csti` needs calibration samples"):
        draw_start(sparse, method, 0)
    grouped, method = make(initial="csti", sizes=SIZES | {"num_key_value_heads": 2})
    with pytest.raises(UserError, match=r"k_proj.*multiple"):
        draw_start(grouped, method, 0, calibrate)
    assert all(layer.mask.all() and torch.equal(layer.weight, before[name]) for name, layer in sparse.layers.items())
    assert all(layer.mask.all() for layer in grouped.layers.values())


def test_equal_partition_levels_only_the_layers_that_see_the_input():
    sparse, method = make(initial="bsf", bsf_equal_partition=True, sparsity=0.8)
    draw_start(sparse, method, 0, calibrate)
    for name, layer in sparse.layers.items():
        degrees = layer.mask.sum(dim=0)
        first = "layers.0.self_attn" in name and not name.endswith("o_proj")
        assert (int(degrees.max() - degrees.min()) <= 1) == first, name


def test_a_file_gives_the_links_of_a_finished_run(tmp_path):
    sparse, method = make("chts")
    draw_start(sparse, method, 1)
    write_topology(tmp_path, masks_of(sparse), "chts", 70)
    again, static = make("static", initial="file", initial_path=str(tmp_path))
    first = {name: layer.weight.clone() for name, layer in again.layers.items()}
    draw_start(again, static, 2)
    for name, layer in again.layers.items():
        assert torch.equal(layer.mask, sparse.layers[name].mask)
        assert torch.equal(layer.weight, first[name] * layer.mask)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    sparse, method = make("chts")
    draw_start(sparse, method, 1)
    write_topology(tmp_path, masks_of(sparse), "chts", 70)
    wider, static = make("static", initial="file", initial_path=str(tmp_path), sizes=SIZES | {"intermediate_size": 96})
    with pytest.raises(UserError, match=r"its links are those of another model, `.*mlp.*` differs"):
        check_start(wider, static)
    denser, static = make("static", initial="file", initial_path=str(tmp_path), sparsity=0.5)
    with pytest.raises(UserError, match=r"links"):
        draw_start(denser, static, 0)
    assert all(layer.mask.all() for layer in denser.layers.values())
    missing, static = make("static", initial="file", initial_path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="none"):
        check_start(missing, static)


def test_a_checkpoint_keeps_its_strongest_links():
    sparse, method = make("static", initial="checkpoint")
    weights = {name: layer.weight.clone() for name, layer in sparse.layers.items()}
    draw_start(sparse, method, 0)
    for name, layer in sparse.layers.items():
        limit = weights[name][~layer.mask].abs().max()
        assert (layer.weight[layer.mask].abs() >= limit).all()


@pytest.mark.parametrize("rule", ["keep", "swi", "kaiming", "scaled"])
def test_first_weights_have_the_width_of_their_rule(rule):
    sparse, method = make("static", initial_weight=rule, initial_gain=2.0, sizes=SIZES | {"intermediate_size": 512})
    name = "model.layers.0.mlp.down_proj"
    own = sparse.layers[name].weight.std().item()
    start = draw_start(sparse, method, 0)
    assert start.own_std[name] == pytest.approx(own, rel=0.01)
    layer = sparse.layers[name]
    assert (layer.weight[~layer.mask] == 0).all()
    expected = {"keep": own, "scaled": own / 0.1**0.5, "swi": 2 / (0.1 * 512) ** 0.5, "kaiming": 2 / 512**0.5}[rule]
    assert layer.weight[layer.mask].std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("budget", ["er", "erk"])
def test_budgets_share_out_one_density(budget):
    sparse, method = make("set", budget=budget, sparsity=0.9)
    draw_start(sparse, method, 0)
    links = sum(int(layer.mask.sum()) for layer in sparse.layers.values())
    positions = sum(layer.mask.numel() for layer in sparse.layers.values())
    assert links == num_links((1, positions), 0.1)
    assert len({layer.mask.float().mean().item() for layer in sparse.layers.values()}) > 1
