"""Blocks computed again in backward: the same bits as with everything kept, and less memory."""

import random

import pytest
import torch
from engine import PACKED_KINDS, make_model, random_ids, random_prompts, spread_adapter
from small import outcome

from bench import memory
from fastppo.batch.token_tree import build_tree
from fastppo.config import Config
from fastppo.model.actor_critic import CRITIC, POLICY, ActorCritic
from fastppo.model.load import load_base
from fastppo.model.recompute import again, modules_again

AGAIN = ("recompute", "offload")


def make_tree(n=6, root=12, seed=0):
    """Prompts with a common stem and two answers each."""
    rng = random.Random(seed)
    sequences, starts = [], []
    for prompt in random_prompts(seed, n, root=root):
        for _ in range(2):
            sequences.append(prompt + random_ids(rng, rng.randint(2, 6)))
            starts.append(len(prompt))
    return build_tree(sequences, starts)


def outputs_and_gradients(model: ActorCritic, tree):
    """Of log-probs, entropies and values together, of everything that is trained."""
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(5))
    scores = model.forward(tree, temperature=0.7)
    weight = torch.linspace(-1, 1, len(scores.logprob))
    loss = (weight * scores.logprob).sum() + (weight.flip(0) * scores.values).square().sum() + scores.entropy.sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.trainable()]
    for parameter in model.trainable():
        parameter.grad = None
    return [*scores], gradients


@pytest.mark.parametrize("tokens", ["few", "padded"])
@pytest.mark.parametrize("kind", [*PACKED_KINDS, "mpt"])
def test_outputs_and_gradients_are_those_of_kept_activations_to_the_bit(kind, tokens):
    model = make_model(kind)
    tree = make_tree() if tokens == "few" else make_tree(n=40, root=120)
    assert (tree.n_tokens >= 256) is (tokens == "padded")  # from where on Llama's trunk pads them
    model.activations = "keep"
    wanted = outputs_and_gradients(model, tree)
    assert all(gradient is not None for gradient in wanted[1])
    for model.activations in AGAIN:
        found = outputs_and_gradients(model, tree)
        for ours, kept in zip(found, wanted, strict=True):
            assert all(map(torch.equal, ours, kept)), model.activations


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_each_of_two_trunks_is_computed_foundwith_its_own_adapter(kind):
    model = make_model(kind, value__trunk="own")
    spread_adapter(model, CRITIC, 0.1, seed=2)
    tree = make_tree()
    model.activations = "keep"
    wanted = outputs_and_gradients(model, tree)
    policy = {name: parameter.detach().clone() for name, parameter in model.adapter_tensors(POLICY).items()}
    for model.activations in AGAIN:
        found = outputs_and_gradients(model, tree)
        assert all(map(torch.equal, found[0], wanted[0])) and all(map(torch.equal, found[1], wanted[1]))
    values = model.values(tree)  # the critic's warm-up
    values.sum().backward()
    assert all(parameter.grad is not None for parameter in model.adapter_tensors(CRITIC).values())
    assert all(parameter.grad is None for parameter in model.adapter_tensors(POLICY).values())
    assert all(torch.equal(policy[name], parameter) for name, parameter in model.adapter_tensors(POLICY).items())


def test_the_last_block_is_kept_and_all_others_run_twice(monkeypatch):
    model = make_model("llama")
    trunk, calls = model.backbone.llama, []
    original = type(trunk)._layer

    def counting(self, layer, *args, **kwargs):
        calls.append(self.layers.index(layer))
        return original(self, layer, *args, **kwargs)

    monkeypatch.setattr(type(trunk), "_layer", counting)
    for model.activations, wanted in (("keep", [0, 1]), ("recompute", [0, 1, 0]), ("offload", [0, 1, 0])):
        calls.clear()
        outputs_and_gradients(model, make_tree())
        assert calls == wanted
    calls.clear()
    with torch.no_grad():
        model.forward(make_tree(), temperature=1.0)
    assert calls == [0, 1]


@pytest.mark.parametrize("kind", ["builtin", "gpt_neox"])
def test_less_memory_is_alive_at_the_peak(kind):
    model = ActorCritic(load_base(Config()), Config()) if kind == "builtin" else make_model(kind)
    tree, peaks = make_tree(n=60, root=30), {}
    for model.activations in ("keep", "recompute"):
        outputs_and_gradients(model, tree)
        peaks[model.activations] = memory.peak(lambda: outputs_and_gradients(model, tree))
    # Of five layers one and the inputs of the others; of two, one and a half.
    assert peaks["recompute"] < (0.6 if kind == "builtin" else 0.9) * peaks["keep"]


def test_modules_are_as_they_were_afterwards_and_after_an_error():
    model = make_model("gpt_neox", activations="recompute")
    blocks = model.backbone.blocks
    assert len(blocks) == 2
    model.forward(make_tree(), temperature=1.0)
    assert not any("forward" in vars(block) for block in blocks)
    with pytest.raises(ZeroDivisionError), modules_again(blocks, model._recompute(POLICY), torch.device("cpu")):
        assert all("forward" in vars(block) for block in blocks)
        raise ZeroDivisionError
    assert not any("forward" in vars(block) for block in blocks)


def test_nothing_is_run_twice_where_no_gradient_is_wanted():
    model = make_model("llama", activations="recompute")
    calls = []

    def run(x):
        calls.append(x.requires_grad)
        return 2 * x

    how, x = model._recompute(POLICY), torch.ones(3)
    frozen = torch.ones(1)
    assert again(run, x, [frozen], how).grad_fn is None
    with torch.no_grad():
        assert again(run, x.requires_grad_(), [], how).grad_fn is None
    again(run, x, [frozen], how).sum().backward()
    assert calls == [False, True, True, True] and torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_run_is_the_same_to_the_bit(world, tmp_path):
    for name in ("keep", *AGAIN):
        world.train(tmp_path / name, activations=name, value__warmup=1)
    kept = outcome(tmp_path / "keep")
    for name in AGAIN:
        found = outcome(tmp_path / name)
        assert found["adapter"] == kept["adapter"] and found["metrics"] == kept["metrics"]
