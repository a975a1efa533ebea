"""Tiny random models of several architectures, saved to disk with a tokenizer, for tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEXT = [
    "Decide whether a sentence is acceptable English. A sentence is acceptable if a native speaker could say it.",
    "Answer with one word: yes if the sentence is acceptable, no if it is not. Sentence: Acceptable:",
    "The cat sees the dogs. The dogs see a cat. yes no yes no She sleeps and they sleep.",
]


def tiny_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens that puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    end = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", **end)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across the border of prompt and answer: ``: y`` is one token, and words are not split at spaces."""
    alphabet = {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz :")}
    vocab = {"<s>": 0, "</s>": 1, **alphabet, ": ": 30, ": y": 31}
    model = models.BPE(vocab=vocab, merges=[(":", " "), (": ", "y")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(kind: str, vocab: int, width: int = 32):
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "qwen2":
        return Qwen2Config(**sizes, **heads, **ends, tie_word_embeddings=True)
    if kind == "llama":
        return LlamaConfig(**sizes, **heads, **ends)
    if kind == "mistral":
        return MistralConfig(**sizes, **heads, **ends, sliding_window=7)
    if kind == "gpt_neox":
        return GPTNeoXConfig(**sizes, **ends, num_attention_heads=4, max_position_embeddings=512, hidden_dropout=0.1)
    if kind == "gpt2":
        return GPT2Config(vocab_size=vocab, n_embd=width, n_layer=2, n_head=4, n_positions=512, **ends)
    if kind == "mpt":
        return MptConfig(
            d_model=width, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=512, vocab_size=vocab, **ends
        )
    raise ValueError(kind)


KINDS = ("qwen2", "llama", "mistral", "gpt_neox", "mpt")


def save_tiny_model(kind: str, folder: Path, *, eos: bool = True, seed: int = 0, width: int = 32) -> Path:
    """A random model whose logits differ clearly between tokens, and its tokenizer."""
    tokenizer = tiny_tokenizer(eos=eos)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer), width))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
