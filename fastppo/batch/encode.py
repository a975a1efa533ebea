"""From texts to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.tasks import Example, Task


def prompt_limit(config: Config, positions: int | None) -> tuple[int, str]:
    """(most tokens that a prompt may have, what says so and the way out). positions: the model's; None: not known.

    Raises:
        UserError: ``--sample-max-new-tokens`` leaves none.
    """
    new, given = config.sample.max_new_tokens, config.max_prompt_tokens
    if positions is None or positions - new > given:
        return given, "--max-prompt-tokens" + ("" if positions is None else f"; this model allows up to {positions - new}")
    if positions - new < 1:
        raise UserError(f"--sample-max-new-tokens: {new} leaves no room for a prompt in the model's {positions} positions")
    return positions - new, (
        f"the model's {positions} positions less --sample-max-new-tokens {new}; longer prompts need another --model, with more "
        "positions"
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], *, limit: int, limit_name: str
) -> list[list[int]]:
    """Token ids of each example's prompt, with what the tokenizer puts in front (BOS) and without an end token.

    Raises:
        UserError: a prompt of more than ``limit`` tokens, naming its row and ``limit_name``.
    """
    texts = [task.prompt(example) for example in examples]
    encoded = tokenizer(texts, add_special_tokens=True, return_attention_mask=False)["input_ids"] if texts else []
    prompts = []
    for example, ids in zip(examples, encoded, strict=True):
        ids = list(ids)
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        if len(ids) > limit:
            raise UserError(
                f"{example.where}: its prompt has {len(ids)} tokens; expected at most {limit} ({limit_name})"
            )
        prompts.append(ids)
    return prompts


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt_text: str, prompt: list[int], answer: str) -> list[int]:
    """Token ids of an answer behind its prompt, closed with the end token.

    Where the tokenizer keeps the prompt's tokens when the answer follows, the answer gets the tokens that it has in place;
    otherwise the ones that it has alone.
    """
    together = list(tokenizer(prompt_text + answer, add_special_tokens=True, return_attention_mask=False)["input_ids"])
    while together and together[-1] == tokenizer.eos_token_id:
        together.pop()
    if len(together) > len(prompt) and together[: len(prompt)] == prompt:
        ids = together[len(prompt) :]
    else:
        ids = list(tokenizer(answer, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]
