"""The Trainer's many options with sparse training: what works holds the masks, what would train wrongly is refused."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LambdaLR, SequentialLR, StepLR
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations import TensorBoardCallback

from llm_cht import SparseSettings, TopologyCallback, sparsify
from llm_cht.errors import UserError
from llm_cht.sparse.folder import read_topology, verify_folder
from tests.evolve.trainer_parts import arguments, fresh, off_the_masks, rows


def made(folder, method=None, seed=0, kind=Trainer, how=None, **options):
    """A Trainer whose model is sparse, the topology and the callback, made as ``how`` says."""
    model = fresh()
    topology = sparsify(model, {"preset": "set", "sparsity": 0.6, "update_interval": 3} | (method or {}), seed=seed)
    callback = TopologyCallback(topology, **(how or {}))
    data = {"train_dataset": rows(), "eval_dataset": rows()[:8]}
    return kind(model, arguments(folder, **options), callbacks=[callback], **data), topology, callback


def same(first, second):
    first, second = first.sparse.model.state_dict(), second.sparse.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def saved(tmp_path):
    """A training of 12 steps with updates up to step 9, saved after 4 and 8."""
    trainer, topology, _ = made(tmp_path / "run")
    trainer.train()
    return tmp_path / "run", topology


# ---- resume ----


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_steps": 24}, r"`end_step` = 9 there and 18 here.*12 there, 24 here.*`end_step: 9`"),
        ({"method": {"zeta": 0.2}}, r"`zeta` = 0.1 there and 0.2 here: give `sparsify` what was saved$"),
        ({"method": {"preset": "rigl"}}, r"`preset` = 'set' there and 'rigl' here.*`regrowth` = 'random' there"),
        ({"seed": 1}, r"`seed` = 0 there and 1 here"),
        ({"method": {"end_step": 0}}, r"`end_step` = 9 there and 0 here"),
        ({"how": {"rewarm_steps": 0}}, r"`rewarm_steps` = 3 there and 0 here"),
    ],
)
def test_another_method_is_refused_on_resume(saved, change, told):
    folder, _ = saved
    with pytest.raises(UserError, match=told):
        made(folder, **change)[0].train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_another_length_is_accepted_where_the_schedule_does_not_hang_on_it(saved, tmp_path):
    folder, topology = saved
    trainer, longer, callback = made(folder, {"end_step": 9, "workspace_mb": 64}, max_steps=16)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert [figures["step"] for figures in callback.figures] == [9]
    assert all(torch.equal(layer.mask, longer.sparse.layers[n].mask) for n, layer in topology.sparse.layers.items())
    made(tmp_path / "still", {"preset": "static"})[0].train()  # no update, so nothing hangs on the length
    still = str(tmp_path / "still" / "checkpoint-8")
    made(tmp_path / "still", {"preset": "static"}, max_steps=16)[0].train(resume_from_checkpoint=still)


def test_steps_of_other_regrowth_are_compared_as_they_were_given(tmp_path):
    method = {"regrowth_from": {6: "gradient"}}
    first = made(tmp_path, method)
    first[0].train()
    second = made(tmp_path, method)
    second[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(first[1], second[1])


def test_a_checkpoint_that_does_not_tell_its_method_is_taken_with_a_warning(saved):
    folder, topology = saved
    file = folder / "checkpoint-4" / "topology_state.json"
    values = json.loads(file.read_text())
    for key in ("settings", "total_steps", "save_only_model"):
        del values[key]
    file.write_text(json.dumps(values))
    trainer, resumed, _ = made(folder)
    with pytest.warns(UserWarning, match="did not note the method"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert same(topology, resumed)
    file.write_text("{")
    with pytest.raises(UserError, match=r"topology_state\.json is damaged"):
        made(folder)[0].train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_weights_alone_are_no_checkpoint_to_resume_from_but_a_model(tmp_path):
    trainer, topology, _ = made(tmp_path, save_only_model=True)
    trainer.train()
    assert set(verify_folder(tmp_path / "checkpoint-12")) == set(topology.sparse.layers)
    with pytest.raises(UserError, match=r"save_only_model.*moments.*initial: file"):
        made(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    start = {"preset": "set", "initial": "file", "initial_path": str(tmp_path / "checkpoint-12"), "update_interval": 3}
    again = sparsify(model, start | {"sparsity": 0.6, "initial_weight": "keep"})
    assert same(topology, again)
    masks = read_topology(tmp_path / "checkpoint-12").masks
    assert all(torch.equal(layer.mask, masks[name]) for name, layer in again.sparse.layers.items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True, "gradient_checkpointing": True},
        {"max_steps": -1, "num_train_epochs": 0.375},
        {"train_sampling_strategy": "group_by_length"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4, "optim": "sgd"},
    ],
)
def test_options_that_work_are_resumed_as_unbroken(tmp_path, options):
    trainer, topology, callback = made(tmp_path, {"preset": "chts"}, **options)
    trainer.train()
    assert [figures["step"] for figures in callback.figures] == [3, 6, 9]
    assert off_the_masks(topology) == 0
    second, resumed, _ = made(tmp_path, {"preset": "chts"}, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(topology, resumed)


# ---- what else the Trainer does with a model ----


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_model_comes_back_with_its_links(tmp_path, strategy):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options = best | {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": strategy, "save_only_model": True}
    trainer, topology, _ = made(tmp_path, learning_rate=3e-3, save_total_limit=1, **options)
    trainer.train()
    folder = tmp_path / "checkpoint-4"  # the loss falls: the highest is the first
    assert trainer.state.best_model_checkpoint == str(folder)
    assert off_the_masks(topology) == 0
    masks = read_topology(folder).masks
    assert all(torch.equal(layer.mask, masks[name]) for name, layer in topology.sparse.layers.items())
    trainer.args.load_best_model_at_end, trainer.args.save_total_limit = False, 2
    trainer.train()  # with the optimizer of before, whose moments off these links are gone
    assert off_the_masks(topology) == 0
    if strategy == "steps":
        assert verify_folder(tmp_path / "checkpoint-12")


@pytest.mark.parametrize(
    "kind",
    [
        lambda optimizer: StepLR(optimizer, 4),
        lambda optimizer: ExponentialLR(optimizer, 0.9),
        lambda optimizer: CosineAnnealingLR(optimizer, 12),
        lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), CosineAnnealingLR(optimizer, 8)], [4]),
    ],
)
def test_no_scheduler_notices_the_climbs(tmp_path, kind):
    """Many reckon a rate from the last one."""
    rates = []
    for climbs in (3, 0):
        trainer, topology, callback = made(tmp_path / str(climbs), how={"rewarm_steps": climbs})
        optimizer = torch.optim.SGD(topology.sparse.model.parameters(), lr=0.01)
        trainer.optimizer, trainer.lr_scheduler = optimizer, kind(optimizer)
        trainer.train()
        rates.append([trainer.lr_scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]])
        assert len(callback.figures) == 3
    assert rates[0] == rates[1]


def test_figures_are_in_the_history_and_in_integrations_behind_the_callback(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer, topology, callback = made(tmp_path, logging_steps=2)
    trainer.add_callback(TensorBoardCallback)
    trainer.evaluate()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["topology/density"] for entry in logs] == [round(topology.density, 6)] * 6
    assert [entry["step"] for entry in logs if "topology/removed" in entry] == [4, 6, 10]  # updates at 3, 6, 9
    assert logs[1]["topology/removed"] == callback.figures[0]["removed"] > 0
    written = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert written[0]["topology/density"] == logs[0]["topology/density"]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events.parent))
    curves.Reload()
    (density,) = (tag for tag in curves.Tags()["scalars"] if tag.endswith("topology/density"))
    assert [event.step for event in curves.Scalars(density)] == [2, 4, 6, 8, 10, 12]


class OutOfMemory(Trainer):
    """Fails once, in the second step."""

    calls = 0

    def training_step(self, *inputs, **more):
        self.calls += 1
        if self.calls == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(*inputs, **more)


def test_a_training_that_begins_again_with_a_smaller_batch(tmp_path):
    trainer, topology, callback = made(tmp_path, {"preset": "rigl"}, kind=OutOfMemory, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [figures["step"] for figures in callback.figures] == [3, 6, 9]
    assert off_the_masks(topology) == 0


def test_a_second_training_goes_on_with_the_links_unless_it_would_need_more_of_them(tmp_path):
    trainer, topology, callback = made(tmp_path)
    trainer.train()
    trainer.train()
    assert [figures["step"] for figures in callback.figures] == [3, 6, 9] * 2
    assert off_the_masks(topology) == 0
    trainer, _, _ = made(tmp_path, {"preset": "gmp"})
    trainer.train()
    with pytest.raises(UserError, match=r"trained already.*density is 0.3996.*began at 0.5"):
        trainer.train()


def test_models_that_would_not_learn_sparsely(tmp_path):
    _, topology, _ = made(tmp_path)
    searched = Trainer(
        model_init=lambda _: fresh(),
        args=arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[TopologyCallback(topology)],
    )
    with pytest.raises(UserError, match="no `model_init`"):
        searched.train()
    trainer, topology, _ = made(tmp_path)
    topology.sparse.layers["model.layers.1.mlp.up_proj"].weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj` is frozen.*exclude"):
        trainer.train()
    model = fresh()
    model.model.layers[0].requires_grad_(False)
    topology = sparsify(model, {"preset": "set", "update_interval": 3}, SparseSettings(exclude=[r"layers\.0\."]))
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[TopologyCallback(topology)]).train()
    trainer, topology, _ = made(tmp_path)  # as an adapter does
    wrapped = nn.Sequential(topology.sparse.layers["model.layers.0.mlp.up_proj"])
    trainer.model.model.layers[0].mlp.up_proj = wrapped
    with pytest.raises(UserError, match=r"up_proj` was replaced after `sparsify`.*adapters"):
        trainer.train()


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for wrap, told in ((peft.get_peft_model, "has PEFT adapters"), (peft.inject_adapter_in_model, "was replaced")):
        model = fresh()
        topology = sparsify(model, {"preset": "set", "update_interval": 3})
        model = wrap(model, adapters) if wrap is peft.get_peft_model else wrap(adapters, model)
        with pytest.raises(UserError, match=told):
            Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[TopologyCallback(topology)]).train()


def test_arguments_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`enable_jit_checkpoint`.*without the topology"):
        made(tmp_path, enable_jit_checkpoint=True)[0].train()
    with pytest.raises(UserError, match=r"Adafactor keeps.*use Adam, AdamW or SGD"):
        made(tmp_path, optim="adafactor")[0].train()


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"sparsty.*sparsity"):
        sparsify(fresh(), {"sparsty": 0.9})
    with pytest.raises(UserError, match="dense"):
        sparsify(fresh(), {"preset": "dense"})
    for steps in (-1, 101):
        with pytest.raises(UserError, match=rf"rewarm_steps` = {steps}.*update_interval` = 100"):
            TopologyCallback(sparsify(fresh(), {"preset": "set"}), rewarm_steps=steps)
    often = {"preset": "set", "update_interval": 4}
    assert TopologyCallback(sparsify(fresh(), often)).rewarm_steps == 4  # the rate must reach its peak
    assert TopologyCallback(sparsify(fresh(), {"preset": "set"})).rewarm_steps == 20
    topology, other = sparsify(fresh(), {"preset": "set", "update_interval": 4}), fresh()
    with pytest.raises(UserError, match="not the one that was sparsified"):
        Trainer(other, arguments(tmp_path), train_dataset=rows(), callbacks=[TopologyCallback(topology)]).train()
    model = fresh()
    Trainer(model, arguments(tmp_path / "dense"), train_dataset=rows()).train()
    callback = TopologyCallback(sparsify(model, {"preset": "set", "update_interval": 4}))
    trainer = Trainer(model, arguments(tmp_path / "dense"), train_dataset=rows(), callbacks=[callback])
    with pytest.raises(UserError, match=r"topology_state.json is missing.*resume_from"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-8"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["set", "rigl"])
def test_a_compiled_model_trains_as_the_plain_one(tmp_path, preset):
    plain, compiled = made(tmp_path, {"preset": preset}), made(tmp_path, {"preset": preset}, torch_compile=True)
    for trainer, topology, _ in (plain, compiled):
        trainer.train()
        assert off_the_masks(topology) == 0
    for name, layer in plain[1].sparse.layers.items():
        assert torch.equal(layer.mask, compiled[1].sparse.layers[name].mask)
        torch.testing.assert_close(layer.weight, compiled[1].sparse.layers[name].weight, rtol=0, atol=1e-6)


def test_a_limit_that_could_cost_the_last_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`save_total_limit` = 1: .*give 2"):
        made(tmp_path, save_total_limit=1)[0].train()


def test_a_checkpoint_of_another_folder_must_be_named_twice(saved, tmp_path):
    """With the same step in both folders the topology of one would go with the weights of the other."""
    folder, _ = saved
    other = tmp_path / "other"
    made(other, {"zeta": 0.5})[0].train()
    with pytest.raises(UserError, match=r"lie off its mask; .*resume_from=FOLDER|`zeta` = 0.5 there"):
        made(other)[0].train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    again = tmp_path / "again"
    made(again, learning_rate=3e-2)[0].train()
    with pytest.raises(UserError, match=r"lie off its mask; .*resume_from=FOLDER"):
        made(again)[0].train(resume_from_checkpoint=str(folder / "checkpoint-8"))
