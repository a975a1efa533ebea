"""Supervised fine-tuning: plain cross-entropy on answers."""

import random

import pytest
import torch
from engine import make_model, random_ids, random_prompts, sharpen
from tiny import KINDS

from fastppo.algorithms.optim import make_optimizer
from fastppo.algorithms.sft import sft_step
from fastppo.batch.encode import encode_answer, encode_prompts
from fastppo.model.actor_critic import POLICY
from fastppo.rollout.sampler import Sampling, generate
from fastppo.tasks import Example, get_task


def batch(seed=0, n=7):
    rng = random.Random(seed)
    return random_prompts(seed, n), [[*random_ids(rng, rng.randint(1, 4)), 1] for _ in range(n)]


def plain_loss(model, prompts, answers):
    """torch's cross-entropy with -100 at the prompts, through the model's own forward, one sequence at a time."""
    if model.backbone.packed:
        model.base.model.set_attn_implementation("eager")
    logits, labels = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits.append(model.peft(torch.tensor([prompt + answer]), use_cache=False).logits[0, :-1])
        labels.append(torch.tensor([-100] * (len(prompt) - 1) + answer))
    if model.backbone.packed:
        model.base.model.set_attn_implementation("fastppo")
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [40, 10_000])
def test_loss_and_gradient_are_those_of_cross_entropy(kind, budget):
    prompts, answers = batch()
    model = make_model(kind, micro_batch_tokens=budget, ppo__max_grad_norm=1e9)
    expected = plain_loss(model, prompts, answers)
    wanted = torch.autograd.grad(expected, list(model.adapter_tensors(POLICY).values()))
    optimizer = torch.optim.SGD(model.trainable(), lr=1.0)
    before = [p.detach().clone() for p in model.adapter_tensors(POLICY).values()]
    metrics = sft_step(model, optimizer, model.config, prompts, answers)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-4)
    for parameter, was, grad in zip(model.adapter_tensors(POLICY).values(), before, wanted, strict=True):
        torch.testing.assert_close(was - parameter.detach(), grad, rtol=1e-3, atol=1e-5)
    assert metrics["tokens_padded"] > metrics["tokens_tree"] > 0


def test_value_head_is_not_touched():
    prompts, answers = batch()
    model = make_model("llama", value__trunk="own")
    before = {n: t for n, t in model.state().items() if not n.startswith(POLICY)}
    optimizer = make_optimizer(model.trainable(), 1e-2, 1e-5)
    for _ in range(2):
        sft_step(model, optimizer, model.config, prompts, answers)
    after = model.state()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_memorises_answers(kind):
    """A few dozen steps, and greedy decoding gives the answers with their end tokens."""
    rng = random.Random(0)
    prompts, answers = random_prompts(0, 4), [[*random_ids(rng, 2), 1] for _ in range(4)]
    model = sharpen(make_model(kind, spread=0, lora__rank=16))
    optimizer = make_optimizer(model.trainable(), 1e-2, 1e-5)
    losses = [sft_step(model, optimizer, model.config, prompts, answers)["loss"] for _ in range(80)]
    assert losses[-1] < 0.1 * losses[0]
    rollout = generate(model, prompts, 1, Sampling(temperature=0.0, max_new_tokens=6), seed=0)
    assert [s.tokens for s in rollout.samples] == answers
    assert all(s.finish == "eos" for s in rollout.samples)


def test_a_task_from_text_to_text():
    """Template, tokenizer, SFT, sampler and parser fit together: two memorised labels come back."""
    task = get_task("cola")
    examples = [Example({"sentence": s}, label, "x:1") for s, label in (("The cat sees.", 1), ("Cat the sees.", 0))]
    model = sharpen(make_model("llama", spread=0, lora__rank=16))
    tokenizer = model.base.tokenizer
    prompts = encode_prompts(tokenizer, task, examples, limit=400, limit_name="x")
    answers = [
        encode_answer(tokenizer, task.prompt(e), prompt, task.answer(e.label))
        for e, prompt in zip(examples, prompts, strict=True)
    ]
    optimizer = make_optimizer(model.trainable(), 1e-2, 1e-5)
    for _ in range(60):
        sft_step(model, optimizer, model.config, prompts, answers)
    rollout = generate(model, prompts, 1, Sampling(temperature=0.0, max_new_tokens=6), seed=0)
    assert [task.parse(s.text) for s in rollout.samples] == [1, 0]
