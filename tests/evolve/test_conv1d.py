"""GPT-2, whose weights are stored as (in, out), evolves as the same model with nn.Linear in their place."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from llm_cht.evolve.callback import TopologyCallback
from llm_cht.evolve.library import sparsify
from llm_cht.evolve.shards import Whole
from llm_cht.evolve.start import check_start, draw_start
from llm_cht.evolve.updater import TopologyUpdater
from llm_cht.sparse.folder import read_topology, verify_folder
from llm_cht.sparse.surgery import SparseSettings
from llm_cht.sparse.surgery import sparsify as swap
from llm_cht.topology.budget import num_links
from llm_cht.topology.keys import Keys
from llm_cht.topology.method import resolve
from llm_cht.topology.settings import MethodSettings

CONFIG = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=32, bos_token_id=1, eos_token_id=1)
IDS = torch.arange(64).view(4, 16)


def gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(**CONFIG)).eval()


def with_linears(model):
    """The same model with its Conv1D rewritten."""
    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(conv.nx, conv.nf)
        with torch.no_grad():
            linear.weight.copy_(conv.weight.T)
            linear.bias.copy_(conv.bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def calibrate(model):
    model(IDS)


def started(model, seed=3, **settings):
    sparse = swap(model, SparseSettings())
    method = resolve(MethodSettings(sparsity=0.8, update_interval=2, **settings), total_steps=40)
    check_start(sparse, method)
    start = draw_start(sparse, method, seed, calibrate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    updater = TopologyUpdater(sparse, method, Whole(optimizer), seed)
    updater.own_std = start.own_std
    return updater, start


def step(updater, number):
    """An optimizer step by gradients that are functions of layer, step and link, and what follows it."""
    updater.watch(number)
    for name, layer in updater.sparse.layers.items():
        size = layer.mask.numel()
        whole = Keys(7, number, name).normal("gradient", torch.arange(size)).view(layer.out_features, layer.in_features)
        layer.weight.grad = layer.as_stored(whole) * layer.mask
        if layer.captured is not None:
            layer.captured.copy_(layer.as_stored(whole))
    updater.shards.optimizer.step()
    updater.learned(number)
    return updater.update(number) if updater.due(number) else None


def assert_same(conv, linear):
    for name, layer in conv.sparse.layers.items():
        other = linear.sparse.layers[name]
        assert layer.mask.shape == layer.weight.shape == tuple(reversed(other.weight.shape))
        assert torch.equal(layer.as_OI(layer.mask), other.mask), name
        assert torch.equal(layer.as_OI(layer.weight), other.weight), name
        assert not layer.weight[~layer.mask].any()
        for one, two in ((conv.union, linear.union), (conv.history, linear.history), (conv.momenta, linear.momenta)):
            assert one.keys() == two.keys()
            assert name not in one or torch.equal(layer.as_OI(one[name]), two[name])


@pytest.mark.parametrize(
    "settings",
    [
        *({"preset": preset} for preset in ("set", "rigl", "chts", "chtss", "gmp", "granet", "snfs")),
        {"preset": "cht", "initial": "er"},
        {"preset": "chts", "per_head": True, "dead_heads": True, "percolate_bias": "paper"},
        {"preset": "chtss", "new_weight": "init", "initial_weight": "swi"},
        {"preset": "granet", "pruning_scope": "global"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_masks_and_weights_are_those_of_linear_layers(settings):
    conv, start = started(gpt2(), **settings)
    linear, other = started(with_linears(gpt2()), **settings)
    assert start == other
    assert conv.flops(2) == linear.flops(2)
    assert_same(conv, linear)
    first = conv.digest()
    for number in range(1, 11):
        figures, expected = step(conv, number), step(linear, number)
        assert_same(conv, linear)
        if figures is not None:
            told = {key for key in figures if not key.startswith("seconds")}
            assert {key: figures[key] for key in told} == {key: expected[key] for key in told}
    assert conv.digest() != first


@pytest.mark.parametrize("initial", ["brf", "bsw", "bsf", "csti", "checkpoint"])
@pytest.mark.parametrize("weight", ["keep", "kaiming"])
def test_starts_are_those_of_linear_layers(initial, weight):
    settings = {"preset": "static", "initial": initial, "initial_weight": weight, "pruning": "relative_importance"}
    conv, start = started(gpt2(), **settings)
    linear, other = started(with_linears(gpt2()), **settings)
    assert start == other
    assert_same(conv, linear)


def test_first_weights_are_as_wide_as_the_inputs_ask_for():
    updater, _ = started(gpt2(), preset="static", initial_weight="kaiming")
    for layer in updater.sparse.layers.values():
        std = layer.weight[layer.mask].std() * layer.in_features**0.5
        assert abs(std - 1) < 0.2
        assert num_links((layer.out_features, layer.in_features), 0.2) == int(layer.mask.sum())


def test_a_state_and_a_file_bring_the_links_back(tmp_path):
    updater, _ = started(gpt2(), preset="chts")
    for number in range(1, 5):
        step(updater, number)
    again, _ = started(gpt2(), seed=4, preset="chts")
    again.load_state_dict(*updater.state_dict())
    assert again.digest() == updater.digest()
    assert all(torch.equal(again.union[name], union) for name, union in updater.union.items())

    model = gpt2()
    topology = sparsify(model, {"preset": "chts", "sparsity": 0.8})
    model.save_pretrained(tmp_path)
    topology.save_topology(tmp_path)
    assert verify_folder(tmp_path).keys() == topology.sparse.layers.keys()
    written = read_topology(tmp_path)
    assert written.transposed == topology.sparse.layers.keys()
    restored, _ = started(gpt2(), preset="static", initial="file", initial_path=str(tmp_path))
    for name, layer in topology.sparse.layers.items():
        assert written.masks_OI[name].shape == (layer.out_features, layer.in_features)
        assert torch.equal(restored.sparse.layers[name].mask, layer.mask)


def test_a_plain_loop_learns():
    model = gpt2().train()
    topology = sparsify(model, {"preset": "chts", "sparsity": 0.7, "update_interval": 5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updater = topology.updater(optimizer, total_steps=30)
    first, losses = updater.digest(), []
    for number in range(1, 31):
        updater.watch(number)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.after(number)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert updater.digest() != first
    for layer in topology.sparse.layers.values():
        assert not layer.weight[~layer.mask].any()
        assert not optimizer.state[layer.weight]["exp_avg"][~layer.mask].any()
    assert topology.density == pytest.approx(0.3, abs=1e-3)


def trained_by_a_trainer(folder, resume=None):
    """20 steps; the Trainer saves after 10 and 20."""
    model = gpt2()
    topology = sparsify(model, {"preset": "rigl", "sparsity": 0.8, "update_interval": 3})
    options = {"max_steps": 20, "save_steps": 10, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **options, per_device_train_batch_size=2, learning_rate=3e-3),
        train_dataset=rows,
        callbacks=[TopologyCallback(topology)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_a_trainer_resumes_bit_for_bit_and_its_checkpoints_are_stock_ones(tmp_path):
    whole = trained_by_a_trainer(tmp_path)
    resumed = trained_by_a_trainer(tmp_path, resume=str(tmp_path / "checkpoint-10"))
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-20", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(IDS).logits, whole.eval()(IDS).logits)
    counts = verify_folder(tmp_path / "checkpoint-20")
    assert all(
        count.links == num_links(read_topology(tmp_path / "checkpoint-20").masks[n].shape, 0.2)
        for n, count in counts.items()
    )
