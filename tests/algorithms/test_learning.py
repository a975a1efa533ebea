"""PPO learns a rule from rewards alone, and learns the opposite when the reward's sign is flipped.

The base is a tiny random model, so a few adapter steps first teach it the answers' form with labels drawn at random: two
answer words, either as likely as the other (random label use, not one bit about the rule). Everything else comes from rewards.
"""

import random

import numpy as np
from engine import make_model, random_ids, sharpen

from fastppo.algorithms import ppo
from fastppo.algorithms.optim import lr_factor, make_optimizer, set_lr
from fastppo.algorithms.sft import sft_step
from fastppo.batch.rollout import pack_rollout
from fastppo.rollout.sampler import Sampling, generate

YES, NO, END = 40, 41, 1
STEM = [0, 60, 61, 62]
KEY = 30  # the rule: yes if the prompt contains the key
ITERATIONS, PROMPTS, SAMPLES = 45, 64, 4


def make_prompts(seed, n):
    """Three words of twelve, half of the prompts with the key among them; and what is right for each."""
    rng = random.Random(seed)
    prompts, gold = [], []
    for i in range(n):
        words = [31 + w % 11 for w in random_ids(rng, 3)]
        if i % 2:
            words[rng.randrange(3)] = KEY
        prompts.append([*STEM, *words, 63])
        gold.append([YES, END] if i % 2 else [NO, END])
    return prompts, gold


def accuracy(model):
    prompts, gold = make_prompts(seed=10**6, n=100)
    rollout = generate(model, prompts, 1, Sampling.greedy(model.config), seed=0)
    right = [s.tokens == g for s, g in zip(rollout.samples, gold, strict=True)]
    malformed = [s.tokens not in ([YES, END], [NO, END]) for s in rollout.samples]
    return sum(right) / 100, sum(malformed) / 100


def learn(sign, **settings):
    """(accuracy, malformed) before and after PPO, and the metrics of every iteration."""
    # The entropy bonus and the KL keep both answers alive until the rule is found. On a random base some seeds end at one
    # answer for every prompt before that; this one finds the rule under many settings.
    settings = {"seed": 1, "ppo__lr": 2e-3, "ppo__entropy_coef": 0.05, "ppo__kl_coef": 0.1} | settings
    model = sharpen(make_model("llama", spread=0, lora__rank=16, sample__max_new_tokens=3, **settings))
    config, rng = model.config, random.Random(0)
    optimizer = make_optimizer(model.trainable(), 1e-2, 1e-5)
    for step in range(40):
        prompts, _ = make_prompts(step, 16)
        sft_step(model, optimizer, config, prompts, [[rng.choice([YES, NO]), END] for _ in prompts])
    before = accuracy(model)

    model.freeze_reference()
    optimizer = make_optimizer(model.trainable(), 0.0, config.ppo.adam_eps)
    records = []
    for step in range(ITERATIONS):
        prompts, gold = make_prompts(1000 + step, PROMPTS)
        rollout = generate(model, prompts, SAMPLES, Sampling.of(config), seed=config.seed, first_id=step * PROMPTS * SAMPLES)
        answers = ([YES, END], [NO, END])
        rewards = [
            -2.0 if s.tokens not in answers else sign * (1.0 if s.tokens == gold[s.prompt] else -1.0) for s in rollout.samples
        ]
        minis = pack_rollout(
            rollout, minibatches=config.ppo.minibatches, budget=2000, padded=False, device="cpu",
            rng=np.random.default_rng(step),
        )  # fmt: skip
        estimates = ppo.estimate(model, minis, rollout, rewards, config.ppo.kl_coef, config)
        set_lr(optimizer, config.ppo.lr * lr_factor(step, ITERATIONS, 0.05, "linear"))
        metrics = ppo.update(
            model, optimizer, minis, config.ppo.kl_coef, config, np.random.default_rng(step), critic_only=False
        )
        records.append(metrics | {"reward": float(np.mean(rewards)), "kl": estimates.kl, "gap": estimates.sampler_gap})
    return before, accuracy(model), records


def test_ppo_learns_the_rule():
    before, after, records = learn(sign=1)
    assert before[0] < 0.8 and records[0]["reward"] < 0.3, "the start does not know the rule"
    assert after[0] > 0.95 and after[1] < 0.02
    assert records[0]["kl"] == 0.0
    assert all(r["first_log_ratio"] == 0.0 and r["gap"] < 1e-4 for r in records)


def test_a_flipped_reward_unlearns_it():
    before, after, _ = learn(sign=-1)
    assert after[0] < 0.05 < before[0] and after[1] < 0.02, "well-formed, and wrong"


def test_ppo_learns_with_an_own_critic_and_kl_in_the_loss():
    _, after, _ = learn(sign=1, value__trunk="own", ppo__kl_estimator="k3")
    assert after[0] > 0.95 and after[1] < 0.02
