"""Samples that end are handed on while others decode, and their rewards come in the rollout's order whatever happens."""

from dataclasses import replace

import pytest
import torch
from engine import make_model, random_prompts

from fastppo import trainer
from fastppo.batch.rollout import Sample
from fastppo.rewards import marks
from fastppo.rewards.stream import RewardStream
from fastppo.rollout import sampler
from fastppo.rollout.sampler import Sampling, generate

PROMPTS = random_prompts(5, 20)
SAMPLING = Sampling(max_new_tokens=12, slots=8)


def sampled(kind="llama", **options):
    """Answers of every length: every sixth token ends one."""
    model = make_model(kind)
    model.base = replace(model.base, eos_ids=tuple(range(0, 320, 6)))
    return generate(model, PROMPTS, 3, SAMPLING, seed=0, **options)


def worth(index: int, sample: Sample) -> float:
    return index + len(sample.tokens) / 100


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_every_sample_is_handed_on_once_and_at_its_end(kind, late, monkeypatch):
    monkeypatch.setattr(sampler, "LAG", {"cpu": late, "cuda": late})
    steps, seen = [0], []

    def step():
        steps[0] += 1

    rollout = sampled(kind, check=step, finished=lambda index, sample: seen.append((steps[0], index, sample)))
    assert sorted(index for _, index, _ in seen) == list(range(60))
    assert all(rollout.samples[index] is sample for _, index, sample in seen)
    assert [index for _, index, _ in seen] != sorted(index for _, index, _ in seen)
    # A sample of n tokens that is admitted at once ends n - 1 steps behind the first. That is seen `late` draws on, which need
    # no further step where new prompts come: their first tokens are a draw too.
    lags = {at - len(sample.tokens) for at, index, sample in seen if index < 6}
    assert late in lags and lags <= {*range(late + 1)}
    assert len({at for at, _, _ in seen}) > 12
    assert rollout == sampled(kind)


def test_rewards_come_in_the_order_of_the_rollout():
    stream = RewardStream(worth)
    rollout = sampled(finished=stream.finished)
    assert stream(rollout) == [worth(i, sample) for i, sample in enumerate(rollout.samples)]


def broken(index: int, sample: Sample) -> float:
    if index in (7, 30):
        raise ZeroDivisionError(f"sample {index}")
    return worth(index, sample)


def test_an_error_in_a_reward_reaches_the_caller():
    with pytest.raises(ZeroDivisionError, match="sample"):
        sampled(finished=RewardStream(broken).finished)


def test_an_error_in_the_trainers_reward_ends_the_run(world, tmp_path, monkeypatch):
    def answer_reward(*_):
        raise ZeroDivisionError("in a reward")

    monkeypatch.setattr(marks, "answer_reward", answer_reward)
    with pytest.raises(ZeroDivisionError, match="in a reward"):
        world.train(tmp_path / "run")


def test_the_trainer_asks_for_rewards_while_others_decode(world, tmp_path, monkeypatch):
    """In every iteration some rewards are asked for before the sampler's last step."""
    events: list[str] = []
    sample, reward = trainer.generate, marks.answer_reward

    def spy(*args, **kwargs):
        events.append("begin")
        return sample(*args, check=lambda: events.append("step"), **kwargs)

    monkeypatch.setattr(trainer, "generate", spy)
    monkeypatch.setattr(marks, "answer_reward", lambda *args: events.append("reward") or reward(*args))
    world.train(tmp_path / "run", sample__max_new_tokens=8, sample__slots=4, ppo__iterations=2)
    iterations = " ".join(events).split("begin ")[1:]
    assert [part.count("reward") for part in iterations] == [8 * 3] * 2
    assert all("reward step" in part for part in iterations)


def test_a_reward_that_runs_out_of_memory_is_asked_for_again():
    calls = []

    def reward(index, sample):
        calls.append(index)
        if len(calls) == 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return worth(index, sample)

    stream = RewardStream(reward)
    rollout = sampled(finished=stream.finished)
    assert stream(rollout) == [worth(i, sample) for i, sample in enumerate(rollout.samples)]
    assert len(calls) == 61 and calls.count(calls[9]) == 2
