"""Sparse training in the ``Trainer`` of transformers: a small LLaMA on the text of the Python standard library.

    python launch/hf_trainer.py --output_dir runs/trainer --max_steps 200
    python launch/hf_trainer.py --output_dir runs/trainer --max_steps 200 --resume_from_checkpoint true
    accelerate launch --config_file launch/accelerate/zero2.yaml --num_processes 2 launch/hf_trainer.py ...

All options are those of ``TrainingArguments``, and ``--preset``, ``--sparsity``, ``--update_interval``. On
machines without a GPU add ``--use_cpu true``, and under a launcher ``--ddp_backend gloo``. What makes it sparse is the
two lines marked below; model, data and arguments are anybody's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from llm_cht import TopologyCallback, sparsify
from llm_cht.data.settings import DataSettings
from llm_cht.data.text import load_text
from llm_cht.errors import UserError


@dataclass
class Method:
    """What is trained."""

    preset: str = "chts"
    sparsity: float = 0.9
    update_interval: int = 20
    source: str = "builtin"
    """text: files, or the Python standard library"""
    sequence_length: int = 128


class Sequences(Dataset):
    """The training sequences as the Trainer wants them."""

    def __init__(self, source: str, length: int) -> None:
        self.data = load_text(DataSettings(source=source, vocab_size=2048, sequence_length=length), seed=0)

    def __len__(self) -> int:
        return len(self.data.train)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {name: rows[0] for name, rows in self.data.train.batch(number, 1).items()}


def main() -> None:
    """Train, and save a stock model folder with its topology."""
    parser: Any = HfArgumentParser((Method, TrainingArguments))  # type: ignore[arg-type]
    method, arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help lists those there are")
    set_seed(arguments.seed)
    sequences = Sequences(method.source, method.sequence_length)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(sequences.data.tokenizer), **sizes))

    config = {"preset": method.preset, "sparsity": method.sparsity, "update_interval": method.update_interval}
    topology = sparsify(model, config, seed=arguments.seed)  # one
    callback = TopologyCallback(topology)  # and two, among the callbacks

    trainer = Trainer(model, arguments, train_dataset=sequences, callbacks=[callback])
    resume = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": False}.get(str(resume).lower(), resume))
    trainer.save_model(f"{arguments.output_dir}/model")
    if trainer.is_world_process_zero():
        sequences.data.tokenizer.save_pretrained(f"{arguments.output_dir}/model")
        topology.save_topology(f"{arguments.output_dir}/model", trainer.state.global_step)
        updates = f"after {len(callback.figures)} updates since this start"
        print(f"density {topology.density:.4f} {updates}: {arguments.output_dir}/model")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"hf_trainer: error: {error}", file=sys.stderr)
        sys.exit(2)
