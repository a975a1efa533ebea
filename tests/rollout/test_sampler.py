"""The sampler: transformers' own greedy answers, the trainer's log-probs, and draws that depend on nothing but their sample."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine import PACKED_KINDS, make_config, make_model, random_ids, random_prompts, tiny_folder, tree_of_rollout
from tiny import KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.algorithms.ppo import estimate
from fastppo.batch.rollout import Sample, pack_rollout
from fastppo.errors import Interrupted, UserError
from fastppo.model.actor_critic import POLICY
from fastppo.model.load import load_base
from fastppo.rollout import decoder, sampler
from fastppo.rollout.sampler import Sampling, generate
from fastppo_kernels import sample as sample_op

GREEDY = Sampling(temperature=0.0, max_new_tokens=8, slots=4)
DRAW = Sampling(temperature=1.0, max_new_tokens=8, slots=4)

@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def ways(request, monkeypatch):
    """There keys and values lie in pages, and the host looks at tokens when the next ones are under way."""
    gpu = request.param == "as on a GPU"
    monkeypatch.setattr(decoder, "in_pages", lambda *_: gpu)
    monkeypatch.setattr(sampler, "LAG", {"cpu": int(gpu)})


PROMPTS = {
    "common beginning": random_prompts(0, 7),
    "nothing in common": random_prompts(1, 6, root=0),
    "equal and prefixes of each other": [[5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 7, 8, 9], [5]],
    "one prompt": random_prompts(2, 1),
    "one token": [[5]],
    "all equal": [[5, 6, 7]] * 5,
}


def hugging_face_greedy(model, prompts, max_new_tokens):
    """Of each prompt what transformers' generate gives, without a cache and on its own attention: the tokens, their log-probs,
    and those of one forward over prompt and answer."""
    packed = model.backbone.packed
    if packed:
        model.base.model.set_attn_implementation("eager")
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.peft.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            use_cache=False, pad_token_id=2, eos_token_id=list(model.base.eos_ids), return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        tokens = out.sequences[:, len(prompt) :]
        with torch.no_grad():
            whole = model.peft(input_ids=out.sequences, use_cache=False).logits[0, len(prompt) - 1 : -1]
        by_place = (logits.float().log_softmax(-1).gather(1, tokens.T)[:, 0] for logits in (torch.cat(out.logits), whole))
        answers.append((tokens[0].tolist(), *by_place))
    if packed:
        model.base.model.set_attn_implementation("fastppo")
    return answers


def assert_equal(samples, wanted):
    """Tokens, and log-probs up to rounding, are those that transformers gave."""
    assert [s.tokens for s in samples] == [tokens for tokens, *_ in wanted]
    for s, (_, *logprobs) in zip(samples, wanted, strict=True):
        assert all((torch.tensor(s.logprobs) - x).abs().max() < 1e-5 for x in logprobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PROMPTS)
def test_greedy_equals_transformers_generate(kind, case, ways):
    model = make_model(kind)
    got = generate(model, PROMPTS[case], 1, GREEDY, seed=0)
    assert_equal(got.samples, hugging_face_greedy(model, PROMPTS[case], 8))


def test_greedy_prefers_the_policy_over_the_base():
    model = make_model("llama", spread=0.3)
    with_adapter = [s.tokens for s in generate(model, PROMPTS["common beginning"], 1, GREEDY, seed=0).samples]
    bare = make_model("llama", spread=0)
    assert with_adapter != [s.tokens for s in generate(bare, PROMPTS["common beginning"], 1, GREEDY, seed=0).samples]


def answers(model, prompts, samples, slots, *, seed=3, first_id=0, **options):
    settings = Sampling(**{"temperature": 1.0, "max_new_tokens": 8, "slots": slots} | options)
    return [s.tokens for s in generate(model, prompts, samples, settings, seed=seed, first_id=first_id).samples]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_slots_or_neighbours(kind, ways):
    """Draws of a sample are fixed by seed, sample number and its own tokens."""
    model = make_model(kind)
    prompts = random_prompts(4, 9)
    whole = answers(model, prompts, 2, slots=64)
    assert len(set(map(tuple, whole))) > 9
    for slots in (1, 2, 5, 8):
        assert answers(model, prompts, 2, slots) == whole
    for p in (0, 4, 8):  # alone, under the number that the sample has in the whole
        assert answers(model, [prompts[p]], 2, slots=8, first_id=2 * p) == whole[2 * p : 2 * p + 2]
    # Without the first ones: every prompt is admitted at another time, into another slot, with other neighbours.
    for a in (1, 2, 5):
        assert answers(model, prompts[a:], 2, slots=4, first_id=2 * a) == whole[2 * a :]
    assert answers(model, prompts, 2, slots=64, seed=4) != whole
    assert answers(model, prompts, 2, slots=64, first_id=1000) != whole


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_small_prefill_budget_changes_nothing(kind):
    prompts = random_prompts(4, 9)
    model = make_model(kind)
    small = make_model(kind, micro_batch_tokens=5)
    assert answers(small, prompts, 2, slots=8) == answers(model, prompts, 2, slots=8)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mpt"])
def test_a_thousand_sequences_through_32_slots(kind, ways, monkeypatch):
    """None lost, none twice, each in its place and continuing its own prompt, whatever the slots are."""
    model, rows = make_model(kind), []
    model.base = replace(model.base, eos_ids=tuple(range(0, 320, 6)))  # answers of every length
    prompts = random_prompts(5, 250, longest=14)
    monkeypatch.setattr(sampler, "sample", lambda logits, **how: rows.append(len(logits)) or sample_op(logits, **how))
    ended = []
    rollout = generate(
        model, prompts, 4, Sampling(max_new_tokens=12, slots=32), seed=0, finished=lambda index, _: ended.append(index)
    )
    assert max(rows) == 32 and sorted(ended) == list(range(1000)) != ended
    assert rollout.prompts == prompts
    assert [s.prompt for s in rollout.samples] == [p for p in range(250) for _ in range(4)]
    assert {len(s.tokens) for s in rollout.samples} == set(range(1, 13))
    for s in rollout.samples:
        assert len(s.tokens) == len(s.logprobs)
        assert all(t % 6 for t in s.tokens[:-1]), "nothing follows an end token"
        assert s.finish == ("eos" if s.tokens[-1] % 6 == 0 else "length")
        assert s.finish == "eos" or len(s.tokens) == 12
    # Only the right prompt explains the log-probs, so no answer was filed under another's name.
    with torch.no_grad():
        logprob, _ = model.policy_logprob(tree_of_rollout(rollout), temperature=1.0)
    sampled = torch.tensor([x for s in rollout.samples for x in s.logprobs])
    assert (logprob - sampled).abs().max() < 1e-4
    assert [s.tokens for s in rollout.samples] == answers(model, prompts, 4, slots=1000, seed=0, max_new_tokens=12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_the_trainers(kind, temperature):
    model = make_model(kind)
    rollout = generate(model, random_prompts(6, 8), 3, Sampling(temperature=temperature, max_new_tokens=9, slots=6), seed=0)
    scores = model.forward(tree_of_rollout(rollout), temperature=temperature)
    sampled = torch.tensor([x for s in rollout.samples for x in s.logprobs])
    assert (scores.logprob - sampled).abs().max() < 1e-5


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_bfloat16_logprobs_stay_near_the_trainers(kind):
    model = make_model(kind, dtype="bfloat16")
    rollout = generate(model, random_prompts(6, 8), 3, Sampling(max_new_tokens=9, slots=6), seed=0)
    scores = model.forward(tree_of_rollout(rollout), temperature=1.0)
    sampled = torch.tensor([x for s in rollout.samples for x in s.logprobs])
    assert (scores.logprob - sampled).abs().max() < 0.3


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_one_new_token(kind):
    model = make_model(kind)
    rollout = generate(model, random_prompts(0, 5), 3, Sampling(max_new_tokens=1, slots=4), seed=0)
    assert len(rollout.samples) == 15
    assert all(len(s.tokens) == 1 and s.finish in ("length", "eos") for s in rollout.samples)


def test_slots_below_the_samples_of_a_prompt():
    model = make_model("llama")
    assert answers(model, PROMPTS["common beginning"], 5, slots=1) == answers(model, PROMPTS["common beginning"], 5, slots=99)


def test_end_tokens_of_the_generation_config(tmp_path):
    """A model that lists several end tokens ends at any of them; the tokenizer's own comes first."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    base.generation_config.eos_token_id = list(range(40, 320))
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder("llama")).save_pretrained(tmp_path)
    loaded = load_base(replace(make_config("llama"), model=str(tmp_path)))
    assert loaded.eos_ids == (1, *range(40, 320))
    model = make_model("llama")
    model.base = loaded
    rollout = generate(model, random_prompts(0, 20), 2, Sampling(max_new_tokens=30, slots=16), seed=0)
    assert any(s.finish == "eos" and s.tokens[-1] >= 40 for s in rollout.samples)
    for s in rollout.samples:
        assert all(1 < t < 40 or t == 0 for t in s.tokens[:-1])
        assert s.text == model.base.tokenizer.decode(s.tokens[:-1] if s.finish == "eos" else s.tokens)


def test_stop_strings():
    """The answer ends at the first stop string; tokens hold all that was sampled, the text stops before it."""
    model = make_model("llama")
    tokenizer, prompts = model.base.tokenizer, random_prompts(0, 6)
    free = generate(model, prompts, 2, Sampling(max_new_tokens=10, slots=16), seed=0)
    stop = tokenizer.decode(free.samples[0].tokens[3])
    assert stop
    settings = Sampling(max_new_tokens=10, slots=16, stop=(stop, "never sampled"))
    for before, s in zip(free.samples, generate(model, prompts, 2, settings, seed=0).samples, strict=True):
        assert s.tokens == before.tokens[: len(s.tokens)], "what stands before the stop is not changed"
        text = tokenizer.decode(s.tokens)
        if s.finish == "stop":
            assert s.text == text[: text.index(stop)] and stop not in s.text
            assert stop not in tokenizer.decode(s.tokens[:-1]), "nothing follows the stop"
        else:
            assert stop not in text and s.tokens == before.tokens
    assert generate(model, prompts, 2, settings, seed=0).samples[0].finish == "stop"


def test_stop_string_across_tokens():
    model = make_model("llama")
    tokenizer, prompts = model.base.tokenizer, random_prompts(0, 1)
    free = generate(model, prompts, 1, Sampling(max_new_tokens=10), seed=0).samples[0]
    pieces = [tokenizer.decode(t) for t in free.tokens]
    border = next(i for i in range(1, 9) if pieces[i].isascii() and pieces[i + 1].isascii())
    stop = pieces[border][-1] + pieces[border + 1][0]
    s = generate(model, prompts, 1, Sampling(max_new_tokens=10, stop=(stop,)), seed=0).samples[0]
    assert s.finish == "stop" and s.text == tokenizer.decode(free.tokens)[: tokenizer.decode(free.tokens).index(stop)]


def test_stop_string_in_the_last_allowed_token():
    """A stop beats the length limit."""
    model = make_model("llama")
    prompts = random_prompts(0, 1)
    free = generate(model, prompts, 1, Sampling(max_new_tokens=3), seed=0).samples[0]
    stop = model.base.tokenizer.decode(free.tokens[2])
    assert stop not in model.base.tokenizer.decode(free.tokens[:2])
    s = generate(model, prompts, 1, Sampling(max_new_tokens=3, stop=(stop,)), seed=0).samples[0]
    assert (s.finish, s.tokens) == ("stop", free.tokens)


def best_tokens(model, sample, k):
    """The k best tokens at each place of a sample, from the trainer's head."""
    with torch.no_grad():
        tree = tree_of_rollout(sample)
        logits = model.backbone.head.logits(model.backbone.hidden(tree)[tree.head_rows])[tree.action_rows]
    return logits.topk(k).indices, logits


def test_top_k():
    model = make_model("llama")
    prompts = random_prompts(0, 8)
    rollout = generate(model, prompts, 4, Sampling(top_k=3, max_new_tokens=6), seed=0)
    targets = tree_of_rollout(rollout).action_targets
    best, _ = best_tokens(model, rollout, 3)
    assert (best == targets[:, None]).any(1).all()
    assert len({int((row == t).nonzero()) for row, t in zip(best, targets, strict=True)}) == 3
    greedy = answers(model, prompts, 1, slots=8, temperature=0.0)
    assert answers(model, prompts, 1, slots=8, top_k=1) == greedy


def test_top_p():
    model = make_model("llama")
    rollout = generate(model, random_prompts(0, 8), 4, Sampling(top_p=0.5, max_new_tokens=6), seed=0)
    targets = tree_of_rollout(rollout).action_targets
    _, logits = best_tokens(model, rollout, 1)
    p = logits.softmax(-1)
    larger = torch.where(p > p.gather(1, targets[:, None]), p, 0).sum(1)
    assert (larger < 0.5).all()
    free = generate(model, random_prompts(0, 8), 4, Sampling(max_new_tokens=6), seed=0)
    assert [s.tokens for s in free.samples] != [s.tokens for s in rollout.samples]


def test_temperature_reaches_the_draw():
    """Nearly cold: nearly always the best token. Hot: rarely."""
    model = make_model("llama")
    shares = {}
    for temperature in (0.02, 20.0):
        rollout = generate(model, random_prompts(0, 8), 4, Sampling(temperature=temperature, max_new_tokens=6), seed=0)
        best, _ = best_tokens(model, rollout, 1)
        shares[temperature] = (best[:, 0] == tree_of_rollout(rollout).action_targets).float().mean()
    assert shares[0.02] > 0.9 and shares[20.0] < 0.1


def test_draws_follow_the_distribution():
    """2,000 first tokens of one prompt against the trainer's probabilities (chi-square over the ten likeliest and the rest)."""
    model = make_model("llama")
    prompt = random_prompts(0, 1)
    rollout = generate(model, prompt, 2000, Sampling(max_new_tokens=1, slots=2000), seed=0)
    _, logits = best_tokens(model, generate(model, prompt, 1, Sampling(max_new_tokens=1), seed=0), 1)
    p = logits[0].softmax(-1)
    top = p.topk(10).indices
    expected = torch.cat([p[top], 1 - p[top].sum()[None]]) * 2000
    drawn = torch.tensor([s.tokens[0] for s in rollout.samples])
    counts = (drawn[:, None] == top).sum(0)
    counts = torch.cat([counts, 2000 - counts.sum()[None]])
    assert ((counts - expected).square() / expected).sum() < 35  # 10 degrees of freedom: p < 2e-4


def test_same_seed_and_ids_reach_the_kernel(monkeypatch):
    """Every sample keeps its own number, and its steps count from 0."""
    seen = []

    def spy(logits, **options):
        seen.extend(zip(options["sequence_ids_B"].tolist(), options["step_B"].tolist(), strict=True))
        return sample_op(logits, **options)

    monkeypatch.setattr(sampler, "sample", spy)
    rollout = generate(make_model("llama"), random_prompts(0, 5), 2, Sampling(max_new_tokens=4, slots=4), seed=0, first_id=70)
    expected = [(70 + i, step) for i, s in enumerate(rollout.samples) for step in range(len(s.tokens))]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_a_late_look_at_the_tokens_changes_no_sample(kind, monkeypatch):
    """What is drawn for a sequence that has ended meanwhile is dropped; where the limit ends it nothing is."""
    model, prompts = make_model(kind), random_prompts(0, 9)
    model.base = replace(model.base, eos_ids=tuple(range(0, 320, 6)))
    stop = model.base.tokenizer.decode(max(answers(model, prompts, 2, slots=6, seed=0), key=len)[3])
    sampling, found = Sampling(max_new_tokens=8, slots=6, stop=(stop,)), {}
    draws, ended = Counter(), []

    def spy(logits, **how):
        draws.update(how["sequence_ids_B"].tolist())
        return sample_op(logits, **how)

    monkeypatch.setattr(sampler, "sample", spy)
    for late in (0, 1, 3):
        draws.clear()
        ended.clear()
        monkeypatch.setattr(sampler, "LAG", {"cpu": late})
        found[late] = generate(model, prompts, 2, sampling, seed=0, finished=lambda index, _: ended.append(index))
        assert sorted(ended) == list(range(18))
        more = [draws[i] - len(s.tokens) for i, s in enumerate(found[late].samples)]
        assert all(0 <= n <= min(late, 8 - len(s.tokens)) for n, s in zip(more, found[late].samples, strict=True))
        assert any(more) == (late > 0)
    assert {s.finish for s in found[0].samples} == {"eos", "stop", "length"}
    assert [s.tokens for s in found[0].samples] == [s.tokens for s in found[1].samples] == [s.tokens for s in found[3].samples]
    assert [s.text for s in found[0].samples] == [s.text for s in found[1].samples]
    for s, late in zip(found[0].samples, found[1].samples, strict=True):
        assert (s.prompt, s.finish) == (late.prompt, late.finish) and s.logprobs == pytest.approx(late.logprobs, abs=1e-5)


def test_check_can_stop_the_sampler():
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        generate(make_model("llama"), random_prompts(0, 5), 2, DRAW, seed=0, check=check)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_a_diverged_policy_ends_with_one_line(kind):
    """NaN in the adapter: the sampler comes to an end and the estimate names the cause."""
    model = make_model(kind)
    with torch.no_grad():
        next(iter(model.adapter_tensors(POLICY).values())).fill_(torch.nan)
    rollout = generate(model, random_prompts(0, 4), 2, DRAW, seed=0)
    assert all(isinstance(s, Sample) and len(s.tokens) == 8 for s in rollout.samples)
    minis = pack_rollout(
        rollout, minibatches=1, budget=500, padded=not model.backbone.packed, device="cpu", rng=np.random.default_rng(0)
    )
    with pytest.raises(UserError, match="diverged"):
        estimate(model, minis, rollout, [0.0] * 8, 0.0, model.config)


def test_long_answers_against_transformers(ways):
    """A cache that grows past the prompts, beyond a sliding window of 7."""
    prompts = [random_ids(random.Random(i), 3 + i) for i in range(4)]
    for kind in ("mistral", "mpt"):
        model = make_model(kind)
        got = generate(model, prompts, 1, Sampling(temperature=0.0, max_new_tokens=30, slots=2), seed=0)
        assert_equal(got.samples, hugging_face_greedy(model, prompts, 30))
