"""The shipped base model: files, tokenizer, and what pretraining taught it."""

from __future__ import annotations

import json
from collections import defaultdict
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.builtin import MODEL_DIR
from fastppo.builtin.corpus import build_corpus, is_reserved
from fastppo.builtin.genres import PROMPT_WORDS
from fastppo.builtin.phenomena import PHENOMENA, make_pair

TRAIN, DEV = build_corpus()
TEXTS = [
    "",
    " ",
    "Tabs\tand\n\nlines \r\n",
    "emoji 🙂👩‍👩‍👧 é 漢字 العربية",
    "  two  spaces ",
    "\x00\x7f\ufffd",
    "I'm; you're_so (odd)!?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_files_are_small_and_name_no_machine() -> None:
    files = {path.name: path for path in MODEL_DIR.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(
        files
    )
    assert sum(path.stat().st_size for path in files.values()) <= 6_000_000
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads(files[name].read_text())
        assert not content.get("_name_or_path") and not content.get("name_or_path")
        assert not any(isinstance(v, str) and v.startswith(("/", "~", "http")) for v in content.values())


def test_shape(model) -> None:
    assert model.config.model_type == "llama" and model.config.tie_word_embeddings
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(MODEL_DIR / "model.safetensors").values())
    loaded = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    assert loaded.dtype == torch.float32  # what fastppo trains it in on a CPU: an exported adapter then fits


def test_special_tokens(tokenizer, model) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    ids = tokenizer("The dogs sleep.").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids


def test_answers_are_single_tokens(tokenizer) -> None:
    answers = [tokenizer(word, add_special_tokens=False).input_ids for word in (" yes", " no")]
    assert all(len(ids) == 1 for ids in answers) and answers[0] != answers[1]
    with_prompt = tokenizer(PROMPT_WORDS + " yes").input_ids
    assert with_prompt == tokenizer(PROMPT_WORDS).input_ids + answers[0]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentences_and_prompt_are_short(tokenizer) -> None:
    lengths = [len(ids) - 1 for ids in tokenizer([s.text for s in TRAIN]).input_ids]
    assert 8 <= sum(lengths) / len(lengths) <= 14
    assert len(tokenizer(PROMPT_WORDS).input_ids) < 90


def nats(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """The negative log-likelihood of each text, in nats, summed over its tokens [N]; and the count of tokens [N]."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    mask = batch.attention_mask[:, 1:]
    return torch.stack([(losses * mask).sum(1), mask.sum(1)])


def test_held_out_sentences_are_far_likelier_than_under_random_weights(model, tokenizer) -> None:
    texts = [s.text for s in DEV if s.label][:200]
    total, count = nats(model, tokenizer, texts).sum(1)
    torch.manual_seed(0)
    random_model = AutoModelForCausalLM.from_config(model.config).eval()
    random_total, _ = nats(random_model, tokenizer, texts).sum(1)
    assert torch.exp(total / count) < 20
    assert torch.exp(random_total / count) > 500


def test_acceptable_sentences_are_likelier_than_their_twins(model, tokenizer) -> None:
    """In held-out combinations of nearly every phenomenon; the difference is what an adapter has to bring to the answer."""
    rng = Random(99)
    wins = defaultdict(list)
    for phenomenon in PHENOMENA:
        pairs = []
        while len(pairs) < 24:
            pair = make_pair(rng, phenomenon)
            if is_reserved(phenomenon, pair.key):
                pairs.append(pair)
        good = nats(model, tokenizer, [p.good for p in pairs])[0]
        bad = nats(model, tokenizer, [p.bad for p in pairs])[0]
        wins[phenomenon] = (good < bad).float().mean().item()
    better = [phenomenon for phenomenon, share in wins.items() if share > 0.6]
    assert len(better) >= 0.8 * len(PHENOMENA), wins
