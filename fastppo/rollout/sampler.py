"""The in-process sampler: the trainer's own weights and adapters, batches that refill as sequences end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastppo.batch.rollout import Rollout, Sample
from fastppo.config import Config
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.out_of_memory import with_less_memory
from fastppo.rollout.cache import on_device
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
    def drawn(config: Config, rng: np.random.Generator) -> Sampling:
        """For one PPO iteration, whose longest answer ``sample.max_new_tokens_from`` lets ``rng`` draw."""
        fewest, most = config.sample.max_new_tokens_from, config.sample.max_new_tokens
        longest = most if fewest is None else int(rng.integers(fewest, most, endpoint=True))
        return replace(Sampling.of(config), max_new_tokens=longest)

    @staticmethod
    def greedy(config: Config) -> Sampling:
        return replace(Sampling.of(config), temperature=0.0, top_k=0, top_p=1.0)


# Draws that the host has not looked at when it asks for the next step: while it looks, the GPU is at work. A sequence that has
# ended meanwhile is drawn one token too many for, which is dropped. A CPU would only do that work in vain.
LAG = {"cuda": 1}


@dataclass
class _Running:
    index: int  # place in the result
    prompt: int
    drawn: int = 0  # tokens, also those that the host does not know yet
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_mass: float = 0.0


class _Rows:
    """What is drawn for running sequences, see ``fastppo.rollout.decoder.Rows``."""

    def __init__(self, model: ActorCritic, sampling: Sampling, slots: int, seed: int, answers: TokenTrie | None):
        self.head, self.sampling, self.seed, self.answers = model.backbone.head, sampling, seed, answers
        # The newest token, the sequence's id, how many tokens it has, and its node of ``answers``.
        self.numbers = torch.zeros(4, slots, dtype=torch.int64, device=model.device)
        self.tokens, self.ids, self.steps, self.nodes = self.numbers
        # Token, log-prob and the log of the answers' mass, all exact in float64: a single copy brings them to the host.
        self.drawn = torch.zeros(slots, 3, dtype=torch.float64, device=model.device)
        self.state: tuple[torch.Tensor, ...] = (self.numbers, self.drawn)

    def admit(self, rows: slice, first_id: int, logits: torch.Tensor, roots: list[int] | None) -> None:
        """The first tokens of sequences whose ids count up from ``first_id``; ``roots``: their nodes (None: 0)."""
        self.numbers[:, rows] = 0
        if roots is not None:
            self.nodes[rows] = on_device(roots, logits.device)
        self.ids[rows] = torch.arange(first_id, first_id + len(logits), device=logits.device)
        self._draw(rows, logits)

    def draw(self, hidden_RH: torch.Tensor) -> None:
        self._draw(slice(len(hidden_RH)), self.head.logits(hidden_RH))

    def _draw(self, rows: slice, logits: torch.Tensor) -> None:
        s, answers, nodes = self.sampling, self.answers, self.nodes[rows]
        tokens, logprobs = sample(
            logits if answers is None else answers.among(logits, nodes),
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=self.seed, sequence_ids_B=self.ids[rows],
            step_B=self.steps[rows],
        )  # fmt: skip
        if answers is not None:  # drawn are places among what may follow
            tokens, self.nodes[rows] = answers.follow(nodes, tokens)
            among = logprobs
            logprobs, _ = token_logprob(logits, tokens, temperature=s.temperature or 1.0)
            self.drawn[rows, 2] = (logprobs - among).double()
        self.tokens[rows] = tokens
        self.steps[rows] += 1
        self.drawn[rows, 0], self.drawn[rows, 1] = tokens.double(), logprobs.double()

    def read(self, rows: slice) -> Callable[[], list[list[float]]]:
        """Waits for what was drawn last: of each row token, log-prob and log of the mass. Others may be drawn
        before it is called."""
        drawn = self.drawn[rows]
        if not drawn.is_cuda:
            found = drawn.tolist()
            return lambda: found
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        there = torch.cuda.Event()
        there.record()

        def wait() -> list[list[float]]:
            there.synchronize()
            return host.tolist()

        return wait

    def keep(self, order: list[int]) -> None:
        self.numbers[:, : len(order)] = self.numbers[:, on_device(order, self.numbers.device)]


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
    roots: Sequence[int] | None = None,
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
            than ``max_new_tokens`` tokens are cut off. roots: of each prompt, the node where its answers begin (None: 0).
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
        lambda: _generate(model, prompts, samples, sampling, slots(), seed, first_id, answers, roots, end, check),
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
    roots: Sequence[int] | None,
    end: Callable[[int, Sample], None],
    check: Callable[[], None],
) -> None:
    tokenizer, eos = model.base.tokenizer, frozenset(model.base.eos_ids)
    decoder = make_decoder(model.backbone, prompts, samples, slots, sampling.max_new_tokens, model.micro_batch_tokens)
    rows = _Rows(model, sampling, slots, seed, answers)
    running: list[_Running] = []
    unread: deque[tuple[list[_Running], Callable[[], list[list[float]]]]] = deque()  # of each draw, whose it is
    waiting = 0  # the first prompt not yet admitted

    def drawn(first: int) -> None:
        """There are new tokens from the ``first`` running sequence on."""
        members = running[first:]
        for member in members:
            member.drawn += 1
        unread.append((members, rows.read(slice(first, len(running)))))

    def look() -> None:
        """At the oldest draw that the host does not know."""
        members, found = unread.popleft()
        for member, (token, logprob, log_mass) in zip(members, found(), strict=True):
            if member.ended:
                continue
            member.tokens.append(int(token))
            member.logprobs.append(logprob)
            member.log_mass += log_mass
            finish, text = _finish(member.tokens, eos, tokenizer, sampling)
            if finish is not None:
                mass = min(1.0, math.exp(member.log_mass))
                end(member.index, Sample(member.prompt, member.tokens, member.logprobs, finish, text, mass))
                member.ended = True

    while running or waiting < len(prompts):
        check()
        if running:
            decoder.step(rows)
            drawn(0)
        admitted = decoder.room(prompts[waiting : waiting + slots // samples])
        if running and admitted < min(len(prompts) - waiting, slots // samples // 4):
            admitted = 0  # a refill costs a prefill call: wait until it is worth one
        if admitted:
            chosen, before = range(waiting, waiting + admitted), len(running)
            ends = decoder.admit([prompts[p] for p in chosen])
            running += [_Running(p * samples + k, p) for p in chosen for k in range(samples)]
            logits = model.backbone.head.logits(ends).repeat_interleave(samples, 0)
            nodes = None if roots is None else [roots[member.prompt] for member in running[before:]]
            rows.admit(slice(before, len(running)), first_id + waiting * samples, logits, nodes)
            drawn(before)
            waiting += admitted
        while len(unread) > LAG.get(model.device.type, 0):
            look()
        going = [i for i, member in enumerate(running) if not member.ended and member.drawn < sampling.max_new_tokens]
        if len(going) < len(running):
            order = decoder.keep(going)
            rows.keep(order)
            running = [running[i] for i in order]
    while unread:
        look()


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
