"""What every rank of ``test_decode.py`` runs: ``translate_ranks.py FOLDER OUT``, under accelerate launch or alone."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from llm_cht import dist
from llm_cht.train.decode import DecodeSettings, translate
from llm_cht.train.engine import EngineSettings, start_engine
from llm_cht.train.optim import OptimizerSettings, build_optimizer
from tests.translators import new_model, sentences

SOURCES = ["", *sentences(40, 7), " "]
SETTINGS = {
    "odd number of batches": DecodeSettings(batch_tokens=100),
    "one batch": DecodeSettings(batch_tokens=10_000),
    "greedy": DecodeSettings(beams=1, batch_tokens=100),
}

if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    engine = start_engine(EngineSettings("cpu", "fp32", 8, None, 1.0, 120.0, False))
    model = new_model("marian", tokenizer).train()
    engine.prepare(model, model, build_optimizer(model, OptimizerSettings()))
    calls = []
    model.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    told = {}
    for name, settings in SETTINGS.items():
        calls.clear()
        hypotheses = translate(model, tokenizer, SOURCES, settings, collective=True, autocast=engine.autocast)
        told[name] = {"hypotheses": hypotheses, "calls": len(calls)}
    everybody = dist.gather(told | {"engine": engine.name, "training": model.training})
    if dist.is_main():
        Path(sys.argv[2]).write_text(json.dumps(everybody))
    dist.close()
