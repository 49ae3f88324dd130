"""Surgery: what is swapped, that nothing changes before every check passed, and the groups that come out."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_cht.errors import UserError
from llm_cht.sparse.linear import SparseLinear
from llm_cht.sparse.surgery import SparseSettings, sparsify
from llm_cht.topology.percolate import Mlp, QueryKey, ValueOutput


def llama(**overrides):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | overrides)))


def unchanged(model: nn.Module) -> bool:
    return not any(isinstance(module, SparseLinear) for module in model.modules())


def test_a_llama_is_swapped_in_its_seven_projections_and_gives_the_same_logits():
    model = llama(num_key_value_heads=2)
    tokens = torch.arange(8).unsqueeze(0)
    before, state = model(tokens).logits, set(model.state_dict())
    sparse = sparsify(model, SparseSettings())
    assert len(sparse.layers) == 14
    assert sparse.dense == ("lm_head",)
    assert set(model.state_dict()) == state
    assert torch.equal(model(tokens).logits, before)
    attention, mlp = sparse.groups[:2]
    a, m = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert attention.layers == tuple(f"{a}.{x}_proj" for x in "qkvo")
    assert attention.units == (
        QueryKey(f"{a}.q_proj", f"{a}.k_proj", 4, 2, "rotary"),
        ValueOutput(f"{a}.v_proj", f"{a}.o_proj", 4, 2),
    )
    assert mlp.units == (Mlp((f"{m}.gate_proj", f"{m}.up_proj"), f"{m}.down_proj"),)
    assert "14 with" in sparse.report()
    assert "lm_head" in sparse.report()


def test_an_excluded_layer_stays_dense_and_its_units_do_not_percolate():
    sparse = sparsify(llama(), SparseSettings(exclude=[r"k_proj", r"layers\.1\."]))
    assert len(sparse.layers) == 6
    assert [type(unit) for group in sparse.groups for unit in group.units] == [ValueOutput, Mlp]


def test_an_activation_that_does_not_keep_zero_has_no_mlp_unit():
    sparse = sparsify(llama(hidden_act="sigmoid"), SparseSettings())
    assert not any(isinstance(unit, Mlp) for group in sparse.groups for unit in group.units)


def test_include_makes_an_unknown_family_work_without_percolation():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparse = sparsify(model, SparseSettings(include=["^0$"]))
    assert list(sparse.layers) == ["0"]
    assert isinstance(model[0], SparseLinear)
    assert not isinstance(model[2], SparseLinear)
    assert sparse.groups[0].units == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SparseSettings(include=["nothing"]), r"`sparse.include`: 'nothing' matches no linear layer .*q_proj"),
        (SparseSettings(exclude=["nothing"]), r"`sparse.exclude`: 'nothing' matches no linear layer"),
        (SparseSettings(exclude=["proj"]), r"`sparse.exclude` .* leaves none of the 14"),
    ],
)
def test_patterns_that_match_nothing(settings, message):
    model = llama()
    with pytest.raises(UserError, match=message):
        sparsify(model, settings)
    assert unchanged(model)


def test_a_shared_weight_is_refused_before_anything_changes():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.* is shared .*layers\.1\.mlp\.up_proj"):
        sparsify(model, SparseSettings())
    assert unchanged(model)


def test_a_tied_output_layer_is_refused_when_chosen():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.*shared.*embed_tokens"):
        sparsify(model, SparseSettings(include=["proj", "lm_head"]))
    assert unchanged(model)
    sparsify(model, SparseSettings())


def test_a_model_is_sparsified_once():
    model = llama()
    sparsify(model, SparseSettings())
    with pytest.raises(UserError, match="sparse already"):
        sparsify(model, SparseSettings())


def test_other_kinds_of_linear_layer_are_refused_by_name():
    class Quantised(nn.Linear):
        pass

    model = llama()
    model.model.layers[0].mlp.up_proj = Quantised(16, 24, bias=False)
    with pytest.raises(UserError, match=r"up_proj` is Quantised"):
        sparsify(model, SparseSettings())
    assert unchanged(model)
