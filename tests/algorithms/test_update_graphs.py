"""Updates by replay, with a stand-in for CUDA's graphs: the operators of forward, loss and backward as they were recorded once,
run again on other micro-batches, each at the place in memory where it was."""

import os
import random
from collections import Counter
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from engine import make_model, random_ids, relative, same, spread_adapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.algorithms import ppo
from fastppo.algorithms.optim import make_optimizer
from fastppo.batch.buckets import Shape
from fastppo.batch.rollout import Rollout, Sample, pack_rollout
from fastppo.memory import Machine
from fastppo.model import cuda_graphs, update_graphs
from fastppo.model.actor_critic import CRITIC, POLICY
from fastppo.model.update_graphs import UpdateGraphs
from fastppo_kernels import _attention_varlen as varlen


class Dense(varlen.TorchVarlen):
    """Attention by a mask over all keys, made on the device of its numbers: like FlashAttention it leaves the host alone."""

    device_types = ("cpu",)
    dtypes = (torch.float32,)

    def missing(self):
        return ""

    def _weights(self, q, k, cu_q, cu_k, ask):
        group = q.shape[1] // k.shape[1]
        rows, keys = torch.arange(len(q)), torch.arange(len(k))
        of_q, of_k = (torch.searchsorted(cu[1:].contiguous(), at, right=True) for cu, at in ((cu_q, rows), (cu_k, keys)))
        # From the ends of their segments, which are at the same token.
        ahead = (cu_q[of_q + 1] - rows)[:, None] - (cu_k[of_k + 1] - keys)[None]
        unseen = (of_q[:, None] != of_k[None]) | (ahead > 0)
        if ask.window is not None:
            unseen |= ahead <= -ask.window
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * ask.scale
        return scores.masked_fill(unseen, -torch.inf).softmax(-1)

    def forward(self, q, k, v, cu_q, cu_k, ask):
        group = q.shape[1] // k.shape[1]
        out = torch.einsum("hqk,khd->qhd", self._weights(q, k, cu_q, cu_k, ask), v.repeat_interleave(group, 1))
        return out, q.new_zeros(q.shape[1], q.shape[0])

    def backward(self, d_out, q, k, v, out, lse, cu_q, cu_k, ask):
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        p = self._weights(q, k, cu_q, cu_k, ask)
        dp = torch.einsum("qhd,khd->hqk", d_out, v.repeat_interleave(group, 1))
        ds = p * (dp - (d_out * out).sum(-1).T[:, :, None]) * ask.scale
        dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(group, 1))
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, d_out)
        return dq, *(x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))


class Recorder(TorchDispatchMode):
    """Like a capture: operators with the very tensors that they read and wrote; what would make the host wait is refused."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            schema = func._schema
            if not schema.is_mutable and any(each.alias_info is not None for each in schema.returns):
                continue  # a view, of what lies where it lay
            for to, of in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(to, torch.Tensor) and not schema.is_mutable:
                    to.copy_(of)


def record(step):
    step()
    with Recorder() as recorder:
        step()
    return recorder.replay


BORDERS = pytest.mark.parametrize("made", [False, True], indirect=True, ids=["plain", "borders"])


@pytest.fixture
def made(monkeypatch, request):
    """Graphs are made at once; those that were, by the shape that they are for. With the parameter True, layers compute through
    bordered buffers, as in half precision on a GPU."""
    if getattr(request, "param", False):
        monkeypatch.setattr(Machine, "borders", lambda self, layer: layer.fused)
    monkeypatch.setitem(varlen.LIBRARIES, "varlen", Dense())
    monkeypatch.setenv("FASTPPO_ATTENTION", "varlen")
    monkeypatch.setattr(import_module("fastppo_kernels.attention"), "_found", {})  # what others found to be missing
    monkeypatch.setattr(update_graphs, "MAKE_AT", 1)
    # As on a GPU: operators, into which nobody looks, where a CPU calls the functions that they are made of.
    monkeypatch.setattr(import_module("fastppo_kernels._eager"), "is_eager", lambda _: False)
    for module, check in (("attention", "check_values"), ("decoder_layer", "check_range"), ("linear_logprob", "check_range")):
        # On a CPU, and there alone, values are looked at.
        monkeypatch.setattr(import_module(f"fastppo_kernels.{module}"), check, lambda *_: None)
    found = []
    monkeypatch.setattr(cuda_graphs.Maker, "make", lambda self, step: found.append(step) or record(step))
    return found


def rollouts(seed, prompts=6, samples=3, new=5):
    rng = random.Random(seed)
    texts = [random_ids(rng, rng.randint(3, 9)) for _ in range(prompts)]
    draw = lambda: random_ids(rng, rng.randint(1, new))  # noqa: E731
    answers = [(i // samples, draw()) for i in range(prompts * samples)]
    made = [Sample(i, ids, [rng.uniform(-7, -4) for _ in ids], "length", "") for i, ids in answers]
    return Rollout(texts, made), [rng.choice([-1.0, 0.5, 2.0]) for _ in made]


def make(kind="llama", **settings):
    settings = {"sample__max_new_tokens": 5, "ppo__samples": 3, "ppo__epochs": 1} | settings
    model = make_model(kind, **settings)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.value_head.weight, std=0.3)
    model.freeze_reference()
    return model


def estimated(model, seed, *, minibatches=1, budget=10**6, before_update=False, **sizes):
    rollout, rewards = rollouts(seed, **sizes)
    minis = pack_rollout(
        rollout, minibatches=minibatches, budget=budget, padded=False, device="cpu", rng=np.random.default_rng(seed)
    )
    kl_coef = model.config.ppo.kl_coef
    estimates = ppo.estimate(model, minis, rollout, rewards, kl_coef, model.config, before_update=before_update)
    return minis, estimates


def of_the_same_shape(model, first, count):
    """Mini-batches of other trees in the bucket of ``first``'s."""
    tree, shape = first[0].parts[0].tree, Shape.of(first[0].parts[0].computed)
    others = (estimated(model, seed)[0] for seed in range(1, 40))
    fitting = (minis for minis in others if Shape.of(minis[0].parts[0].computed) == shape)
    found = [minis for minis in fitting if minis[0].parts[0].tree.n_tokens != tree.n_tokens][:count]
    assert len(found) == count
    return found


def gradients(model, minis, critic_only=False):
    """Of each parameter, before clipping counts, and the metrics."""
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    optimizer.step = lambda: None
    metrics = ppo.update(
        model, optimizer, minis, model.config.ppo.kl_coef, model.config, np.random.default_rng(0), critic_only=critic_only
    )
    return [None if p.grad is None else p.grad.clone() for p in model.trainable()], metrics


def away(model):
    """From the old policy, so that ratios, clips and KL count."""
    spread_adapter(model, POLICY, 0.12, seed=9)
    if model.config.value.trunk == "own":
        spread_adapter(model, CRITIC, 0.1, seed=3)
    with torch.no_grad():
        model.value_head.weight.add_(0.1)


CASES = [
    ("llama", {}),
    ("qwen2", {"ppo__kl_estimator": "k3", "ppo__reference": "base", "ppo__kl_coef": 0.3}),
    ("mistral", {"value__trunk": "own", "ppo__entropy_coef": 0.1}),
    ("llama", {"value__trunk": "detached", "ppo__kl_estimator": "k2", "ppo__old_logprobs": "sampler"}),
    ("llama", {"activations": "recompute"}),
    ("llama", {"ppo__kl_coef": 0, "ppo__whiten": False}),
]


@BORDERS
@pytest.mark.parametrize("critic_only", [False, True])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_padding_changes_nothing(kind, settings, critic_only, made):
    """Estimates, gradients and metrics of padded micro-batches, run without graphs, are those of the trees alone."""
    results = []
    for padded in (False, True):
        model = make(kind, ppo__max_grad_norm=1e9, **settings)
        model.graphs = UpdateGraphs(model.backbone.borders) if padded else None
        if padded:
            model.graphs.on = False
        minis, estimates = estimated(model, 3, minibatches=2, budget=35)
        away(model)
        results.append((minis, estimates, *gradients(model, minis, critic_only)))
    (minis, estimates, expected, metrics), (padded_minis, padded_estimates, found, padded_metrics) = results
    assert sum(len(mini.parts) for mini in minis) > 2 and not made
    assert padded_estimates == pytest.approx(estimates, abs=2e-6)
    for part, other in zip(*([part for mini in each for part in mini.parts] for each in (minis, padded_minis)), strict=True):
        assert part.padded is None and other.computed.n_tokens > part.tree.n_tokens
        for name, known in part.known.items():
            actions = len(known)
            torch.testing.assert_close(other.known[name][:actions], known, atol=2e-6, rtol=1e-5)
            assert len(other.known[name]) == other.computed.n_actions and not other.known[name][actions:].any()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert theirs is None or relative(ours, theirs) < 1e-5
    assert padded_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@BORDERS
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_replays_give_what_running_gives(kind, settings, made):
    """One graph, made of one micro-batch with one adapter, on others and with another: gradients and metrics, to the bit."""
    model = make(kind, ppo__max_grad_norm=1e9, **settings)
    model.graphs = UpdateGraphs(model.backbone.borders)
    first, _ = estimated(model, 0)
    gradients(model, first)
    assert len(made) == 1
    for minis in of_the_same_shape(model, first, 2):
        away(model)
        replayed, metrics = gradients(model, minis)
        assert len(made) == 1, "nothing new was recorded"
        on, model.graphs.on = model.graphs.on, False
        expected, expected_metrics = gradients(model, minis)
        model.graphs.on = on
        assert metrics == expected_metrics
        for ours, theirs in zip(replayed, expected, strict=True):
            assert theirs.norm() > 0 and torch.equal(ours, theirs)


@BORDERS
def test_gradients_of_parts_add_up(made):
    """Those that have a graph and those that have none, in one step; making a graph leaves no trace in the sum."""
    model = make(ppo__max_grad_norm=1e9)
    model.graphs = UpdateGraphs(model.backbone.borders)
    minis, _ = estimated(model, 4, prompts=24, budget=150)
    parts = minis[0].parts
    shapes = Counter(Shape.of(part.computed) for part in parts)
    assert len(parts) > 2 and len(shapes) > 1
    alone = next(shape for shape, times in shapes.items() if times == 1)
    away(model)
    model.graphs.on = False
    expected, expected_metrics = gradients(model, minis)
    model.graphs.on = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_graphs, "MAKE_AT", 2)
        gradients(model, [replace(minis[0], parts=[part for part in parts if Shape.of(part.computed) != alone])])
        for missing in (1, 0):
            found, metrics = gradients(model, minis)
            assert len(made) == len(shapes) - missing
            assert metrics == pytest.approx(expected_metrics, rel=1e-6)
            for ours, theirs in zip(found, expected, strict=True):
                assert relative(ours, theirs) < 1e-6


@BORDERS
def test_whole_updates_are_the_same(made):
    """Iterations of several epochs, the adapter moving, with graphs and with padding alone; and the first ratio is 1."""
    states = []
    for on in (True, False):
        model = make(ppo__epochs=3)
        model.graphs = UpdateGraphs(model.backbone.borders)
        model.graphs.on = on
        optimizer, seen = make_optimizer(model.trainable(), 1e-2, 1e-5), []
        for seed in range(3):
            minis, _ = estimated(model, seed, minibatches=2, before_update=True)
            replays = [model.graphs.replays(mini.parts[0], ppo._settings(model.config, 0.05)) for mini in minis]
            kept = minis[0].parts[0].states is not None
            # A graph has its own forward: the estimates then leave none.
            assert kept is not replays[0]
            seen.append(
                ppo.update(model, optimizer, minis, 0.05, model.config, np.random.default_rng(seed), critic_only=False)
            )
            assert seen[-1]["first_log_ratio"] == 0 and seen[-1]["steps"] == 6
            assert all(part.states is None for mini in minis for part in mini.parts), "what was kept is used and gone"
        states.append((model.state(), seen))
    assert made and states[0][1] == states[1][1] and same(states[0][0], states[1][0])


@BORDERS
def test_other_settings_are_another_graph(made):
    """Whatever number the loss computes with is in a graph for good; a KL weight that is not in the loss is not."""
    for estimator, graphs in (("k3", 2), ("k1", 1)):
        model = make(ppo__kl_estimator=estimator, ppo__max_grad_norm=1e9)
        model.graphs = UpdateGraphs(model.backbone.borders)
        minis, _ = estimated(model, 0)
        made.clear()
        away(model)
        optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
        optimizer.step = lambda: None
        found = []
        for kl_coef in (0.1, 0.9, 0.1):
            ppo.update(model, optimizer, minis, kl_coef, model.config, np.random.default_rng(0), critic_only=False)
            found.append([p.grad.clone() for p in model.trainable()])
        assert len(made) == graphs
        assert all(map(torch.equal, found[0], found[2])) and all(map(torch.equal, found[0], found[1])) == (graphs == 1)
        wider = replace(model.config, ppo=replace(model.config.ppo, clip=0.9))
        ppo.update(model, optimizer, minis, 0.1, wider, np.random.default_rng(0), critic_only=False)
        assert len(made) == graphs + 1


def test_critic_only_steps_have_no_graph(made):
    model = make()
    model.graphs = UpdateGraphs(model.backbone.borders)
    minis, _ = estimated(model, 0)
    found, _ = gradients(model, minis, critic_only=True)
    assert not made and all(g is None for g in found[:-2]) and all(g is not None for g in found[-2:])
    gradients(model, minis)
    found, _ = gradients(model, minis, critic_only=True)
    assert len(made) == 1 and all(g is None for g in found[:-2]), "what a graph left is not taken for a gradient"


def test_a_bucket_that_is_seen_once_gets_no_graph(made, monkeypatch):
    monkeypatch.setattr(update_graphs, "MAKE_AT", 3)
    model = make()
    model.graphs = UpdateGraphs(model.backbone.borders)
    minis, _ = estimated(model, 0)
    for times in range(1, 5):
        gradients(model, minis)
        assert len(made) == (times >= 3)


def test_shapes_that_come_later_take_the_place_of_those_that_are_gone(made, monkeypatch):
    """Answers grow, or the KL weight moves: of the most graphs the one that was not used for longest goes, and what was seen
    is not remembered for ever."""
    monkeypatch.setattr(update_graphs, "MOST", 2)
    monkeypatch.setattr(update_graphs, "SEEN", 3)
    model = make(ppo__kl_estimator="k3", ppo__max_grad_norm=1e9)
    graphs = model.graphs = UpdateGraphs()
    minis, _ = estimated(model, 0)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    optimizer.step = lambda: None

    def update(kl_coef):
        ppo.update(model, optimizer, minis, kl_coef, model.config, np.random.default_rng(0), critic_only=False)
        return [p.grad.clone() for p in model.trainable()]

    first = update(0.1)
    away(model)
    for kl_coef, number in ((0.2, 2), (0.1, 2), (0.3, 3), (0.1, 3), (0.2, 4)):
        found = update(kl_coef)
        assert len(made) == number and [key[1][1] for key in graphs.made][-1] == kl_coef
        graphs.on = False
        assert all(map(torch.equal, found, update(kl_coef))) and not all(map(torch.equal, found, first))
        graphs.on = True
    assert [key[1][1] for key in graphs.made] == [0.1, 0.2]
    monkeypatch.setattr(update_graphs, "MAKE_AT", 3)
    for i in range(6):
        update(1 + i // 2)  # each twice
    assert len(made) == 4 and len(graphs.asked) == 3
    update(2)
    assert len(made) == 5, "the latest are remembered"
    for kl_coef in (4, 5, 6, 3, 1):
        update(kl_coef)
    assert len(made) == 5, "3 was seen twice, but too long ago"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ..."),
         "operation not permitted when stream is capturing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_made_is_done_without(made, monkeypatch, error, said):
    """The micro-batch is not made smaller for it, and its gradient is as if nothing had been tried."""
    model = make(ppo__max_grad_norm=1e9)
    model.graphs = UpdateGraphs(model.backbone.borders)
    minis, _ = estimated(model, 0, minibatches=2)
    gradients(model, minis[:1])
    assert len(made) == 1

    def refuse(self, step):
        step()  # what was run before it failed has added to the gradients
        raise error

    monkeypatch.setattr(cuda_graphs.Maker, "make", refuse)
    model.graphs.made.clear()
    with pytest.warns(RuntimeWarning, match=f"^updates go on without CUDA graphs: {said}$"):
        found, metrics = gradients(model, minis)
    assert not model.graphs.on and not model.graphs.made and model.most_tokens is None
    expected, expected_metrics = gradients(model, minis)
    assert metrics == expected_metrics and all(map(torch.equal, found, expected))


def test_out_of_memory_lets_go_of_graphs_first(made):
    """Whatever it is that runs out: what is there for speed alone goes before anything is made smaller."""
    model = make(micro_batch_tokens=4096)
    said: list[str] = []
    model.graphs, model.notify = UpdateGraphs(model.backbone.borders), said.append
    minis, _ = estimated(model, 0)
    gradients(model, minis)
    assert model.graphs.made
    real, calls = ppo._gradients, []

    def limited(*arguments):
        calls.append(len(model.graphs.made))
        if len(calls) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "_gradients", limited)
        gradients(model, minis)
    assert calls == [1, 0, 0] and len(said) == 2
    assert said[0].endswith("with no CUDA graphs of the update") and "micro-batches of" in said[1]
    assert len(minis[0].parts) > 1 and all(part.padded is None for part in minis[0].parts)
    assert all(len(part.known["returns"]) == part.tree.n_actions for part in minis[0].parts)


def test_when_updates_are_replayed(monkeypatch):
    """On a GPU alone, for models and attention that are known to ask the host nothing."""
    model = make()
    assert model.graphs is None and not update_graphs.usable(model.backbone), "no GPU"
    weight = type("Cuda", (), {"is_cuda": True, "device": torch.device("cuda"), "dtype": torch.bfloat16})()
    head = type("H", (), {"weight": weight})()
    on_gpu = type("B", (), {"llama": model.backbone.llama, "head": head, "model": model.backbone.model})()
    chosen = []
    monkeypatch.setattr(
        update_graphs, "chosen_attention_backend",
        lambda device, dtype, head_dim, window: chosen.append((head_dim, window)) or backend,
    )  # fmt: skip
    for backend, expected in {"flash-attn": True, "varlen": True, "xformers": False, "sdpa": False, "torch": False}.items():
        assert update_graphs.usable(on_gpu) is expected, backend
    assert set(chosen) == {(model.backbone.llama.layers[0].self_attn.head_dim, None)}
    backend = "varlen"
    monkeypatch.setenv("FASTPPO_CUDA_GRAPHS", "0")
    assert not update_graphs.usable(on_gpu)
    monkeypatch.delenv("FASTPPO_CUDA_GRAPHS")
    monkeypatch.setattr(update_graphs, "in_4_bits", lambda _: True)
    assert not update_graphs.usable(on_gpu)
    monkeypatch.undo()
    assert "FASTPPO_CUDA_GRAPHS" not in os.environ
    on_gpu.llama = None
    assert not update_graphs.usable(on_gpu)


class Seen(TorchDispatchMode):
    """How many operators ran, but for views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_what_is_left_to_launch(made, monkeypatch):
    """Per micro-batch the copies of the trees and of what is known, the graph and its metrics; per step the optimizer's few."""
    model = make()
    model.graphs = UpdateGraphs(model.backbone.borders)
    minis, _ = estimated(model, 0)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    step = lambda: ppo._gradients(model, optimizer, minis[0], 0.05, model.config, False)  # noqa: E731
    step()
    with Seen() as whole:
        model.graphs.on = False
        step()
    model.graphs.on = True
    [(key, graph)] = model.graphs.made.items()
    model.graphs.made[key] = graph._replace(replay=lambda: None)
    with Seen() as left:
        step()
    part = minis[0].parts[0]
    copied = len(update_graphs._tensors(part))
    assert copied == 9 + len(part.known) == 14
    # The number of actions and the metrics; zeros and clipping, which torch does here for each parameter, are the same.
    assert left.count < copied + 2 + 3 * len(model.trainable()) + 10 and whole.count > 5 * left.count


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of lanes that are masked
def test_padding_changes_nothing_for_the_triton_kernels(made, monkeypatch):
    """In triton's interpreter: head, losses and what a layer is made of."""
    monkeypatch.setenv("FASTPPO_KERNELS", "triton")
    results = []
    for graphs in (None, UpdateGraphs()):
        model = make(ppo__max_grad_norm=1e9, ppo__kl_estimator="k3", ppo__entropy_coef=0.1)
        model.graphs = graphs
        if graphs is not None:
            graphs.on = False
        minis, _ = estimated(model, 0, prompts=2, samples=2, new=3)
        away(model)
        results.append((minis[0].parts[0], *gradients(model, minis)))
    (alone, expected, metrics), (padded, found, padded_metrics) = results
    assert padded.computed.n_tokens > alone.tree.n_tokens
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0 and relative(ours, theirs) < 1e-5
    assert padded_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
