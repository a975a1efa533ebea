"""Constrained decoding: nothing but the answers, drawn as the policy would draw among them."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine import make_model, random_prompts, tree_of_rollout
from small import call, leftovers, lines, ppo_steps, quiet_console
from tiny import KINDS, merging_tokenizer

from fastppo.batch.encode import encode_answer
from fastppo.batch.token_tree import build_tree
from fastppo.errors import UserError
from fastppo.evaluate import allowed_answers, encode, evaluate, evaluate_run
from fastppo.model.actor_critic import POLICY
from fastppo.rollout.sampler import Sampling, generate
from fastppo.rollout.trie import TokenTrie
from fastppo.tasks import Example, get_task

ANSWERS = [[10, 11, 1], [10, 12, 13, 1], [20, 1], [20, 21, 1]]  # 1 ends an answer; one begins as another ends
COLA = get_task("cola")
EXAMPLES = [Example({"sentence": f"Sentence {i}."}, i % 2, f"row {i}") for i in range(6)]


def answers_in(trie, node=0, before=()):
    """The token sequences that the tables allow."""
    found = set()
    for token, behind, is_padding in zip(trie.token_NC[node], trie.next_NC[node], trie.is_padding_NC[node], strict=True):
        if not is_padding:
            now = (*before, int(token))
            found |= answers_in(trie, int(behind), now) if behind else {now}
    return found


# -- the trie ----------------------------------------------------------------------------------------------------------


def test_the_tables_hold_the_answers():
    trie = TokenTrie(ANSWERS)
    assert answers_in(trie) == set(map(tuple, ANSWERS)) and trie.longest == 4
    logits = torch.arange(90.0).view(3, 30)
    nodes = torch.zeros(3, dtype=torch.int64)
    assert trie.among(logits, nodes).tolist() == [[10, 20], [40, 50], [70, 80]]
    tokens, nodes = trie.follow(nodes, torch.tensor([0, 1, 0]))
    assert tokens.tolist() == [10, 20, 10]
    assert trie.among(logits, nodes).tolist() == [[11, 12], [31, 51], [71, 72]]
    tokens, nodes = trie.follow(nodes, torch.tensor([0, 0, 1]))
    assert tokens.tolist() == [11, 1, 12]
    assert trie.among(logits, nodes)[[0, 2]].tolist() == [[1, -torch.inf], [73, -torch.inf]]


def test_nothing_is_read_back_from_the_device():
    """Tensors on ``meta`` have no numbers: whoever asks for one raises."""
    trie = TokenTrie(ANSWERS, device="meta")
    nodes = torch.zeros(5, dtype=torch.int64, device="meta")
    among = trie.among(torch.empty(5, 300, device="meta"), nodes)
    assert among.shape == (5, 2) and [x.shape for x in trie.follow(nodes, among.argmax(1))] == [(5,), (5,)]


@pytest.mark.parametrize("answers", [[], [[]], [[5, 1], []], [[5, 2], [6, 1]], [[1, 5, 1]], [[5], [5, 6]]])
def test_answers_that_are_not_closed(answers):
    with pytest.raises(ValueError, match="must end with one end token"):
        TokenTrie(answers)


def test_answers_that_are_equal():
    with pytest.raises(ValueError, match="must differ"):
        TokenTrie([[5, 1], [6, 1], [5, 1]])


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [3, 64])
def test_every_sample_is_an_answer_and_log_probs_are_those_of_all_tokens(kind, slots):
    model = make_model(kind)
    assert model.base.eos_ids == (1,)
    settings = Sampling(max_new_tokens=4, slots=slots, temperature=3.0)  # hot: every answer comes
    rollout = generate(model, random_prompts(0, 12), 3, settings, seed=0, answers=TokenTrie(ANSWERS))
    assert {tuple(s.tokens) for s in rollout.samples} == set(map(tuple, ANSWERS))
    assert all(s.finish == "eos" for s in rollout.samples)
    wanted = model.policy_logprob(tree_of_rollout(rollout), temperature=3.0)[0].detach()
    found = torch.tensor([x for s in rollout.samples for x in s.logprobs])
    assert (found - wanted).abs().max() < 1e-5
    assert wanted.max() < -0.5  # among all tokens, also where only one may follow


def test_draws_follow_the_policy_among_what_may_follow():
    model, prompt = make_model("llama"), random_prompts(0, 1)
    rollout = generate(model, prompt, 4000, Sampling(max_new_tokens=4, slots=4000), seed=0, answers=TokenTrie(ANSWERS))
    counts = Counter(tuple(s.tokens[:i]) for s in rollout.samples for i in range(1, len(s.tokens) + 1))
    logprob = {tuple(s.tokens[:i]): s.logprobs[i - 1] for s in rollout.samples for i in range(1, len(s.tokens) + 1)}
    for begin, these in (((), (10, 20)), ((10,), (11, 12)), ((20,), (1, 21))):
        n = counts[begin] if begin else 4000
        p = torch.tensor([logprob[*begin, token] for token in these]).softmax(0)[0]
        assert n > 200 and 0.02 < p < 0.98
        assert abs(counts[*begin, these[0]] / n - p) < 4 * (p * (1 - p) / n) ** 0.5  # four standard errors


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mass_is_the_policys_own_probability_of_an_answer(temperature):
    """Of each sample the product of what might have followed; in the mean, for q is p / mass, all answers' probability."""
    model, prompt = make_model("llama"), random_prompts(0, 1)
    settings = Sampling(max_new_tokens=4, slots=4000, temperature=temperature)
    samples = generate(model, prompt, 4000, settings, seed=0, answers=TokenTrie(ANSWERS)).samples
    tree = build_tree([prompt[0] + answer for answer in ANSWERS], [len(prompt[0])] * len(ANSWERS))
    logprob = model.policy_logprob(tree, temperature=temperature)[0].detach().split([len(answer) for answer in ANSWERS])
    p = {tuple(answer): of.sum().exp().item() for answer, of in zip(ANSWERS, logprob, strict=True)}
    next_p = {}  # of each beginning of an answer and each token behind it
    for answer, of in zip(ANSWERS, logprob, strict=True):
        for i, token in enumerate(answer):
            next_p.setdefault(tuple(answer[:i]), {})[token] = of[i].exp().item()
    for answer in ANSWERS:
        wanted = math.prod(sum(next_p[tuple(answer[:i])].values()) for i in range(len(answer)))
        found = [s.mass for s in samples if s.tokens == answer]
        assert found and max(abs(mass / wanted - 1) for mass in found) < 1e-4
    mass = torch.tensor([s.mass for s in samples])
    assert abs(mass.mean() - sum(p.values())) < 4 * mass.std() / len(mass) ** 0.5


def test_without_constraint_the_mass_is_all():
    rollout = generate(make_model("llama"), random_prompts(0, 3), 2, Sampling(), seed=0)
    assert {s.mass for s in rollout.samples} == {1.0}


def best_answer(model, prompt):
    """The greedy walk through the answers, a forward of the trainer a token."""
    taken: list[int] = []
    while taken not in ANSWERS:
        tree = build_tree([prompt + taken + [0]], [len(prompt) + len(taken)])
        with torch.no_grad():
            logits = model.backbone.head.logits(model.backbone.hidden(tree, tree.head_rows))[0]
        taken.append(max((a[len(taken)] for a in ANSWERS if a[: len(taken)] == taken), key=lambda token: logits[token]))
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_greedy(kind):
    model, prompts = make_model(kind), random_prompts(0, 12)
    settings = Sampling(temperature=0.0, max_new_tokens=4, slots=5)
    found = [s.tokens for s in generate(model, prompts, 1, settings, seed=0, answers=TokenTrie(ANSWERS)).samples]
    assert found == [best_answer(model, prompt) for prompt in prompts] and len(set(map(tuple, found))) > 1


def answers_of(model, prompts, samples=2, *, seed=2, first_id=0, **options):
    settings = Sampling(**{"max_new_tokens": 4, "slots": 64} | options)
    rollout = generate(model, prompts, samples, settings, seed=seed, first_id=first_id, answers=TokenTrie(ANSWERS))
    return [s.tokens for s in rollout.samples]


def test_top_k_and_top_p_choose_among_what_may_follow():
    model, prompts = make_model("llama"), random_prompts(0, 8)
    greedy = answers_of(model, prompts, temperature=0.0)
    free = answers_of(model, prompts)
    assert answers_of(model, prompts, top_k=1) == answers_of(model, prompts, top_p=1e-6) == greedy != free
    # Two may follow at most, and hundreds of tokens that may not are likelier.
    assert answers_of(model, prompts, top_k=2) == free


@pytest.mark.parametrize("kind", ["qwen2", "mpt"])
def test_draws_do_not_depend_on_the_batch(kind):
    model, prompts = make_model(kind), random_prompts(1, 8)
    whole = answers_of(model, prompts)
    assert len(set(map(tuple, whole))) > 1 and answers_of(model, prompts, seed=3) != whole
    for slots in (2, 5):
        assert answers_of(model, prompts, slots=slots) == whole
    assert answers_of(model, prompts[3:], slots=4, first_id=6) == whole[6:]


def test_a_diverged_policy_is_seen():
    """Its answers are some of those allowed; the log-probs say that they mean nothing."""
    model = make_model("llama")
    with torch.no_grad():
        for parameter in model.adapter_tensors(POLICY).values():
            parameter.fill_(torch.nan)
    rollout = generate(model, random_prompts(0, 4), 2, Sampling(), seed=0, answers=TokenTrie(ANSWERS))
    assert all(s.tokens in ANSWERS and torch.tensor(s.logprobs).isnan().all() for s in rollout.samples)


# -- a task's answers --------------------------------------------------------------------------------------------------


def test_a_task_constrained_to_its_answers():
    """A random policy answers anything; constrained, nothing is malformed."""
    for constrained in (False, True):
        model = make_model("llama", sample__constrained=constrained, sample__max_new_tokens=12)
        data = encode(model, COLA, EXAMPLES)
        assert (allowed_answers(model, data).answers is not None) == constrained
        assert evaluate(model, data)[0].scores["malformed"] == (0.0 if constrained else 1.0)


def test_a_tokenizer_that_merges_across_the_end_of_the_prompt():
    """The answers are those that SFT teaches behind every prompt, and prompt and answer read as one text."""
    model = make_model("llama", sample__constrained=True, sample__max_new_tokens=8)
    model.base = replace(model.base, tokenizer=merging_tokenizer())
    data = encode(model, COLA, EXAMPLES)
    found = answers_in(allowed_answers(model, data).answers)
    decode = model.base.tokenizer.decode
    for example, prompt in zip(EXAMPLES, data.prompts, strict=True):
        taught = [encode_answer(model.base.tokenizer, COLA.prompt(example), prompt, COLA.answer(i)) for i in (0, 1)]
        assert found == set(map(tuple, taught))
        assert {decode(prompt + answer[:-1]) for answer in taught} == {decode(prompt) + " no", decode(prompt) + " yes"}


def test_a_tokenizer_without_the_answers():
    model = make_model("llama", sample__constrained=True)

    class Deaf:
        eos_token_id = 1

        def __call__(self, text, **_):
            return {"input_ids": [2]}

    data = encode(model, COLA, EXAMPLES)
    model.base = replace(model.base, tokenizer=Deaf())
    with pytest.raises(UserError, match="^--sample-constrained: .* cannot spell the answers: .* differ") as caught:
        allowed_answers(model, data)
    assert "\n" not in str(caught.value)


def test_a_constrained_run_and_its_evaluation(world, tmp_path):
    run = tmp_path / "run"
    summary, _ = world.train(run, sample__constrained=True, sft__examples=0)
    rows = [*ppo_steps(run), *summary["stages"].values()]
    assert [row["malformed"] for row in rows] == [0.0] * len(rows)
    assert {row["answer"].strip() for row in lines(run / "samples.jsonl")} == {"yes", "no"}
    assert all(0 < row["constrained_mass"] <= 1 for row in ppo_steps(run))
    assert all(row["first_log_ratio"] == 0.0 for row in ppo_steps(run)) and summary["sampler_gap_max"] < 1e-4
    again = evaluate_run(run, None, "dev", None, quiet_console())
    assert again == {key: value for key, value in summary["stages"]["ppo"].items() if key != "labels"}
    assert leftovers(run) == []


def test_too_few_tokens_for_an_answer(world, tmp_path):
    """One line, before a run begins."""
    run = tmp_path / "run"
    code, out, err = call(world.argv(run, sample__constrained=True, sample__max_new_tokens=1), tmp_path)
    assert (code, err.count("\n")) == (2, 1) and not run.exists()
    assert err.startswith("fastppo: error: --sample-max-new-tokens: 1 is too few for --sample-constrained; expected at least ")
