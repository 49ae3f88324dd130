"""What every rank of ``test_configs.py`` runs: ``settled.py FOLDER``. Writes what the started engine really is.

Only rank 0 writes, to FOLDER/settled.json; under DeepSpeed it is asked, not the config that it was given.
"""

import json
import sys
from pathlib import Path

import torch

from llm_cht import dist
from llm_cht.train.engine import Engine, EngineSettings, start_engine

SETTINGS = EngineSettings("cpu", "bf16", 8, 2, 0.5, 60.0, False)


def settled(engine: Engine) -> dict[str, object]:
    model = torch.nn.Linear(6, 4)
    forward, shards = engine.prepare(model, model, torch.optim.AdamW(model.parameters(), lr=0.01))
    if not engine.zero_stage:
        return {}
    return {
        "stage": forward.zero_optimization_stage(),
        "micro": forward.train_micro_batch_size_per_gpu(),
        "batch": forward.train_batch_size(),
        "passes": forward.gradient_accumulation_steps(),
        "clip": forward.gradient_clipping(),
        "precision": str(next(model.parameters()).dtype),
        "offload": bool(getattr(forward.optimizer, "cpu_offload", False)),
        "optimizer": type(shards.optimizer).__name__,
    }


if __name__ == "__main__":
    started = start_engine(SETTINGS)
    told = {"engine": started.name, "ranks": dist.world_size()} | settled(started)
    if dist.is_main():
        (Path(sys.argv[1]) / "settled.json").write_text(json.dumps(told))
    dist.close()
