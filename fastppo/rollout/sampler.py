"""The in-process sampler: the trainer's own weights and adapters, batches that refill as sequences end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.batch.rollout import Rollout, Sample
from fastppo.config import Config
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.out_of_memory import with_less_memory
from fastppo.rollout.decoder import make_decoder
from fastppo.rollout.trie import TokenTrie
from fastppo.tasks.task import CLOSING
from fastppo_kernels import sample, token_logprob


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy (log-probs are then at temperature 1).

    Texts that end an answer: those of ``stop`` are cut off it, ``closing`` ("": none) stays its last.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 4
    stop: tuple[str, ...] = ()
    slots: int = 512
    closing: str = ""

    @staticmethod
    def of(config: Config) -> Sampling:
        s = config.sample
        closing = CLOSING if config.template == "tagged" else ""
        return Sampling(s.temperature, s.top_k, s.top_p, s.max_new_tokens, s.stop, s.slots, closing)

    @staticmethod
    def greedy(config: Config) -> Sampling:
        return replace(Sampling.of(config), temperature=0.0, top_k=0, top_p=1.0)


@dataclass
class _Running:
    index: int  # place in the result
    prompt: int
    tokens: list[int]
    logprobs: list[float]
    log_mass: float = 0.0


@torch.no_grad()
def generate(
    model: ActorCritic,
    prompts: list[list[int]],
    samples: int,
    sampling: Sampling,
    *,
    seed: int,
    first_id: int = 0,
    answers: TokenTrie | None = None,
    finished: Callable[[int, Sample], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Rollout:
    """Sample ``samples`` answers to each prompt with the policy.

    Args:
        prompts: token ids, none empty.
        seed, first_id: the draw of sample ``i`` depends only on ``seed``, ``first_id + i`` and its own tokens, not on the
            batch it runs in.
        answers: nothing else is sampled (constrained decoding; top-k and top-p choose among what may follow). The log-probs
            stay those of the full distribution; how much of that is on the answers is each sample's ``mass``. Answers of more
            than ``max_new_tokens`` tokens are cut off.
        finished: called with a sample and its index in the rollout as soon as it ends, while others decode.
        check: called once a step; it may raise to stop.

    Returns:
        A rollout with the samples of each prompt side by side, in the prompts' order.
    """
    done: dict[int, Sample] = {}

    def end(index: int, sample: Sample) -> None:
        if index not in done:  # in an attempt before this one, from which what was handed on stands
            if finished is not None:
                finished(index, sample)  # may itself run out of memory: then again in the next attempt
            done[index] = sample

    def slots() -> int:  # a cache is no larger than it is used
        most = min(sampling.slots, len(prompts) * samples)
        return max(samples, min(most, model.most_slots or most))

    def shrink() -> str | None:
        before = slots()
        model.most_slots = before // 2
        return f"{slots():,} sequences at a time instead of {before:,}" if slots() < before else None

    with_less_memory(
        model,
        "sampling",
        lambda: _generate(model, prompts, samples, sampling, slots(), seed, first_id, answers, end, check),
        shrink,
    )
    return Rollout(prompts, [done[i] for i in range(len(prompts) * samples)])


def _generate(
    model: ActorCritic,
    prompts: list[list[int]],
    samples: int,
    sampling: Sampling,
    slots: int,
    seed: int,
    first_id: int,
    answers: TokenTrie | None,
    end: Callable[[int, Sample], None],
    check: Callable[[], None],
) -> None:
    head, tokenizer, eos = model.backbone.head, model.base.tokenizer, frozenset(model.base.eos_ids)
    decoder = make_decoder(
        model.backbone, prompts, samples, slots, sampling.max_new_tokens, model.micro_batch_tokens
    )
    running: list[_Running] = []
    waiting = 0  # the first prompt not yet admitted

    def draw(
        logits: torch.Tensor, ids: torch.Tensor, steps: torch.Tensor, nodes: torch.Tensor, members: list[_Running]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = sample(
            logits if answers is None else answers.among(logits, nodes),
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed, sequence_ids_B=ids,
            step_B=steps,
        )  # fmt: skip
        if answers is not None:  # drawn are places among what may follow
            tokens, nodes = answers.follow(nodes, tokens)
            among = logprobs
            logprobs, _ = token_logprob(logits, tokens, temperature=sampling.temperature or 1.0)
            for member, log_mass in zip(members, (logprobs - among).tolist(), strict=True):
                member.log_mass += log_mass
        for member, token, logprob in zip(members, tokens.tolist(), logprobs.tolist(), strict=True):
            member.tokens.append(token)
            member.logprobs.append(logprob)
        return tokens, nodes

    # Of each running sequence the newest token, its id, how many tokens it has and its node of ``answers``.
    tokens, ids, steps, nodes = torch.zeros(4, 0, dtype=torch.int64, device=model.device)
    while running or waiting < len(prompts):
        check()
        if running:
            tokens, nodes = draw(head.logits(decoder.step(tokens)), ids, steps, nodes, running)
            steps = steps + 1
        admitted = decoder.room(prompts[waiting : waiting + slots // samples])
        if running and admitted < min(len(prompts) - waiting, slots // samples // 4):
            admitted = 0  # a refill costs a prefill call: wait until it is worth one
        if admitted:
            chosen = range(waiting, waiting + admitted)
            new = [_Running(p * samples + k, p, [], []) for p in chosen for k in range(samples)]
            ends = decoder.admit([prompts[p] for p in chosen])
            new_ids = torch.arange(waiting * samples, (waiting + admitted) * samples, device=model.device) + first_id
            zeros = torch.zeros_like(new_ids)  # step 0, at node 0
            first, behind = draw(head.logits(ends).repeat_interleave(samples, 0), new_ids, zeros, zeros, new)
            tokens, ids = torch.cat([tokens, first]), torch.cat([ids, new_ids])
            steps, nodes = torch.cat([steps, torch.ones_like(new_ids)]), torch.cat([nodes, behind])
            running += new
            waiting += admitted
        going = []
        for place, member in enumerate(running):
            finish, text = _finish(member.tokens, eos, tokenizer, sampling)
            if finish is None:
                going.append(place)
            else:
                mass = min(1.0, math.exp(member.log_mass))
                end(member.index, Sample(member.prompt, member.tokens, member.logprobs, finish, text, mass))
        if len(going) < len(running):
            order = decoder.keep(going)
            running = [running[i] for i in order]
            kept = torch.tensor(order, dtype=torch.int64, device=model.device)
            tokens, ids, steps, nodes = (of_running[kept] for of_running in (tokens, ids, steps, nodes))


def _finish(
    tokens: list[int], eos: frozenset[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> tuple[str | None, str]:
    """Why the answer ended, or None; and its text."""
    ended = tokens[-1] in eos
    if not ended and not sampling.stop and not sampling.closing and len(tokens) < sampling.max_new_tokens:
        return None, ""
    text = str(tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=False))
    cuts = [text.index(stop) for stop in sampling.stop if stop in text]
    if sampling.closing and sampling.closing in text:
        cuts.append(text.index(sampling.closing) + len(sampling.closing))
    if cuts:
        return "stop", text[: min(cuts)]
    if ended:
        return "eos", text
    return ("length", text) if len(tokens) >= sampling.max_new_tokens else (None, "")
