"""Percolation: hand masks for every rule, and float64 logits of tiny LLaMAs that do not change."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_cht.topology.percolate import Group, Mlp, QueryKey, Rows, ValueOutput, percolate, with_dead_heads

NO_BIAS: frozenset[str] = frozenset()


def mask(*rows: str) -> Tensor:
    """``mask("x.", "..")``: x is a link."""
    return torch.tensor([[position == "x" for position in row] for row in rows])


def run(unit, masks: dict[str, Tensor], has_bias: frozenset[str] = NO_BIAS):
    new, active, total = percolate(Group("g", tuple(masks), (unit,)), masks, has_bias)
    return {name: ["".join("x" if link else "." for link in row) for row in new[name].tolist()] for name in new}, (
        active,
        total,
    )


def test_plain_mlp_by_hand():
    # hidden neurons: 0 lives, 1 has no input, 2 no output, 3 neither
    masks = {"fc1": mask("xx", "..", "x.", ".."), "fc2": mask("xx..", "x...")}
    new, counts = run(Mlp(("fc1",), "fc2"), masks)
    assert new == {"fc1": ["xx", "..", "..", ".."], "fc2": ["x...", "x..."]}
    assert counts == (1, 4)


def test_gated_mlp_by_hand():
    # hidden neurons: 0 lives, 1 lacks its gate row, 2 its up row, 3 its down column
    masks = {"gate": mask("x.", "..", ".x", "xx"), "up": mask(".x", "x.", "..", "x."), "down": mask("xxx.", ".x..")}
    new, counts = run(Mlp(("gate", "up"), "down"), masks)
    assert new == {"gate": ["x.", "..", "..", ".."], "up": [".x", "..", "..", ".."], "down": ["x...", "...."]}
    assert counts == (1, 4)


def test_rows_with_a_bias_are_never_empty():
    masks = {"fc1": mask("xx", "..", "x."), "fc2": mask("xx.")}
    new, counts = run(Mlp(("fc1",), "fc2"), masks, frozenset({"fc1"}))
    assert new == {"fc1": ["xx", "..", ".."], "fc2": ["xx."]}  # neuron 1 sends act(bias); 2 is not heard
    assert counts == (2, 3)


def test_a_bias_behind_the_unit_changes_nothing():
    masks = {"fc1": mask("xx", "..", "x."), "fc2": mask("xx.")}
    assert run(Mlp(("fc1",), "fc2"), masks, frozenset({"fc2"})) == run(Mlp(("fc1",), "fc2"), masks)


def test_value_rows_feed_every_query_head_of_their_group():
    # 4 query heads of 1 position, 2 value rows: row 0 feeds columns 0 and 1, row 1 feeds columns 2 and 3
    unit = ValueOutput("v", "o", num_heads=4, num_kv_heads=2)
    heard_by_one = {"v": mask("x.", ".x"), "o": mask("x..x", "...x")}
    new, counts = run(unit, heard_by_one)
    assert new == {"v": ["x.", ".x"], "o": ["x..x", "...x"]}
    assert counts == (2, 2)
    new, counts = run(unit, {"v": mask("x.", ".."), "o": mask("..x.", "...x")})  # row 0 unheard, row 1 empty
    assert new == {"v": ["..", ".."], "o": ["....", "...."]}
    assert counts == (0, 2)


def test_value_heads_keep_their_positions():
    # 2 heads of 2 positions, one value head: position 0 is heard in head 1 only, position 1 in none
    masks = {"v": mask("x", "x"), "o": mask("..x.")}
    new, counts = run(ValueOutput("v", "o", num_heads=2, num_kv_heads=1), masks)
    assert new == {"v": ["x", "."], "o": ["..x."]}
    assert counts == (1, 2)


def test_query_and_key_by_position():
    # one head of 4: position 0 lives, 1 lacks its key, 2 its query, 3 both
    masks = {"q": mask("x", "x", ".", "."), "k": mask("x", ".", "x", ".")}
    new, counts = run(QueryKey("q", "k", 1, 1, "position"), masks)
    assert new == {"q": ["x", ".", ".", "."], "k": ["x", ".", ".", "."]}
    assert counts == (1, 4)


def test_rotary_pairs_are_half_a_head_apart():
    # pairs (0, 2) and (1, 3); q has rows 0 and 1, k has row 2: the pair (0, 2) passes signal, (1, 3) does not
    masks = {"q": mask("x", "x", ".", "."), "k": mask(".", ".", "x", ".")}
    new, counts = run(QueryKey("q", "k", 1, 1, "rotary"), masks)
    assert new == {"q": ["x", ".", ".", "."], "k": [".", ".", "x", "."]}
    assert counts == (1, 2)


def test_partial_rotary_pairs_rows_at_the_front_of_the_head():
    # heads of 6, of which 4 are mixed: pairs (0, 2) and (1, 3), then rows 4 and 5 alone
    masks = {"q": mask("x", ".", ".", ".", "x", "x"), "k": mask(".", "x", "x", "x", ".", "x")}
    new, counts = run(QueryKey("q", "k", 1, 1, "rotary", 4), masks)
    assert new == {"q": ["x", ".", ".", ".", ".", "x"], "k": [".", ".", "x", ".", ".", "x"]}
    assert counts == (2, 4)


def test_parts_of_a_layer_are_percolated_and_put_back():
    # 2 heads of 2 rows in one layer; head 0 lacks the key of position 1, head 1 the query of position 0
    by_head = mask("x.", ".x", "xx", "..", "..", "x.", ".x", "xx")  # q0 q0 k0 k0 q1 q1 k1 k1
    in_turn = mask("x.", ".x", "..", "x.", "xx", "..", ".x", "xx")  # q0 q0 q1 q1 k0 k0 k1 k1
    unit = QueryKey("qk/q", "qk/k", 2, 2, "position")
    cuts = {
        "by head": (by_head, {"qk/q": Rows("qk", 2, 0, 2), "qk/k": Rows("qk", 2, 2, 4)}, [0, 2, 5, 7]),
        "in turn": (in_turn, {"qk/q": Rows("qk", 1, 0, 4), "qk/k": Rows("qk", 1, 4, 8)}, [0, 3, 4, 7]),
    }
    for fused, parts, living in cuts.values():
        before = fused.clone()
        group = Group("g", ("qk",), (unit,), parts=parts)
        new, active, total = percolate(group, {"qk": fused}, NO_BIAS)
        expected = torch.zeros_like(fused)
        expected[living] = before[living]
        assert list(new) == ["qk"]
        assert torch.equal(new["qk"], expected)
        assert torch.equal(fused, before)
        assert (active, total) == (2, 4)
        biased, *counts = percolate(group, {"qk": fused}, frozenset({"qk"}))
        assert torch.equal(biased["qk"], fused)  # no row of a part is empty either
        assert counts == [4, 4]


@pytest.mark.parametrize("pairing", ["rotary", "position"])
def test_a_key_row_lives_while_one_query_head_of_its_group_needs_it(pairing: str):
    # 2 heads of 2 rows share one key head; only head 1 has query rows
    masks = {"q": mask(".", ".", "x", "x"), "k": mask("x", "x")}
    new, counts = run(QueryKey("q", "k", 2, 1, pairing), masks)
    assert new == {"q": [".", ".", "x", "x"], "k": ["x", "x"]}
    assert counts == ((1, 2) if pairing == "rotary" else (2, 4))
    new, _ = run(QueryKey("q", "k", 2, 1, pairing), {"q": masks["q"], "k": mask(".", ".")})
    assert new["q"] == ["."] * 4


def test_a_stack_of_units_is_swept_until_it_is_stable():
    # fc3 hears neuron 0 of the second layer only, so neuron 1 of the first, which feeds the other one, dies as well
    masks = {"fc1": mask("x", "x"), "fc2": mask("x.", ".x"), "fc3": mask("x.")}
    units = (Mlp(("fc1",), "fc2"), Mlp(("fc2",), "fc3"))
    new, active, total = percolate(Group("g", tuple(masks), units), masks, NO_BIAS)
    assert [new[name].tolist() for name in masks] == [
        [[True], [False]],
        [[True, False], [False, False]],
        [[True, False]],
    ]
    assert (active, total) == (2, 4)


def test_without_units_nothing_percolates():
    masks = {"a": mask("..", "x.")}
    new, active, total = percolate(Group("a", ("a",), ()), masks, NO_BIAS)
    assert torch.equal(new["a"], masks["a"])
    assert (active, total) == (0, 0)


def llama(num_kv_heads: int, **changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=60,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=12,
        vocab_size=64,
        max_position_embeddings=32,
        **changes,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # large, so that what is lost shows in the logits; biases are not 0
    return model


def groups(num_kv_heads: int, pairing: str) -> list[Group]:
    found = []
    for layer in range(3):
        q, k, v, o = (f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"model.layers.{layer}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        units = (QueryKey(q, k, 4, num_kv_heads, pairing), ValueOutput(v, o, 4, num_kv_heads))
        found.append(Group(f"attention {layer}", (q, k, v, o), units))
        found.append(Group(f"mlp {layer}", (gate, up, down), (Mlp((gate, up), down),)))
    return found


def logits(model: LlamaForCausalLM, masks: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        for name, links in masks.items():
            model.get_submodule(name).weight *= links
        return model(torch.arange(40).view(2, 20)).logits


def sparse_masks(model: LlamaForCausalLM, density: float) -> dict[str, Tensor]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    generator = torch.Generator().manual_seed(1)
    shapes = {name: model.get_submodule(name).weight.shape for name in linears}
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    # chance hardly ever silences a neuron in all query heads of a group, so that some of every kind are emptied
    heads = {"q_proj": [0, 6], "k_proj": [1, 7], "v_proj": [1]}
    for name, links in masks.items():
        kind = name.rpartition(".")[2]
        if kind in heads:
            links.view(-1, 12, 48)[:, heads[kind]] = False
        elif kind == "o_proj":
            links.view(48, 4, 12)[:, :, 0] = False
        elif kind == "gate_proj":
            links[:2] = False
        elif kind == "down_proj":
            links[:, 2:4] = False
    return masks


def percolated(masks: dict[str, Tensor], num_kv_heads: int, pairing: str, has_bias: frozenset[str] = NO_BIAS):
    new: dict[str, Tensor] = {}
    for group in groups(num_kv_heads, pairing):
        new |= percolate(group, masks, has_bias)[0]
    assert new.keys() == masks.keys()
    return new


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("density", [0.03, 0.05, 0.1])
def test_logits_do_not_change(num_kv_heads: int, density: float):
    model = llama(num_kv_heads)
    before = sparse_masks(model, density)
    after = percolated(before, num_kv_heads, "rotary")
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        lost = sum(int((links & ~after[name]).sum()) for name, links in before.items() if name.endswith(kind))
        assert lost > 0, kind
    expected = logits(model, before)
    assert expected.std() > 0.1
    assert torch.equal(logits(model, after), expected)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_with_biases_do_not_change_but_under_the_papers_rule(num_kv_heads: int):
    model = llama(num_kv_heads, attention_bias=True, mlp_bias=True)
    before = sparse_masks(model, 0.03)
    exact = percolated(before, num_kv_heads, "rotary", frozenset(before))
    assert any(not torch.equal(exact[name], before[name]) for name in before)
    expected = logits(model, before)
    assert torch.equal(logits(model, exact), expected)
    paper = percolated(before, num_kv_heads, "rotary")
    assert (logits(model, paper) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_pairing_by_position_changes_logits_under_rotary_embeddings(num_kv_heads: int):
    model = llama(num_kv_heads)
    before = sparse_masks(model, 0.05)
    expected = logits(model, before)
    assert (logits(model, percolated(before, num_kv_heads, "position")) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("pairing", ["rotary", "position"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_idempotent_pure_and_only_removing(num_kv_heads: int, pairing: str):
    masks = sparse_masks(llama(num_kv_heads), 0.04)
    copies = {name: links.clone() for name, links in masks.items()}
    for group in groups(num_kv_heads, pairing):
        once, active, total = percolate(group, masks, NO_BIAS)
        twice, *counts = percolate(group, once, NO_BIAS)
        assert all(torch.equal(once[name], twice[name]) for name in group.layers)
        assert counts == [active, total]
        assert 0 < active < total
        assert not any((once[name] & ~masks[name]).any() for name in group.layers)
    assert all(torch.equal(masks[name], copies[name]) for name in masks)


def test_neurons_of_grouped_query_attention():
    # 4 heads of 12: value rows of the key/value heads; query pairs of the query heads
    full = {name: torch.ones_like(links) for name, links in sparse_masks(llama(2), 0.5).items()}
    attention, mlp = groups(2, "rotary")[:2]
    assert percolate(attention, full, NO_BIAS)[1:] == (4 * 6 + 2 * 12,) * 2
    assert percolate(mlp, full, NO_BIAS)[1:] == (60, 60)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_dead_heads_lose_queries_and_keys_and_logits_do_not_change(num_kv_heads: int):
    model = llama(num_kv_heads)
    masks = sparse_masks(model, 0.3)
    for name, links in masks.items():
        if name.endswith("o_proj"):
            links[:, :24] = False  # the first two heads reach no output
    before = logits(model, masks)
    new: dict[str, Tensor] = {}
    counted = []
    for group in groups(num_kv_heads, "rotary"):
        whole = replace(group, units=with_dead_heads(group.units))
        masks_of_group, *neurons = percolate(whole, masks, NO_BIAS)
        new |= masks_of_group
        counted.append((neurons[1], percolate(group, masks, NO_BIAS)[2]))
    assert all(with_heads == without for with_heads, without in counted)
    group_size = 4 // num_kv_heads
    dead_keys = 2 // group_size * 12
    for name, links in new.items():
        if name.endswith("q_proj"):
            assert not links[:24].any()
            assert links[24:].any()
        if name.endswith("k_proj"):
            assert not links[:dead_keys].any()
            assert links[dead_keys:].any()
    torch.testing.assert_close(logits(model, new), before, rtol=0, atol=1e-10)
