"""The engine with frozen weights in bordered buffers, as on a GPU in half precision, beside the engine as it is on a CPU."""

import pytest
import torch
from engine import make_model, relative, spread_adapter
from peft import get_peft_model_state_dict
from test_llama_trunk import make_tree

from fastppo import checkpoint
from fastppo.batch.token_tree import build_tree
from fastppo.evaluate import load_adapter
from fastppo.memory import Machine
from fastppo.model.actor_critic import CRITIC, POLICY
from fastppo.model.attention import DecodeContext, TreeContext
from fastppo_kernels import _bordered_layer

LAYERS = 2
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def through(monkeypatch):
    """Which layers were computed through buffers."""
    seen = []
    for name in ("forward", "backward"):
        real = getattr(_bordered_layer, name)
        monkeypatch.setattr(_bordered_layer, name, lambda *args, n=name, f=real: seen.append(n) or f(*args))
    return seen


def pair(kind, monkeypatch, **settings):
    """The same model without buffers, and with."""
    models = [make_model(kind, **settings)]
    monkeypatch.setattr(Machine, "borders", lambda self, layer: layer.fused)
    models.append(make_model(kind, **settings))
    for model in models:
        torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    return models


def all_of(model, tree):
    """Scores, the reference's log-probs, and all gradients."""
    scores = model.forward(tree, temperature=0.7)
    reference = model.reference_logprob(tree, temperature=0.7)
    loss = (scores.logprob - reference).sum() + scores.values.square().sum() + scores.entropy.sum()
    return [*(x.detach() for x in scores), reference, *torch.autograd.grad(loss, model.trainable())]


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert y.norm() > 0 and relative(x, y) < 1e-4


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"value__trunk": "own"}, {"ppo__reference": "start"}])
def test_policy_reference_and_critic_over_steps(kind, settings, activations, monkeypatch, through):
    """Graphs of both adapters are there at once, and an optimizer changes them in between."""
    models = pair(kind, monkeypatch, activations=activations, **settings)
    results = []
    for model in models:
        through.clear()
        if "ppo__reference" in settings:
            model.freeze_reference()
            spread_adapter(model, POLICY, 0.1, seed=5)
        if "value__trunk" in settings:
            spread_adapter(model, CRITIC, 0.1, seed=2)
        optimizer = torch.optim.AdamW(model.trainable(), lr=1e-2)
        found = []
        for _ in range(2):
            found += all_of(model, make_tree())
            for parameter, gradient in zip(model.trainable(), found[-len(model.trainable()) :], strict=True):
                parameter.grad = gradient
            optimizer.step()
        results.append(found)
    assert_same(results[1], results[0])
    passes = 2 if "value__trunk" in settings else 1
    assert through.count("backward") == 2 * LAYERS * passes


def test_the_weights_are_there_once_and_are_peft_s(monkeypatch):
    plain, model = pair("qwen2", monkeypatch)
    ours, theirs = (dict(each.peft.named_parameters()) for each in (model, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for layer in model.backbone.llama.layers:
        held = {buffer.weight.untyped_storage().data_ptr() for buffer in model.backbone.llama.buffers[layer]}
        modules = {name: module for name, module in layer.named_modules() if name.endswith(LINEAR)}
        assert len(held) == 4 and len(modules) == 7
        assert {module.base_layer.weight.untyped_storage().data_ptr() for module in modules.values()} == held
    states = (get_peft_model_state_dict(each.peft, adapter_name=POLICY) for each in (model, plain))
    ours, theirs = states
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model.backbone.llama.border()  # which has nothing left to do
    assert len(model.backbone.llama.buffers) == LAYERS


def test_what_is_loaded_is_what_is_computed_with(monkeypatch, through):
    plain, model = pair("llama", monkeypatch)
    before = all_of(model, make_tree())
    state = model.state()
    spread_adapter(model, POLICY, 0.3, seed=9)
    assert relative(all_of(model, make_tree())[0], before[0]) > 1e-3
    model.load_state(state)
    for ours, first in zip(all_of(model, make_tree()), before, strict=True):
        assert torch.equal(ours, first)
    assert through


def test_a_step_of_sampling_leaves_the_buffers_alone(monkeypatch, through):
    """It may be captured in a graph, in which nobody looks whether adapters have changed."""
    _, model = pair("llama", monkeypatch)
    with torch.no_grad():
        tree = build_tree([[3, 4, 5]])
        context = TreeContext(tree.layout, keep=True)
        model.backbone.run(tree.token_ids, tree.positions, context)
        assert through == ["forward"] * LAYERS
        root = [context.kept[i] for i in range(LAYERS)]
        shape = 2, root[0][0].shape[1], 4, root[0][0].shape[2]
        own = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]
        step = DecodeContext(root, own, torch.tensor([1, 1]), 1)
        hidden = model.backbone.run(torch.tensor([6, 7]), torch.tensor([3, 3]), step)
        assert through == ["forward"] * LAYERS
        trees = (build_tree([[3, 4, 5, last]]) for last in (6, 7))
        whole = torch.stack([model.backbone.hidden(tree)[-1] for tree in trees])
    assert relative(hidden, whole) < 1e-5


def test_some_targets_and_a_model_that_is_moved(monkeypatch, through):
    """A group without adapters has a buffer, too; weights that were given other memory are computed as without buffers."""
    plain, model = pair("llama", monkeypatch, lora__targets="q_proj,v_proj")
    assert_same(all_of(model, make_tree()), all_of(plain, make_tree()))
    assert through.count("backward") == LAYERS
    through.clear()
    for module in model.peft.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.clone()
    assert_same(all_of(model, make_tree()), all_of(plain, make_tree()))
    assert not through


def test_an_adapter_that_is_read_from_a_file_is_the_one_computed_with(monkeypatch, tmp_path):
    """As `fastppo eval` reads it: behind a forward, for which the buffers took what was there before."""
    plain, bordered = pair("llama", monkeypatch)
    stored = {name: 3 * p.detach() for name, p in plain.adapter_tensors(POLICY).items()}
    checkpoint.save_adapter(tmp_path, stored, plain.peft_config)
    tree, results = make_tree(), []
    for model in (plain, bordered):
        before = model.forward(tree, temperature=1.0).logprob.detach()
        load_adapter(model, tmp_path / "adapter")
        results.append(model.forward(tree, temperature=1.0).logprob.detach())
        assert relative(results[-1], before) > 1e-3
    assert relative(results[1], results[0]) < 1e-4
