"""Sparse training in the ``Trainer`` of transformers: a small LLaMA on the text of the Python standard library.

    python launch/hf_trainer.py --output_dir runs/trainer --max_steps 200
    python launch/hf_trainer.py --output_dir runs/trainer --max_steps 200 --resume_from_checkpoint true
    accelerate launch --config_file launch/accelerate/zero2.yaml --num_processes 2 launch/hf_trainer.py ...

All options are those of ``TrainingArguments``, and those of ``Method`` below (``--preset``, ``--sparsity``, ...). On
machines without a GPU add ``--use_cpu true``, and under a launcher ``--ddp_backend gloo``. What makes it sparse is the
two lines marked below; model, data and arguments are anybody's. A folder with checkpoints is gone on with or left
alone: the Trainer itself would begin anew and write between them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

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
    end_step: int | None = None
    """last step with an update; 0.75 of the training. Given, a resumed training may have another length"""
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


def checkpoint_of(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on with, None for a new training, which needs an output folder without checkpoints."""
    folder = Path(str(arguments.output_dir))
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    wanted = str(arguments.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        if last:
            raise UserError(
                f"{last} is of an earlier training: go on with it by `--resume_from_checkpoint true`, or name another "
                "`--output_dir`"
            )
        return None
    if wanted.lower() != "true":
        if not Path(wanted).is_dir():
            raise UserError(f"`--resume_from_checkpoint` {wanted}: there is no such folder; name one, or `true`")
        return wanted
    if last is None:
        raise UserError(f"{folder} has no checkpoint to resume from; leave `--resume_from_checkpoint` out")
    return last


def main() -> None:
    """Train, and save a stock model folder with its topology."""
    parser: Any = HfArgumentParser((Method, TrainingArguments))  # type: ignore[arg-type]
    method, arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help lists those there are")
    resume = checkpoint_of(arguments)
    set_seed(arguments.seed)
    sequences = Sequences(method.source, method.sequence_length)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(sequences.data.tokenizer), **sizes))

    keys = ("preset", "sparsity", "update_interval", "end_step")
    config = {key: getattr(method, key) for key in keys}
    topology = sparsify(model, config, seed=arguments.seed)  # one
    callback = TopologyCallback(topology, resume_from=resume)  # and two, among the callbacks

    tokenizer = sequences.data.tokenizer
    trainer = Trainer(model, arguments, train_dataset=sequences, processing_class=tokenizer, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{arguments.output_dir}/model")
    if trainer.is_world_process_zero():
        topology.save_topology(f"{arguments.output_dir}/model", trainer.state.global_step)
        updates = f"after {len(callback.figures)} updates since this start"
        print(f"density {topology.density:.4f} {updates}: {arguments.output_dir}/model")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"hf_trainer: error: {error}", file=sys.stderr)
        sys.exit(2)
