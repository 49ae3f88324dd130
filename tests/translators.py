"""Small untrained translators of three families, with a tokenizer trained on made-up sentences."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

POSITIONS = 64
SMALL = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.5,  # far from uniform predictions, so that there is a best hypothesis and it may end early
}


def sentences(number: int, seed: int = 0) -> list[str]:
    """Made-up sentences of 1 to 12 words; punctuation, a number and a letter beyond ASCII among them."""
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "tu", "ze", "rö"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(60)] + ["7", "1999", "Ka,", "Zé"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 12))) + "." for _ in range(number)]


def new_tokenizer(folder: Path, separate: bool = False) -> MarianTokenizer:
    """A MarianTokenizer whose files stand in ``folder``; ``separate``: its target vocabulary is a smaller one."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, size in (("source", 90), ("target", 70 if separate else 90)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(500)), model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2
        )
        (folder / f"{side}.spm").write_bytes(model.getvalue())
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
        order = ["</s>", "<unk>", "<pad>", *(p for p in pieces if p not in ("<s>", "</s>", "<unk>"))]
        name = "vocab.json" if side == "source" else "target_vocab.json"
        (folder / name).write_text(json.dumps({piece: number for number, piece in enumerate(order)}))
    return MarianTokenizer(
        *(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")),
        target_vocab_file=str(folder / "target_vocab.json") if separate else None,
        separate_vocabs=separate,
        model_max_length=POSITIONS,
    )


def new_model(family: str, tokenizer: MarianTokenizer, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An untrained `marian`, `t5` or `bart`; ``changes`` of its config."""
    torch.manual_seed(seed)
    size, pad, end = len(tokenizer.encoder), tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {"vocab_size": size, "pad_token_id": pad, "eos_token_id": end, "decoder_start_token_id": pad}
    if family == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 3.0}
        return T5ForConditionalGeneration(T5Config(**special | sizes | changes)).eval()
    config, model = {"marian": (MarianConfig, MarianMTModel), "bart": (BartConfig, BartForConditionalGeneration)}[
        family
    ]
    begun = {"bos_token_id": end, "forced_bos_token_id": None} if family == "bart" else {}
    return model(config(**special | SMALL | {"forced_eos_token_id": end} | begun | changes)).eval()
