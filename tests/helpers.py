"""A run small enough for a test, through the real command line, and what a refused one must look like."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


WORDS = "the a link mask layer grows moves learns sparse dense model token path weight and then of in"


def write_text(folder: Path, num_documents: int = 400) -> Path:
    """A file of short made-up documents, one a paragraph; the same words in a new order each time."""
    words = WORDS.split()
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(num_documents)))
    return path


def tiny_config(folder: Path, **sections: Any) -> Path:
    """Writes a config of a run of some seconds; a keyword replaces or extends a section (or a plain setting)."""
    config: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {"config": "llama_9m", "overrides": dict(MODEL)},
        "data": {
            "source": str(write_text(folder)),
            "vocab_size": 300,
            "sequence_length": 32,
            "validation_fraction": 0.1,
        },
        "method": {"preset": "chts", "sparsity": 0.8, "update_interval": 3},
        "lr": {"warmup_steps": 2, "rewarm_steps": 2},
        "train": {"steps": 20, "batch_size": 4, "precision": "fp32", "device": "cpu"},
        "validation": {"every": 10, "max_tokens": 2000},
        "checkpoint": {"every": 5},
        "metrics": {"every": 1},
    }
    return _written(folder, config, sections)


def _written(folder: Path, config: dict[str, Any], sections: dict[str, Any]) -> Path:
    for name, value in sections.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    """Starts ``llm-cht`` with ``arguments``; output is captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "llm_cht.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, waited for."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in the metrics of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def learned(run: Path) -> tuple[bytes, bytes, list[float]]:
    """What must be equal for two runs to be the same: final weights, final masks, and every loss."""
    weights = (run / "model" / "model.safetensors").read_bytes()
    masks = run / "model" / "topology.safetensors"
    losses = [record["loss"] for record in records(run, "train")]
    return weights, masks.read_bytes(), losses


def digest(folder: Path) -> dict[str, str]:
    """What is in a folder: the hash of every file, and every empty folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def told(code: int, err: str, *parts: str) -> None:
    """A command ended with 2 and one message, the last line of standard error, which holds ``parts``."""
    lines = err.strip().splitlines()
    assert code == 2, (code, err)
    assert [line.startswith("llm-cht: error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("llm-cht: error: "), err
    assert "Traceback" not in err, err
    for part in parts:
        assert part in lines[-1], (part, lines[-1])


PAIR_MODEL = {
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_pairs(folder: Path, num_pairs: int = 400) -> Path:
    """Aligned files PREFIX.en and PREFIX.de of made-up sentences: each word has a translation, the order is turned."""
    words = WORDS.split()
    draw = random.Random(0)
    sources = [draw.choices(words, k=draw.randint(3, 12)) for _ in range(num_pairs)]
    for name, start, stop in (("train", 0, num_pairs - 40), ("valid", -40, -20), ("test", -20, None)):
        lines = sources[start:stop]
        (folder / f"{name}.en").write_text("".join(" ".join(line) + ".\n" for line in lines))
        turned = (" ".join(word[::-1] for word in reversed(line)) for line in lines)
        (folder / f"{name}.de").write_text("".join(f"{line}.\n" for line in turned))
    return folder / "train"


def tiny_translation(folder: Path, **sections: Any) -> Path:
    """As ``tiny_config``, of a translation model."""
    prefix = str(write_pairs(folder)).removesuffix("train")
    config: dict[str, Any] = {
        "run": str(folder / "run"),
        "task": "translation",
        "model": {"config": "marian_2m", "overrides": dict(PAIR_MODEL)},
        "pairs": {
            "train": f"{prefix}train",
            "validation": f"{prefix}valid",
            "test": f"{prefix}test",
            "vocab_size": 120,
        },
        "method": {"preset": "chts", "sparsity": 0.7, "update_interval": 3},
        "optimizer": {"lr": 0.5, "beta2": 0.998},
        "lr": {"schedule": "inoam", "warmup_steps": 4, "rewarm_steps": 2},
        "train": {"steps": 20, "batch_tokens": 300, "precision": "fp32", "device": "cpu", "label_smoothing": 0.1},
        "validation": {"every": 10, "bleu_pairs": 8},
        "checkpoint": {"every": 5},
        "metrics": {"every": 1},
    }
    return _written(folder, config, sections)
