"""A sequence classifier of transformers, fully fine-tuned: what a language model's answers are compared with.

The recipe of Devlin et al. 2019 (arXiv 1810.04805), appendix A.3: batches of 32, 2 to 4 epochs, AdamW at 2e-5 to 5e-5 that
warms up over a tenth of the steps and then falls linearly to zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from fastppo.errors import UserError
from fastppo.model.load import be_quiet, first_line
from fastppo.tasks import Example, Task

BATCH, WARMUP, WEIGHT_DECAY = 32, 0.1, 0.01
LONGEST = 512  # tokens; longer texts are cut, the longer one of a pair first


def texts(task: Task, example: Example) -> tuple[str, str | None]:
    """What an encoder reads: the first slot, and all others behind it as the second text."""
    first, *others = (example.fields[slot] for slot in task.slots)
    return first, " ".join(others) if others else None


def train_encoder(
    name: str, task: Task, train: list[Example], dev: list[Example], *, lr: float, epochs: int, seed: int,
    device: torch.device, step_done: Callable[[int, int, float], None],
) -> list[int | float]:  # fmt: skip
    """Fine-tune on ``train`` and return the labels (ids, or numbers) that it predicts for ``dev``.

    Args:
        name: folder or hub name.
        step_done: called with the steps done, of how many, and the step's loss.

    Raises:
        UserError: no such model, or training diverged.
    """
    be_quiet()
    torch.manual_seed(seed)  # the classifier's head is new
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name))
        model = AutoModelForSequenceClassification.from_pretrained(os.path.expanduser(name), num_labels=len(task.labels) or 1)
    except Exception as error:  # of a network, a remote service and other people's files: no list of causes is complete
        raise UserError(f"--encoder: {name!r} cannot be loaded: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    longest = min(LONGEST, positions, tokenizer.model_max_length)

    def logits(batch: list[Example]) -> torch.Tensor:
        pairs = [texts(task, example) for example in batch]
        second = None if pairs[0][1] is None else [pair[1] for pair in pairs]
        encoded = tokenizer(
            [pair[0] for pair in pairs], second, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(**encoded).logits.float()

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=lr
    )
    per_epoch = -(-len(train) // BATCH)
    total = epochs * per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * total), total)
    model.train()
    for step in range(total):
        if step % per_epoch == 0:
            order = np.random.default_rng([seed, step // per_epoch]).permutation(len(train))
        batch = [train[i] for i in order[step % per_epoch :: per_epoch]]
        labels = torch.tensor([example.label for example in batch], device=device)
        outputs = logits(batch)
        loss = F.cross_entropy(outputs, labels) if task.labels else F.mse_loss(outputs[:, 0], labels.float())
        if not torch.isfinite(loss):
            raise UserError("the encoder's loss is no longer finite: lower --encoder-lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        step_done(step + 1, total, float(loss.detach()))
    model.eval()
    by_length = sorted(range(len(dev)), key=lambda i: len("".join(dev[i].fields.values())))
    predicted: list[int | float] = [0] * len(dev)
    with torch.no_grad():
        for start in range(0, len(dev), 2 * BATCH):
            places = by_length[start : start + 2 * BATCH]
            outputs = logits([dev[i] for i in places])
            for place, label in zip(places, (outputs.argmax(-1) if task.labels else outputs[:, 0]).tolist(), strict=True):
                predicted[place] = label
    return predicted
