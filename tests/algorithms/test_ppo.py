"""PPO's estimates and updates on small rollouts, by hand and against plain loops."""

import math
import random
import traceback

import numpy as np
import pytest
import torch
from engine import make_config, make_model, random_prompts, relative, same, spread_adapter, tree_of_rollout
from tiny import KINDS
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.algorithms import ppo
from fastppo.algorithms.optim import load_optimizer_state, lr_factor, make_optimizer, optimizer_state, set_lr
from fastppo.batch.rollout import pack_rollout
from fastppo.model.actor_critic import CRITIC, POLICY
from fastppo.rollout.sampler import Sampling, generate


def sampled(model, prompts=6, samples=3, seed=0):
    texts = random_prompts(seed, prompts, root=4)
    rollout = generate(model, texts, samples, Sampling.of(model.config), seed=seed)
    rng = random.Random(seed)
    return rollout, [rng.choice([-1.0, 0.5, 2.0]) for _ in rollout.samples]


def packed(model, rollout, minibatches=1, budget=10**6):
    return pack_rollout(
        rollout, minibatches=minibatches, budget=budget, padded=not model.backbone.packed, device="cpu",
        rng=np.random.default_rng(0),
    )  # fmt: skip


def prepared(kind="llama", *, minibatches=1, budget=10**6, critic=True, **settings):
    """A model, its rollout, packed and estimated."""
    settings = {"sample__max_new_tokens": 5, "ppo__samples": 3} | settings
    model = make_model(kind, **settings)
    if critic:
        torch.manual_seed(5)
        torch.nn.init.normal_(model.value_head.weight, std=0.3)
    model.freeze_reference()
    rollout, rewards = sampled(model)
    minis = packed(model, rollout, minibatches, budget)
    estimates = ppo.estimate(model, minis, rollout, rewards, model.config.ppo.kl_coef, model.config)
    return model, rollout, rewards, minis, estimates


def per_sample(minis, name):
    """A known tensor as {sample: list}."""
    result = {}
    for part in (part for mini in minis for part in mini.parts):
        pieces = part.known[name].split(part.tree.cu_actions.diff().tolist())
        result |= {i: piece.tolist() for i, piece in zip(part.samples, pieces, strict=True)}
    return result


def by_hand(rewards_T, values_T, gamma, lam):
    advantages, following = [], 0.0
    for t in reversed(range(len(rewards_T))):
        next_value = values_T[t + 1] if t + 1 < len(values_T) else 0.0
        following = rewards_T[t] + gamma * next_value - values_T[t] + gamma * lam * following
        advantages.insert(0, following)
    return advantages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_estimate_against_a_plain_loop(kind, estimator, reference):
    """Reward at the last token, KL of every token in the reward (k1 only), advantages, returns, over several micro-batches."""
    model, rollout, rewards, minis, estimates = prepared(
        kind, minibatches=2, budget=40, ppo__kl_estimator=estimator, ppo__reference=reference, ppo__kl_coef=0.3,
        ppo__gamma=0.9, ppo__lam=0.7, ppo__whiten=False,
    )  # fmt: skip
    assert len([p for m in minis for p in m.parts]) > 2
    tree = tree_of_rollout(rollout)
    scores, reference_logprob = model.forward(tree, temperature=1.0), model.reference_logprob(tree, temperature=1.0)
    if reference == "start":
        assert torch.equal(reference_logprob, scores.logprob), "KL exactly 0 at the start"
    names = ("old_logprob", "old_values", "ref_logprob", "advantages", "returns")
    known = {name: per_sample(minis, name) for name in names}
    kls = []
    for i, (sample, begin) in enumerate(zip(rollout.samples, tree.cu_actions.tolist(), strict=False)):
        mine = slice(begin, begin + len(sample.tokens))
        log_ratio = (scores.logprob - reference_logprob)[mine].tolist()
        values = scores.values[mine].tolist()
        token_rewards = [-0.3 * x if estimator == "k1" else 0.0 for x in log_ratio]
        token_rewards[-1] += rewards[i]
        advantages = by_hand(token_rewards, values, 0.9, 0.7)
        close = {"abs": 2e-5, "rel": 1e-5}
        assert known["old_logprob"][i] == pytest.approx(scores.logprob[mine].tolist(), **close)
        assert known["ref_logprob"][i] == pytest.approx(reference_logprob[mine].tolist(), **close)
        assert known["old_values"][i] == pytest.approx(values, **close)
        assert known["advantages"][i] == pytest.approx(advantages, **close)
        assert known["returns"][i] == pytest.approx([a + v for a, v in zip(advantages, values, strict=True)], **close)
        kls.append(sum(log_ratio))
    assert estimates.kl == pytest.approx(np.mean(kls), abs=1e-4)
    if reference == "start":
        assert estimates.kl == 0.0
    assert 0 <= estimates.sampler_gap < 1e-4
    gap = max(
        abs(a - b) for i, s in enumerate(rollout.samples) for a, b in zip(s.logprobs, known["old_logprob"][i], strict=True)
    )
    assert estimates.sampler_gap == pytest.approx(gap)


def test_whitening_is_over_the_whole_batch():
    """Mean 0 and variance 1 over all mini-batches together, not in each."""
    settings = {"minibatches": 3, "budget": 20}
    *_, raw, _ = prepared(ppo__whiten=False, **settings)
    *_, white, _ = prepared(ppo__whiten=True, **settings)
    raw, white = ([p.known["advantages"] for m in minis for p in m.parts] for minis in (raw, white))
    assert len(raw) > 3
    every = torch.cat(raw)
    for plain, whitened in zip(raw, white, strict=True):
        torch.testing.assert_close(whitened, (plain - every.mean()) / every.std())
    assert abs(white[0].mean()) > 1e-3


def test_whitening_leaves_returns_alone():
    *_, raw, _ = prepared(ppo__whiten=False)
    *_, white, _ = prepared(ppo__whiten=True)
    assert torch.equal(raw[0].parts[0].known["returns"], white[0].parts[0].known["returns"])


def test_no_kl_needs_no_reference(monkeypatch):
    model = make_model("llama", ppo__kl_coef=0)
    monkeypatch.setattr(model, "reference_logprob", None)
    rollout, rewards = sampled(model)
    minis = packed(model, rollout)
    estimates = ppo.estimate(model, minis, rollout, rewards, 0.0, model.config)
    assert estimates.kl is None and "ref_logprob" not in minis[0].parts[0].known
    run_update(model, minis, kl_coef=0.0)


def run_update(model, minis, *, kl_coef=None, critic_only=False, lr=1e-3, seed=0, optimizer=None):
    optimizer = optimizer or make_optimizer(model.trainable(), lr, 1e-5)
    kl_coef = model.config.ppo.kl_coef if kl_coef is None else kl_coef
    return ppo.update(model, optimizer, minis, kl_coef, model.config, np.random.default_rng(seed), critic_only=critic_only)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"value__trunk": "own"}, {"value__trunk": "detached"}])
def test_first_ratio_is_exactly_one(kind, settings):
    """Old log-probs of the training forward: same trees, same arithmetic, same bits; over several micro-batches too."""
    model, *_, minis, _ = prepared(kind, minibatches=2, budget=40, ppo__old_logprobs="trainer", **settings)
    metrics = run_update(model, minis)
    assert metrics["first_log_ratio"] == 0.0
    assert metrics["log_ratio_max"] > 0.0, "later steps move"


def test_first_ratio_with_the_samplers_log_probs():
    """Not exactly 1, but no farther than the sampler gap."""
    model, rollout, _, minis, estimates = prepared(ppo__old_logprobs="sampler", budget=40)
    old = per_sample(minis, "old_logprob")
    assert all(old[i] == pytest.approx(s.logprobs, abs=0) for i, s in enumerate(rollout.samples))
    metrics = run_update(model, minis)
    assert 0 < metrics["first_log_ratio"] <= estimates.sampler_gap + 1e-7


def gradients_of_one_update(kind, budget, critic_only=False, **settings):
    """Gradients as the optimizer sees them (the step itself is left out)."""
    model, *_, minis, _ = prepared(kind, budget=budget, ppo__epochs=1, ppo__max_grad_norm=1e9, **settings)
    spread_adapter(model, POLICY, 0.12, seed=9)  # away from the old policy, so that ratios, clips and KL count
    if critic_only or settings.get("value__trunk") == "own":
        spread_adapter(model, CRITIC, 0.1, seed=3)
    with torch.no_grad():
        model.value_head.weight.add_(0.1)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    optimizer.step = lambda: None
    metrics = run_update(model, minis, critic_only=critic_only, optimizer=optimizer)
    return len(minis[0].parts), [p.grad for p in model.trainable()], metrics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value__trunk": "own", "ppo__entropy_coef": 0.1},
        {"ppo__kl_estimator": "k3", "ppo__reference": "base"},
    ],
)
def test_micro_batches_do_not_change_the_update(kind, settings):
    one, whole, metrics = gradients_of_one_update(kind, 10**6, **settings)
    several, cut, cut_metrics = gradients_of_one_update(kind, 40, **settings)
    assert one == 1 and several > 1
    for ours, theirs in zip(cut, whole, strict=True):
        assert theirs.norm() > 0 and relative(ours, theirs) < 1e-5
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert metrics["clip_fraction"] > 0


def dense_loss(model, rollout, minis, config, kl_coef):
    """The loss of one mini-batch from its formulas, one token after the other."""
    tree = tree_of_rollout(rollout)
    scores = model.forward(tree, temperature=1.0)
    flat = {
        name: torch.tensor([x for i in range(len(rollout.samples)) for x in values[i]])
        for name in minis[0].parts[0].known
        for values in [per_sample(minis, name)]
    }
    p, clip = config.ppo, config.ppo.clip
    ratio = (scores.logprob - flat["old_logprob"]).exp()
    policy = torch.maximum(-flat["advantages"] * ratio, -flat["advantages"] * ratio.clamp(1 - clip, 1 + clip))
    value_clipped = flat["old_values"] + (scores.values - flat["old_values"]).clamp(-config.value.clip, config.value.clip)
    value = 0.5 * torch.maximum((scores.values - flat["returns"]) ** 2, (value_clipped - flat["returns"]) ** 2)
    total = policy - p.entropy_coef * scores.entropy + config.value.coef * value
    log_ratio = scores.logprob - flat.get("ref_logprob", scores.logprob)
    if p.kl_estimator == "k2":
        total = total + kl_coef * 0.5 * log_ratio**2
    if p.kl_estimator == "k3":
        total = total + kl_coef * (torch.exp(-log_ratio) - 1 + log_ratio)
    return total.mean()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_of_the_whole_loss(estimator):
    """Surrogate, clips, entropy, value loss and KL together: the gradient of the formulas (arXiv 1707.06347, eq. 7 and 9)."""
    settings = {"ppo__kl_estimator": estimator, "ppo__entropy_coef": 0.2, "ppo__kl_coef": 0.4, "ppo__reference": "base"}
    model, rollout, _, minis, _ = prepared(ppo__epochs=1, ppo__max_grad_norm=1e9, value__coef=0.7, **settings)
    spread_adapter(model, POLICY, 0.12, seed=9)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    optimizer.step = lambda: None
    run_update(model, minis, optimizer=optimizer)
    got = [p.grad.clone() for p in model.trainable()]
    for parameter in model.trainable():
        parameter.grad = None
    dense_loss(model, rollout, minis, model.config, 0.4).backward()
    for ours, parameter in zip(got, model.trainable(), strict=True):
        assert relative(ours, parameter.grad) < 1e-5


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_pulls_to_the_reference(estimator):
    """Without rewards, only the KL moves the policy: back to the base."""
    model, rollout, _, minis, before = prepared(
        ppo__kl_estimator=estimator, ppo__kl_coef=5.0, ppo__reference="base", ppo__epochs=10, ppo__whiten=False, critic=False
    )
    for part in minis[0].parts:
        part.known["advantages"] = torch.zeros_like(part.known["advantages"])
    metrics = run_update(model, minis, lr=3e-3)
    assert metrics["kl_ref"] > 0
    after = ppo.estimate(model, packed(model, rollout), rollout, [0.0] * len(rollout.samples), 5.0, model.config)
    assert abs(after.kl) < 0.6 * abs(before.kl)


def test_steps_and_minibatches():
    model, *_, minis, _ = prepared(minibatches=3, ppo__epochs=4)
    assert run_update(model, minis)["steps"] == 12


def test_target_kl_ends_the_epochs():
    settings = {"minibatches": 2, "ppo__epochs": 10}
    model, *_, minis, _ = prepared(ppo__target_kl=1e-3, **settings)
    stopped = run_update(model, minis, lr=3e-3)
    assert 2 <= stopped["steps"] < 20, "the first step is at the old policy, whose KL is 0"
    model, *_, minis, _ = prepared(ppo__target_kl=1e9, **settings)
    assert run_update(model, minis, lr=3e-3)["steps"] == 20
    assert all(math.isfinite(x) for x in stopped.values())


@pytest.mark.parametrize("settings", [{}, {"value__trunk": "own"}, {"value__trunk": "detached"}])
def test_critic_only_leaves_the_policy_alone(settings):
    """Bit for bit, also with an optimizer that has moments for the policy's adapter; the critic learns."""
    model, *_, minis, _ = prepared(ppo__epochs=3, minibatches=2, critic=False, **settings)
    optimizer = make_optimizer(model.trainable(), 1e-2, 1e-5)
    run_update(model, minis, optimizer=optimizer)
    before = model.state()
    metrics = run_update(model, minis, optimizer=optimizer, critic_only=True)
    after = model.state()
    policy = {n: t for n, t in before.items() if n.startswith(POLICY)}
    assert same(policy, {n: after[n] for n in policy})
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {"value_head.weight", "value_head.bias"} <= changed
    assert any(n.startswith(CRITIC) for n in changed) == bool(settings.get("value__trunk") == "own")
    assert "first_log_ratio" not in metrics and "value_loss" in metrics and metrics["steps"] == 6


def test_critic_only_gradients_do_not_depend_on_micro_batches():
    one, whole, _ = gradients_of_one_update("llama", 10**6, critic_only=True, value__trunk="own")
    several, cut, _ = gradients_of_one_update("llama", 40, critic_only=True, value__trunk="own")
    assert one == 1 and several > 1
    assert any(g is None for g in whole) and any(g is not None for g in whole)
    for ours, theirs in zip(cut, whole, strict=True):
        assert (ours is None) == (theirs is None)
        assert theirs is None or relative(ours, theirs) < 1e-5


def test_critic_learns_the_returns():
    """Explained variance rises when only the critic trains."""
    model, *_, minis, _ = prepared(ppo__epochs=60, critic=False, value__clip=100, ppo__kl_coef=0)
    run_update(model, minis, lr=3e-2, critic_only=True)
    part = minis[0].parts[0]
    left = (part.known["returns"] - model.values(part.tree)).var() / part.known["returns"].var()
    assert left < 0.7


def test_gradient_is_clipped():
    """The parameters move by the clipped gradient; the norm before clipping is reported."""
    model, *_, minis, _ = prepared(ppo__epochs=1, ppo__max_grad_norm=1e-4)
    before = [p.detach().clone() for p in model.trainable()]
    optimizer = torch.optim.SGD(model.trainable(), lr=1.0)
    metrics = run_update(model, minis, optimizer=optimizer)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.trainable(), before, strict=True)]).norm()
    assert metrics["grad_norm"] > 1e-2 and moved == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_update_repeats_to_the_bit(kind):
    states = []
    for _ in range(2):
        model, *_, minis, _ = prepared(kind, minibatches=2, budget=40)
        run_update(model, minis)
        states.append(model.state())
    assert same(*states)


def test_metrics_are_finite_with_constant_rewards_and_single_tokens():
    """One token an answer, equal rewards, whitened: advantages are zero, nothing divides by zero."""
    model = make_model("llama", sample__max_new_tokens=1, ppo__kl_coef=0)
    rollout, _ = sampled(model, samples=1)
    minis = packed(model, rollout)
    ppo.estimate(model, minis, rollout, [1.0] * 6, 0.0, model.config)
    assert not minis[0].parts[0].known["advantages"].any()
    metrics = run_update(model, minis)
    assert all(math.isfinite(v) for n, v in metrics.items() if n != "explained_variance")
    assert all(t.isfinite().all() for t in model.state().values())
    assert metrics["policy_loss"] == 0.0


@pytest.mark.parametrize(
    ("kl", "samples", "expected"),
    [
        (6.0, 100, 0.2),  # on target
        (12.0, 1000, 0.2 * (1 + 0.2 * 1000 / 10_000)),  # the error is cut at 0.2
        (6.6, 1000, 0.2 * (1 + 0.1 * 1000 / 10_000)),
        (5.4, 5000, 0.2 * (1 - 0.1 * 5000 / 10_000)),
        (-3.0, 10_000, 0.2 * 0.8),
    ],
)
def test_adaptive_kl_coefficient(kl, samples, expected):
    """Ziegler et al. 2019, section 2.2: target 6 nats, horizon 10,000 samples."""
    config = make_config("llama", ppo__kl_target=6)
    assert ppo.adapt_kl_coef(0.2, kl, samples, config) == pytest.approx(expected)


def test_fixed_kl_coefficient():
    assert ppo.adapt_kl_coef(0.2, 99.0, 100, make_config("llama")) == 0.2


@pytest.mark.parametrize(
    ("total", "warmup", "schedule", "expected"),
    [
        (4, 0.0, "constant", [1, 1, 1, 1]),
        (4, 0.0, "linear", [1, 0.75, 0.5, 0.25]),
        (4, 0.0, "cosine", [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        (4, 0.5, "constant", [0.5, 1, 1, 1]),
        (6, 0.3, "linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),  # 1.8 steps of warm-up are two
        (3, 1.0, "linear", [1 / 3, 2 / 3, 1]),
        (1, 0.1, "cosine", [1]),
        (1, 0.0, "linear", [1]),
    ],
)
def test_learning_rate(total, warmup, schedule, expected):
    assert [lr_factor(step, total, warmup, schedule) for step in range(total)] == pytest.approx(expected)


def test_optimizer_state_round_trip():
    """Going on from a saved state is going on, bit for bit."""
    model, *_, minis, _ = prepared(ppo__epochs=2)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    run_update(model, minis, optimizer=optimizer)
    weights, moments = model.state(), optimizer_state(optimizer)
    run_update(model, minis, optimizer=optimizer)
    expected = model.state()

    model.load_state(weights)
    again = make_optimizer(model.trainable(), 0.5, 1e-5)
    load_optimizer_state(again, moments)
    set_lr(again, 1e-3)
    run_update(model, minis, optimizer=again)
    assert same(expected, model.state())


def test_optimizer_has_no_weight_decay():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], 0.1, 1e-5)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_first_step_reuses_the_forward_of_the_estimates(minibatches, monkeypatch):
    """Bit for bit the same update, with one forward less."""
    results = []
    for before_update in (False, True):
        model = make_model("llama", sample__max_new_tokens=5, ppo__epochs=2)
        model.freeze_reference()
        rollout, rewards = sampled(model)
        minis = packed(model, rollout, minibatches)
        ppo.estimate(model, minis, rollout, rewards, 0.1, model.config, before_update=before_update)
        calls, states = [], model.states
        monkeypatch.setattr(model, "states", lambda tree, calls=calls, states=states: calls.append(tree) or states(tree))
        optimizer = make_optimizer(model.trainable(), 1e-2, 1e-8)
        metrics = ppo.update(model, optimizer, minis, 0.1, model.config, np.random.default_rng(0), critic_only=False)
        assert all(part.states is None for mini in minis for part in mini.parts)
        results.append((len(calls), metrics, model.state()))
    (plain, metrics, state), (fewer, same_metrics, same_state) = results
    assert plain == 2 * minibatches and fewer == plain - 1 and metrics == same_metrics and metrics["first_log_ratio"] == 0
    assert all(torch.equal(state[name], same_state[name]) for name in state)


class Answers(TorchDispatchMode):
    """How often the engine's own code makes the host wait for a GPU: for a number, or for a size that is in the data.

    What the kernels do on a CPU, where they look at indices, is not counted; `python -m bench.gpu --check` looks at them.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING and not any("fastppo_kernels" in frame.filename for frame in traceback.extract_stack()):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_estimates_and_steps_do_not_wait_for_the_device(kind):
    """The host asks for numbers after all estimates (the gap, the KL) and after all steps, not between."""
    model = make_model(kind, sample__max_new_tokens=5, ppo__epochs=2)
    model.freeze_reference()
    rollout, rewards = sampled(model)
    minis = packed(model, rollout, minibatches=2, budget=40)
    assert len([part for mini in minis for part in mini.parts]) == 4
    with Answers() as asked:
        ppo.estimate(model, minis, rollout, rewards, 0.1, model.config)
    assert asked.found == ["_local_scalar_dense"] * 2
    with Answers() as asked:
        metrics = run_update(model, minis)
    assert metrics["steps"] == 4 and asked.found == ["_local_scalar_dense"]
    with Answers() as asked:
        assert float(torch.ones(1)) == 1 and torch.ones(1).nonzero().numel()
    assert asked.found == ["_local_scalar_dense", "nonzero"], "the test sees what it looks for"
