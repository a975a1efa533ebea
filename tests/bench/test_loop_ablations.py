"""The engine without each of its ideas: the same numbers, by the other way, and afterwards everything as it was."""

import json
import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from bench.loop import ablations
from bench.loop.ablations import FULL, IDEAS
from bench.loop.compare import FEWEST, WARM_UP
from bench.loop.ours import FastppoLoop
from bench.loop.workloads import Workload, prompts_of
from bench.models import config_of
from bench.record import Record
from fastppo import trainer
from fastppo.algorithms import ppo
from fastppo.batch.token_tree import build_tree
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.attention import NAME
from fastppo.rollout.sampler import Sampling, generate
from fastppo_kernels import linear_ppo_loss, unpatch_peft

CPU, FP32 = torch.device("cpu"), torch.float32
VOCAB = config_of("tiny").vocab_size
SMALL = Workload(
    "cola", "made up", template=6, own=(2, 6), response=3, judged=3, prompts=4, samples=2, iterations=5, kl_coef=0.05
)
PROMPTS = prompts_of(SMALL, VOCAB, 8)
CONTEXTS = {name: context for name, _, context, _ in IDEAS if context is not None}
EQUAL = ["own trunk", "tree", "chunked head", "kernels", "reused forward"]  # which draw the same tokens


def make(settings=None, spread=0.02):
    """A loop whose adapter and value head are not zero."""
    loop = FastppoLoop("tiny", SMALL, 8, CPU, FP32, settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loop.model.trainable():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return loop


def without(name, loop):
    """As `ablations.measure` has it."""
    if name == "kernels":
        unpatch_peft(loop.model.peft)
    return CONTEXTS[name](loop)


def as_it_was(loop):
    backbone = loop.model.backbone
    return (
        loop.model.base.model.config._attn_implementation, trainer.generate, ppo.linear_ppo_loss, ppo.estimate,
        dict(os.environ), "hidden" in vars(backbone), backbone.llama,
    )  # fmt: skip


def test_the_ideas_have_names_and_words():
    names = [name for name, *_ in IDEAS]
    assert len(set(names)) == len(names) and {*EQUAL, "shared critic", "sampler"} == set(names)
    assert all(text for _, text, *_ in IDEAS)


@pytest.mark.parametrize("name", EQUAL)
def test_an_iteration_computes_the_same(name):
    full, other = make(), make()
    wanted = full.run(PROMPTS[0], False)
    with without(name, other):
        found = other.run(PROMPTS[0], False)
    assert [s.tokens for s in found.rollout.samples] == [s.tokens for s in wanted.rollout.samples]
    assert found.rewards == wanted.rewards and found.estimates.sampler_gap < 1e-4
    assert found.estimates.kl == pytest.approx(wanted.estimates.kl, abs=1e-4) and abs(wanted.estimates.kl) > 1e-3
    for x, y in zip(found.minibatches[0].parts, wanted.minibatches[0].parts, strict=True):
        for kind in ("old_logprob", "ref_logprob", "old_values", "advantages", "returns"):
            torch.testing.assert_close(x.known[kind], y.known[kind], rtol=1e-3, atol=1e-4)
    for metric in ("ratio", "policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm"):
        assert found.metrics[metric] == pytest.approx(wanted.metrics[metric], rel=0.02, abs=1e-3), metric
    assert found.metrics["first_log_ratio"] < 1e-5


@pytest.mark.parametrize("name", ["tree", "kernels"])
def test_hidden_states_and_gradients(name):
    """Of all rows of the tree, and of those that are asked for."""
    loop = make()
    sequences = [prompt + [5, 9 + i, 7] for i, prompt in enumerate(PROMPTS[1])] + [PROMPTS[1][0] + [5, 9]]
    tree = build_tree(sequences, [len(s) - 2 for s in sequences[:-1]] + [len(sequences[-1]) - 1])
    parameters = list(loop.model.adapter_tensors("policy").values())

    def results(rows):
        hidden = loop.model.backbone.hidden(tree, rows)
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        return hidden.detach(), torch.autograd.grad(hidden, parameters, weight)

    for rows in (None, tree.head_rows, torch.tensor([3, 3, 0])):
        wanted, gradients = results(rows)
        with without(name, loop):
            trainer.generate(loop.model, PROMPTS[1], 1, Sampling(max_new_tokens=1), seed=0)  # as in an iteration
            found, others = results(rows)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        for x, y in zip(others, gradients, strict=True):
            assert (x - y).norm() <= 1e-3 * y.norm()


def test_without_the_tree_the_batch_is_padded():
    loop, seen = make(), []
    trunk = loop.model.backbone.trunk
    real = type(trunk).forward

    def forward(self, *args, **kwargs):
        seen.append((tuple(kwargs["input_ids"].shape), self.config._attn_implementation))
        return real(self, *args, **kwargs)

    with mock.patch.object(type(trunk), "forward", forward), without("tree", loop):
        done = loop.run(PROMPTS[0], False)
    longest = max(map(len, PROMPTS[0])) + SMALL.response - 1  # the last token is only a target
    assert set(seen) == {((SMALL.batch, longest), "sdpa")}
    assert len(seen) == 1 + 1 + loop.config.ppo.epochs  # policy, reference, steps: the first iteration keeps no forward
    assert sum(part.tree.n_tokens for part in done.minibatches[0].parts) < SMALL.batch * longest


LOSSES = {
    "plain": {},
    "asymmetric clip and entropy": {"clip_low": 0.1, "clip_high": 0.3, "entropy_coef": 0.05},
    "KL in the loss": {"ref_logprob": True, "kl_coef": 0.2, "kl_estimator": "k3"},
    "temperature, scale and bias": {"temperature": 0.7, "logit_scale": 0.5, "bias": True},
    "denominator": {"denominator": 40},
}


@pytest.mark.parametrize("case", LOSSES)
def test_whole_logits_give_the_same_loss(case):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    options = {"clip_low": 0.2, "clip_high": 0.2, "entropy_coef": 0.01, "temperature": 1.0, "logit_scale": 1.0, "bias": None}
    options |= {"ref_logprob": None, "kl_coef": 0.0, "kl_estimator": "k3", "denominator": 9, "softcap": None} | LOSSES[case]
    if options["ref_logprob"]:
        options["ref_logprob"] = normal(9).float() - 3
    if options["bias"]:
        options["bias"] = normal(50).float()
    hidden, weight = normal(6, 8).float(), normal(50, 8).float()
    rows, targets = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 5]), torch.randint(50, (9,), generator=generator)
    known = [normal(9).float() - 3, normal(9).float()]
    found = []
    for loss in (linear_ppo_loss, ablations._plain_ppo_loss):
        leaf = hidden.clone().requires_grad_()
        value, metrics, logprob, entropy = loss(leaf, weight, targets, *known, rows_A=rows, **options)
        assert not logprob.requires_grad and not entropy.requires_grad
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0], logprob, entropy, metrics))
    (*ours, our_metrics), (*plain, plain_metrics) = found
    assert plain[1].norm() > 0 and our_metrics.keys() == plain_metrics.keys()
    for x, y in zip([*ours, *our_metrics.values()], [*plain, *plain_metrics.values()], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_without_the_chunked_head_the_kernel_is_not_called():
    loop, called, real = make(), [], ablations._plain_ppo_loss

    def plain(*args, **options):
        called.append(1)
        return real(*args, **options)

    with mock.patch.object(ppo, "linear_ppo_loss", side_effect=AssertionError):
        with mock.patch.object(ablations, "_plain_ppo_loss", plain), without("chunked head", loop):
            loop.run(PROMPTS[0], False)
    assert len(called) == loop.config.ppo.epochs


def test_without_kernels_pefts_own_layers_run():
    """Each adapted layer once a forward: that of peft, by name and by nature."""
    loop, layers = make(), []
    real = LoraLinear.forward
    with mock.patch.object(LoraLinear, "forward", lambda self, *a, **k: layers.append(self) or real(self, *a, **k)):
        loop.run(PROMPTS[0], False)
        assert not layers  # the full engine has its own
        with without("kernels", loop):
            assert (os.environ["FASTPPO_KERNELS"], os.environ["FASTPPO_ATTENTION"]) == ("torch", "torch")
            loop.run(PROMPTS[0], False)
    assert set(layers) == set(loop.model._lora_layers)


def test_the_sampler_of_transformers():
    """Left-padded prompts: the log-probs of what was drawn are the trainer's, and draws depend on the seed."""
    loop = make()
    sampling = Sampling(temperature=1.0, max_new_tokens=4)  # that of the workloads
    with without("sampler", loop):
        first, again, other = (trainer.generate(loop.model, PROMPTS[0], 3, sampling, seed=seed) for seed in (1, 1, 2))
    assert len({len(prompt) for prompt in PROMPTS[0]}) > 1
    assert [s.prompt for s in first.samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    tokens = [s.tokens for s in first.samples]
    assert tokens == [s.tokens for s in again.samples] != [s.tokens for s in other.samples]
    assert {len(row) for row in tokens} == {4} and len(set(map(tuple, tokens))) > 6 and first.prompts == PROMPTS[0]
    sequences = [first.prompts[s.prompt] + s.tokens for s in first.samples]
    tree = build_tree(sequences, [len(sequence) - 4 for sequence in sequences])
    expected = loop.model.policy_logprob(tree, temperature=1.0)[0].detach()
    got = torch.tensor([x for s in first.samples for x in s.logprobs])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_reuse_the_first_step_has_a_forward_of_its_own():
    counts, real = {}, ActorCritic.states
    for name in (FULL, "reused forward"):
        loop, calls = make(), []
        loop.step = 1  # the first iteration keeps no forward
        with mock.patch.object(ActorCritic, "states", lambda self, tree, calls=calls: calls.append(1) or real(self, tree)):
            with without(name, loop) if name != FULL else nullcontext():
                loop.run(PROMPTS[0], False)
        counts[name] = len(calls)
    assert counts["reused forward"] == counts[FULL] + 1 == 1 + loop.config.ppo.epochs


def test_an_iteration_with_the_sampler_of_transformers():
    loop = make()
    with without("sampler", loop):
        done = loop.run(PROMPTS[0], False)
    assert done.estimates.sampler_gap < 1e-4 and done.metrics["first_log_ratio"] < 1e-5


def test_an_own_critic_leaves_the_policy_alone():
    settings = next(settings for name, _, _, settings in IDEAS if name == "shared critic")
    full, other = make(), make(settings)
    assert len(other.model.trainable()) == 2 * (len(full.model.trainable()) - 2) + 2
    # The policy's adapter is the first of what `make` draws for.
    wanted, found = full.run(PROMPTS[0], False), other.run(PROMPTS[0], False)
    assert [s.tokens for s in found.rollout.samples] == [s.tokens for s in wanted.rollout.samples]


class Planned(Exception):
    pass


@pytest.mark.parametrize("name", CONTEXTS)
def test_everything_is_as_before(name):
    loop = make()
    before = as_it_was(loop)
    with without(name, loop):
        loop.run(PROMPTS[0], False)
        assert as_it_was(loop) != before
    assert as_it_was(loop) == before and before[0] == NAME


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("where", ["at once", "while it samples", "while it scores", "while it updates"])
def test_everything_is_as_before_when_something_fails(name, where):
    loop = make()
    before = as_it_was(loop)

    def fail(*_, **__):
        raise Planned

    base = loop.model.base.model
    broken = {
        "at once": nullcontext(),
        # The forward of all, whoever calls it.
        "while it samples": mock.patch.object(base.get_input_embeddings(), "forward", fail),
        "while it scores": mock.patch.object(loop, "rewards", fail),
        "while it updates": mock.patch.object(loop.optimizer, "step", fail),
    }[where]
    with pytest.raises(Planned), broken, without(name, loop):
        if where == "at once":
            raise Planned
        loop.run(PROMPTS[0], False)
    assert as_it_was(loop) == before


# -- the measurement -----------------------------------------------------------------------------------------------------


def measure(tmp_path, rounds, deadline=float("inf")):
    record, out = Record("ablations-cola-tiny", {"device": "made up"}), tmp_path / "out.json"
    ablations.measure(record, out, SMALL, "tiny", CPU, FP32, deadline, PROMPTS[:rounds])
    return record, Record.load(out)


def test_measured_side_by_side(tmp_path, monkeypatch):
    order, real = [], FastppoLoop.iterate

    def iterate(self, prompts, **how):
        order.append((id(self), json.dumps(prompts)))
        return real(self, prompts, **how)

    monkeypatch.setattr(FastppoLoop, "iterate", iterate)
    monkeypatch.setattr(ablations, "peak", lambda call, device: (call(), 3 * 2**20)[1])
    rounds = WARM_UP + FEWEST
    record, stored = measure(tmp_path, rounds)
    names = [FULL, *(name for name, *_ in IDEAS)]
    assert [row["idea"] for row in record.data["rows"]] == names and stored.data["rows"] == record.data["rows"]
    assert record.figures.keys() == {"full samples/s", "full: MiB"} | {
        f"without {name}: {kind}" for name in names[1:] for kind in ("ratio", "MiB")
    }
    assert all(len(record.figures[f"without {name}: ratio"].raw) == FEWEST for name in names[1:])
    assert [row["peak_MiB"] for row in record.data["rows"]] == [3.0] * len(names)
    assert record.data["rows"][0]["ratio"] == 1.0 and all(row["samples_per_s"] > 0 for row in record.data["rows"])
    # Every round has each loop once, on the same prompts, and another one first.
    batches = [order[i : i + len(names)] for i in range(0, rounds * len(names), len(names))]
    assert all(len({loop for loop, _ in batch}) == len(names) for batch in batches)
    assert [{prompts for _, prompts in batch} for batch in batches] == [{json.dumps(p)} for p in PROMPTS[:rounds]]
    assert len({batch[0][0] for batch in batches}) == rounds


def test_out_of_time_it_stops_when_there_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "peak", lambda call, device: 0)
    record, _ = measure(tmp_path, WARM_UP + FEWEST + 3, deadline=0.0)
    assert record.notes == [f"stopped after {WARM_UP + FEWEST} of {WARM_UP + FEWEST + 3} rounds: no more time"]
    assert len(record.figures["without tree: ratio"].raw) == FEWEST


def test_our_sampler_is_what_the_others_are_held_to():
    """The full engine draws through `fastppo.rollout.sampler.generate`."""
    assert trainer.generate is generate
