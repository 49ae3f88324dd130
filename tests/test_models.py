"""Translation models from configs and checkpoints: sizes and special tokens of the vocabulary, and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from llm_cht.errors import UserError
from llm_cht.models import ModelSettings, build_model
from llm_cht.vocabulary import Vocabulary

JOINT = Vocabulary(source=40, target=40, pad=3, eos=2, joint=True)
SEPARATE = Vocabulary(source=40, target=50, pad=3, eos=2, joint=False)
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
T5 = "model_type: t5\nd_model: 16\nd_kv: 4\nd_ff: 24\nnum_layers: 1\nnum_heads: 2\n"
BART = "model_type: bart\n" + "".join(f"{key}: {value}\n" for key, value in SIZES.items())


def build(vocabulary=None, config="marian_2m", kind="seq2seq", **overrides):
    sizes = SIZES if config == "marian_2m" else {}
    return build_model(ModelSettings(config=str(config), overrides=sizes | overrides), 0, kind, vocabulary)


def written(folder, text):
    path = folder / "model.yaml"
    path.write_text(text)
    return path


def learns(model, vocabulary):
    """Loss and gradients of a padded batch are finite, and ``generate`` stays within the vocabulary."""
    source = torch.randint(4, vocabulary.source, (3, 7))
    labels = torch.randint(4, vocabulary.target, (3, 6))
    labels[0, 4:] = -100
    model(input_ids=source, attention_mask=torch.ones_like(source), labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    out = model.generate(source, num_beams=2, max_length=9)
    assert out.max() < vocabulary.target
    assert out[:, 0].tolist() == [model.config.decoder_start_token_id] * 3
    return True


def test_a_joint_vocabulary_makes_one_tied_table():
    model = build(JOINT)
    config = model.config
    assert (config.vocab_size, config.decoder_vocab_size, config.share_encoder_decoder_embeddings) == (40, 40, True)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (3, 2, 3)
    assert config.forced_eos_token_id == 2
    tables = [model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head]
    assert len({id(table.weight) for table in tables}) == 1
    generation = model.generation_config
    assert (generation.pad_token_id, generation.eos_token_id, generation.decoder_start_token_id) == (3, 2, 3)
    assert (generation.forced_eos_token_id, generation.suppress_tokens, generation.max_length) == (2, [3], 256)
    assert learns(model, JOINT)


def test_separate_vocabularies_make_a_table_each_and_the_output_layer_is_tied_to_the_decoder():
    model = build(SEPARATE)
    assert model.get_input_embeddings().weight.shape == (50, 16)  # the larger size for both
    assert model.lm_head.weight.shape == (50, 16)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.final_logits_bias.shape == (1, 50)
    assert learns(model, SEPARATE)
    assert model.generation_config.suppress_tokens == [3]
    assert model.model.encoder.embed_tokens.weight is not model.model.decoder.embed_tokens.weight
    larger_source = build(Vocabulary(source=54, target=50, pad=3, eos=2, joint=False))
    assert larger_source.generation_config.suppress_tokens == [3, 50, 51, 52, 53]
    with torch.no_grad():
        larger_source.final_logits_bias[:, 50:] = 100
    assert learns(larger_source, SEPARATE)
    untied = build(SEPARATE, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.decoder.embed_tokens.weight


@pytest.mark.parametrize(("text", "start"), [(T5, "pad"), (BART, "eos")], ids=["t5", "bart"])
def test_other_types_start_as_their_stock_models_do(tmp_path, text, start):
    model = build(JOINT, written(tmp_path, text))
    assert model.config.decoder_start_token_id == getattr(JOINT, start)
    assert model.lm_head.weight.shape == (40, 16)
    assert learns(model, JOINT)


def test_what_the_user_says_stays():
    model = build(JOINT, vocab_size=64, share_encoder_decoder_embeddings=False)
    assert model.get_input_embeddings().weight is not model.lm_head.weight
    assert model.lm_head.weight.shape == (64, 16)
    assert build(JOINT, vocab_size=64).lm_head.weight.shape == (64, 16)


def test_a_config_of_another_tokenizer_takes_the_new_one(tmp_path):
    other = Vocabulary(source=99, target=99, pad=98, eos=0, joint=True)
    build(other).save_pretrained(tmp_path / "stock")
    model = build(SEPARATE, tmp_path / "stock")
    assert (model.config.vocab_size, model.config.decoder_vocab_size, model.config.pad_token_id) == (50, 50, 3)
    assert model.config.encoder_ffn_dim == 24
    assert learns(model, SEPARATE)


def test_random_weights_are_a_function_of_the_seed():
    first, again = build(JOINT).state_dict(), build(JOINT).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("vocabulary", "overrides", "message"),
    [
        (JOINT, {"vocab_size": 30}, r"`vocab_size` = 30 is too small for a vocabulary of 40"),
        (SEPARATE, {"vocab_size": 64, "decoder_vocab_size": 56}, r"beam search .* equal; set `vocab_size` alone"),
        (JOINT, {"pad_token_id": 5}, r"`pad_token_id` = 5, the tokenizer has 3"),
        (SEPARATE, {"share_encoder_decoder_embeddings": True}, r"one table .*`pairs\.joint: true`"),
        (None, {"vocab_size": 40}, r"cannot work: AssertionError: Padding_idx"),
        (JOINT, {"d_model": 18}, r"cannot work: .*divisible by num_heads"),
    ],
)
def test_sizes_and_tokens_that_do_not_fit(vocabulary, overrides, message):
    with pytest.raises(UserError, match=message):
        build(vocabulary, **overrides)


def test_one_table_for_two_vocabularies(tmp_path):
    with pytest.raises(UserError, match=r"T5Config has one table of embeddings .*`pairs\.joint: true`"):
        build(SEPARATE, written(tmp_path, T5))


def test_a_model_of_the_other_task(tmp_path):
    with pytest.raises(UserError, match=r"'llama_9m': a model without encoder .*`task: language_modelling`"):
        build(JOINT, "llama_9m")
    with pytest.raises(UserError, match=r"'marian_2m': a model with encoder and decoder.*`task: translation`"):
        build(kind="causal")
    build(JOINT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"`model\.path`.*with encoder and decoder.*`task: translation`"):
        build_model(ModelSettings(path=str(tmp_path)), 0)


def load(folder, vocabulary):
    return build_model(ModelSettings(path=str(folder)), 0, "seq2seq", vocabulary)


def test_a_checkpoint_keeps_its_tables_and_fits_or_is_refused(tmp_path):
    build(JOINT, vocab_size=64).save_pretrained(tmp_path)
    model = load(tmp_path, JOINT)
    assert model.get_input_embeddings().weight.shape == (64, 16)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.{stack}coder.embed_positions.weight" for stack in ("en", "de")]  # loading forgets it
    wrong = {
        r"does not match the checkpoint: 70 source tokens, 64 embeddings": Vocabulary(70, 70, 3, 2, joint=True),
        r"does not match the checkpoint: its `eos_token_id` is 2, the tokenizer's 1": Vocabulary(40, 40, 3, 1, True),
        r"one table of embeddings": Vocabulary(40, 50, 3, 2, joint=False),
    }
    for message, vocabulary in wrong.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path, vocabulary)
    build(SEPARATE).save_pretrained(tmp_path / "separate")
    load(tmp_path / "separate", SEPARATE)
    with pytest.raises(UserError, match="51 target tokens, 50 embeddings"):
        load(tmp_path / "separate", Vocabulary(40, 51, 3, 2, joint=False))
