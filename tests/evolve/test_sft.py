"""TRL's SFTTrainer with sparse training, by the same two lines as the Trainer it derives from."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_cht import TopologyCallback, sparsify
from llm_cht.sparse.folder import read_topology, verify_folder

trl = pytest.importorskip("trl")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TALKS = [
    {
        "prompt": [{"role": "user", "content": f"what is {n} times {n}?"}],
        "completion": [{"role": "assistant", "content": f"{n} times {n} is {n * n}"}],
    }
    for n in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    bare.train_from_iterator([message["content"] for talk in TALKS for message in talk["prompt"]], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>")
    whole.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}{% endfor %}"
    return whole


def trained(folder, tokenizer, resume=None, **more):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **SIZES))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    topology = sparsify(model, {"preset": "chts", "sparsity": 0.6, "update_interval": 4})
    plain = {"max_steps": 20, "save_steps": 10, "logging_steps": 5, "use_cpu": True, "report_to": []}
    settings = trl.SFTConfig(
        str(folder), per_device_train_batch_size=2, max_length=48, learning_rate=3e-3, disable_tqdm=True, **plain | more
    )
    callback = TopologyCallback(topology)
    data = Dataset.from_list(TALKS)
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    assert any(not torch.equal(weight, start[name]) for name, weight in model.state_dict().items())
    return trainer, topology, callback


@pytest.mark.parametrize("packing", [False, True])  # bf16 and gradient checkpointing are its defaults
def test_the_trainer_of_trl_trains_holds_the_masks_and_resumes_as_unbroken(tmp_path, tokenizer, packing):
    trainer, topology, callback = trained(tmp_path, tokenizer, packing=packing)
    assert [figures["step"] for figures in callback.figures] == [4, 8, 12]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert topology.density == pytest.approx(0.4, abs=0.01)
    for layer in topology.sparse.layers.values():
        assert int((layer.weight.detach() != 0).logical_and(~layer.mask).sum()) == 0
    assert set(verify_folder(tmp_path / "checkpoint-20")) == set(topology.sparse.layers)
    _, again, later = trained(tmp_path, tokenizer, resume=str(tmp_path / "checkpoint-10"), packing=packing)
    assert [figures["step"] for figures in later.figures] == [12]
    whole, resumed = topology.sparse.model.state_dict(), again.sparse.model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    masks = read_topology(tmp_path / "checkpoint-20").masks
    assert all(torch.equal(layer.mask, masks[name]) for name, layer in again.sparse.layers.items())
