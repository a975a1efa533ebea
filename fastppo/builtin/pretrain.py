"""Pretrain a tiny LLaMA-shaped model and its tokenizer, on the built-in grammar or on any text.

    python -m fastppo.builtin.pretrain --out DIR [--text FILE ...] [--tokens N] [--seed S]

The defaults, with --bf16, make the model that ships with fastppo: about 10 minutes on 2 cores. Another machine's
matrix products round differently, so its weights differ in their last bits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo.builtin.genres import PROMPT_WORDS, Writer
from fastppo.errors import UserError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SMALLEST_VOCAB = 256 + 3
CONTEXT = 1024  # longest sequence the tokenizer and the config announce
TOKENIZER_DOCUMENTS = 20_000  # documents the tokenizer is trained on


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab` entries; BOS is prepended, any UTF-8 text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def read_documents(paths: list[Path]) -> list[str]:
    """One document a line; blank lines are left out. Raises UserError for a file that cannot be read, or no text at all."""
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {path}: cannot read it as UTF-8 text ({error})") from error
        documents += [line for line in text.split("\n") if line.strip()]
    if not documents:
        raise UserError(f"--text {' '.join(map(str, paths))}: no text in it, allowed is one document a line")
    return documents


def _repeated(documents: list[str], seed: int) -> Iterator[str]:
    """The documents in a new order each pass, for ever."""
    rng = Random(seed)
    while True:
        yield from rng.sample(documents, len(documents))


def rows(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[list[int]]:
    """Documents with BOS and EOS, one after the other, cut into rows of `length + 1` ids (inputs and shifted targets)."""
    buffer: list[int] = []
    eos = tokenizer.eos_token_id
    while True:
        for ids in tokenizer(list(islice(documents, 1024)), add_special_tokens=True)["input_ids"]:
            buffer += [*ids, eos]
        while len(buffer) > length:
            yield buffer[: length + 1]
            del buffer[:length]


def pretrain(
    out: Path,
    text: list[Path] | None = None,
    *,
    tokens: int,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    row: int,
    batch: int,
    lr: float,
    bf16: bool,
    seed: int,
    device: str = "cpu",
) -> float:
    """Train tokenizer and model, write both to `out` in Hugging Face format (bf16); returns the last loss in nats a token.

    `tokens` is the length of the training, taken `batch` rows of `row` tokens at a time with AdamW and a cosine schedule.
    """
    torch.manual_seed(seed)
    if text:
        corpus = read_documents(text)
        documents = _repeated(corpus, seed)
        tokenizer = train_tokenizer(corpus, vocab)
    else:
        documents = Writer(seed).documents()
        sample = list(islice(documents, TOKENIZER_DOCUMENTS))
        # The prompt of the task is encoded in every example, so its words are worth whole tokens.
        tokenizer = train_tokenizer(sample + [PROMPT_WORDS] * (TOKENIZER_DOCUMENTS // 10), vocab)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=math.ceil(hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    steps = max(1, tokens // (row * batch))
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * i / steps)))
    )
    source = rows(documents, tokenizer, row)
    start, loss_value = time.monotonic(), 0.0
    for step in range(steps):
        ids_BT = torch.tensor(list(islice(source, batch)), device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            loss_value = loss.item()
            speed = (step + 1) * row * batch / (time.monotonic() - start)
            print(f"step {step + 1}/{steps}  loss {loss_value:.3f}  {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    # Half the bytes on disk; whoever loads it with dtype "auto" gets the fp32 that fastppo computes in on a CPU.
    description = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    settings_path = out / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return loss_value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastppo.builtin.pretrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, nargs="+", help="text files, one document a line (default: the built-in grammar)")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens to train on")
    parser.add_argument("--vocab", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--hidden", type=int, default=160, help="hidden size")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--row", type=int, default=256, help="tokens in a row of the batch")
    parser.add_argument("--batch", type=int, default=8, help="rows in a batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16: faster where the CPU has them")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train (default: cpu)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    for setting in ("tokens", "layers", "heads", "row", "batch", "threads"):
        if args[setting] < 1:
            parser.error(f"--{setting} {args[setting]}: must be at least 1")
    if args["vocab"] < SMALLEST_VOCAB:
        parser.error(f"--vocab {args['vocab']}: must be at least {SMALLEST_VOCAB} (256 bytes and 3 special tokens)")
    if args["hidden"] < 2 or args["hidden"] % (2 * args["heads"]):
        parser.error(f"--hidden {args['hidden']}: must be a multiple of twice --heads ({args['heads']})")
    if args["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; fastppo doctor says why")
    torch.set_num_threads(args.pop("threads"))
    try:
        pretrain(**args)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
