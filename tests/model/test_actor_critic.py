"""Policy, reference and critic on one base: who computes with what, and whom a loss reaches."""

import importlib

import pytest
import torch
from engine import make_model, random_prompts, relative, same, spread_adapter, tiny_folder
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tiny import KINDS
from transformers import AutoModelForCausalLM

from fastppo.algorithms.optim import make_optimizer, optimizer_state
from fastppo.batch.token_tree import build_tree
from fastppo.errors import UserError
from fastppo.model.actor_critic import CRITIC, POLICY, REFERENCE
from fastppo_kernels import unpatch_peft


def make_tree(seed=0):
    prompts = random_prompts(seed, 5, root=4)
    return build_tree([p + [10 + i, 20, 1] for p in prompts for i in range(2)], [len(p) for p in prompts for _ in range(2)])


def take_steps(model, tree, n=3, lr=0.05):
    """Some updates of everything that trains."""
    optimizer = make_optimizer(model.trainable(), lr, 1e-5)
    for _ in range(n):
        optimizer.zero_grad()
        scores = model.forward(tree, temperature=1.0)
        (scores.logprob.sum() - (scores.values - 1).square().sum()).backward()
        optimizer.step()
    return optimizer


def grads(model, adapter):
    return {name: p.grad for name, p in model.adapter_tensors(adapter).items()}


def bare_logprob(kind, tree):
    """Log-probs of the actions in a model that never saw an adapter, through the same packed forward."""
    model = make_model(kind, spread=0)
    base = model.peft.unload()
    assert base is model.base.model and not any("lora" in name for name, _ in base.named_parameters())
    hidden = model.backbone.hidden(tree)[tree.head_rows]
    return model.backbone.head.logprob(hidden, tree.action_targets, tree.action_rows, 1.0)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_base_bit_for_bit(kind):
    tree = make_tree()
    expected = bare_logprob(kind, tree)
    model = make_model(kind, ppo__reference="base", spread=0)
    assert torch.equal(model.reference_logprob(tree, temperature=1.0), expected)
    assert torch.equal(model.policy_logprob(tree, temperature=1.0)[0].detach(), expected), "B = 0: no effect at first"
    base = {name: p.clone() for name, p in model.peft.named_parameters() if "lora_" not in name}
    take_steps(model, tree)
    assert not torch.equal(model.policy_logprob(tree, temperature=1.0)[0].detach(), expected)
    assert torch.equal(model.reference_logprob(tree, temperature=1.0), expected)
    assert same(base, {name: p for name, p in model.peft.named_parameters() if "lora_" not in name})


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_as_in_peft(kind, monkeypatch):
    """The model's LoRA layers run through fastppo_kernels; without that, values and gradients are the same to rounding."""
    module = importlib.import_module("fastppo_kernels.lora_linear")
    monkeypatch.setattr(module, "_SMALL_WORK", 0)  # tiny as the model is, not the composition that peft has, too
    calls = []
    for operations in (module._lora_ops, module._lora_fold):
        real = operations.backward
        monkeypatch.setattr(operations, "backward", lambda *a, real=real: calls.append(1) or real(*a))
    tree, found = make_tree(), []
    for patched in (True, False):
        model = make_model(kind)
        if not patched:
            unpatch_peft(model.peft)
            model.backbone.llama = None
        before = len(calls)
        scores = model.forward(tree, temperature=1.0)
        (scores.logprob.square().sum() + scores.entropy.sum()).backward()
        assert (len(calls) > before) == patched
        found.append((scores, grads(model, POLICY)))
    (ours, our_grads), (peft, peft_grads) = found
    assert relative(ours.logprob.detach(), peft.logprob.detach()) < 1e-6
    for name, gradient in peft_grads.items():
        assert relative(our_grads[name], gradient) < 1e-5, name


def test_reference_start_is_a_frozen_copy():
    tree = make_tree()
    model = make_model("llama", ppo__reference="start")
    start = model.policy_logprob(tree, temperature=0.7)[0].detach()
    model.freeze_reference()
    assert torch.equal(model.reference_logprob(tree, temperature=0.7), start), "KL exactly 0 at the start"
    frozen = {name: p.detach().clone() for name, p in model.adapter_tensors(REFERENCE).items()}
    assert not any(p.requires_grad for p in model.adapter_tensors(REFERENCE).values())
    assert all(p.requires_grad for p in model.adapter_tensors(POLICY).values())
    take_steps(model, tree)
    assert same(frozen, dict(model.adapter_tensors(REFERENCE)))
    assert torch.equal(model.reference_logprob(tree, temperature=0.7), start)
    assert not torch.equal(model.policy_logprob(tree, temperature=0.7)[0].detach(), start)


def test_freezing_again_takes_the_policy_of_now():
    tree = make_tree()
    model = make_model("llama")
    model.freeze_reference()
    take_steps(model, tree)
    model.freeze_reference()
    now = model.policy_logprob(tree, temperature=1.0)[0].detach()
    assert torch.equal(model.reference_logprob(tree, temperature=1.0), now)


def test_reference_forward_has_no_graph():
    model = make_model("llama", ppo__reference="base")
    assert not model.reference_logprob(make_tree(), temperature=1.0).requires_grad


@pytest.mark.parametrize("trunk", ["shared", "detached"])
def test_value_loss_on_the_shared_trunk(trunk):
    """Detached, the value loss trains the head only."""
    tree = make_tree()
    model = make_model("llama", value__trunk=trunk)
    torch.nn.init.normal_(model.value_head.weight)
    model.forward(tree, temperature=1.0).values.square().sum().backward()
    assert model.value_head.weight.grad.norm() > 0
    for grad in grads(model, POLICY).values():
        assert grad is None if trunk == "detached" else grad.norm() > 0


def test_critic_with_its_own_adapter():
    tree = make_tree()
    model = make_model("llama", value__trunk="own")
    spread_adapter(model, CRITIC, 0.1, seed=2)
    torch.nn.init.normal_(model.value_head.weight)

    model.forward(tree, temperature=1.0).values.square().sum().backward()
    assert all(g is None for g in grads(model, POLICY).values()), "the value loss does not reach the policy"
    value_grads = {name: g.clone() for name, g in grads(model, CRITIC).items()}
    assert all(g.norm() > 0 for g in value_grads.values())
    model.value_head.zero_grad()
    for parameter in model.trainable():
        parameter.grad = None

    # Both losses in one backward: the two forwards' graphs do not disturb each other.
    scores = model.forward(tree, temperature=1.0)
    (scores.logprob.sum() + scores.values.square().sum()).backward()
    for name, grad in grads(model, CRITIC).items():
        assert relative(grad, value_grads[name]) < 1e-6
    both = {name: g.clone() for name, g in grads(model, POLICY).items()}
    for parameter in model.trainable():
        parameter.grad = None
    model.policy_logprob(tree, temperature=1.0)[0].sum().backward()
    for name, grad in grads(model, POLICY).items():
        assert relative(both[name], grad) < 1e-6
    assert all(g is None for g in grads(model, CRITIC).values())

    optimizer = take_steps(model, tree, n=1)
    assert len(optimizer.state) == len(model.trainable())


def test_critic_adapter_starts_as_the_base():
    """A new adapter has no effect, so critic and base agree whatever the policy is."""
    tree = make_tree()
    model = make_model("llama", value__trunk="own")
    base_hidden = make_model("llama", spread=0).backbone.hidden(tree)[tree.head_rows]
    torch.nn.init.normal_(model.value_head.weight)
    torch.testing.assert_close(model.values(tree), model.value_head(base_hidden)[:, 0][tree.action_rows])


@pytest.mark.parametrize("settings", [{}, {"value__trunk": "detached"}, {"value__trunk": "own"}])
def test_values_alone(settings):
    """The same numbers as the whole forward's; only the critic gets gradients from them."""
    tree = make_tree()
    model = make_model("llama", **settings)
    torch.nn.init.normal_(model.value_head.weight)
    values = model.values(tree)
    assert torch.equal(values, model.forward(tree, temperature=1.0).values)
    values.square().sum().backward()
    assert all(g is None for g in grads(model, POLICY).values())
    assert {id(p) for p in model.trainable() if p.grad is not None} == {id(p) for p in model.trainable(critic_only=True)}


def test_first_values_are_zero():
    scores = make_model("llama").forward(make_tree(), temperature=1.0)
    assert not scores.values.any()


@pytest.mark.parametrize(("rslora", "factor"), [(False, 32 / 4), (True, 32 / 2)])
def test_lora_scale(rslora, factor):
    """alpha / rank, or alpha / sqrt(rank): the same product from the other's B times the quotient."""
    tree = make_tree()
    model = make_model("llama", lora__rslora=rslora, lora__rank=4, lora__alpha=32)
    plain = make_model("llama", lora__rslora=False, lora__rank=4, lora__alpha=4)  # factor 1
    with torch.no_grad():
        for name, parameter in plain.adapter_tensors(POLICY).items():
            parameter.copy_(model.adapter_tensors(POLICY)[name])
            if "lora_B" in name:
                parameter.mul_(factor)
    got, expected = (m.policy_logprob(tree, temperature=1.0)[0].detach() for m in (model, plain))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_explicit_targets():
    model = make_model("llama", lora__targets="q_proj,down_proj")
    modules = {name.split(".")[-3] for name in model.adapter_tensors(POLICY)}
    assert modules == {"q_proj", "down_proj"}
    assert len(model.adapter_tensors(POLICY)) == 2 * 2 * 2  # layers, modules, A and B
    take_steps(model, make_tree())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("nonsense", "nonsense"),
        ("q_proj,nonsense", "'nonsense' is no module"),  # peft alone would train q_proj and say nothing
        ("self_attn", "lora-targets: 'self_attn'"),
        ("lm_head", "head stays frozen"),
        ("q_proj,lm_head", "head stays frozen"),
        ("embed_tokens", "only linear layers"),
        ("q_proj,embed_tokens", "only linear layers"),
    ],
)
def test_impossible_targets(targets, message):
    with pytest.raises(UserError, match=message) as caught:
        make_model("llama", lora__targets=targets)
    assert "\n" not in str(caught.value) and "--lora-targets" in str(caught.value)


def test_all_linear_leaves_the_tied_head_alone():
    model = make_model("qwen2")
    assert model.base.model.config.tie_word_embeddings
    assert not any("lm_head" in name or "embed" in name for name in model.adapter_tensors(POLICY))


@pytest.mark.parametrize("settings", [{}, {"value__trunk": "own"}])
@pytest.mark.parametrize("reference", [False, True])
def test_state_round_trip(settings, reference):
    tree = make_tree()
    model = make_model("llama", **settings)
    if reference:
        model.freeze_reference()
    take_steps(model, tree)
    state = model.state()
    expected = model.forward(tree, temperature=1.0)
    other = make_model("llama", spread=0, **settings)
    other.load_state(state)
    assert same(state, other.state())
    for ours, theirs in zip(expected, other.forward(tree, temperature=1.0), strict=True):
        assert torch.equal(ours, theirs)
    if reference:
        assert torch.equal(*(m.reference_logprob(tree, temperature=1.0) for m in (model, other)))
        assert not any(p.requires_grad for p in other.adapter_tensors(REFERENCE).values())
    take_steps(other, tree, n=1)  # the loaded parameters still train
    assert not same(state, other.state())


def test_state_is_a_copy():
    model = make_model("llama")
    state = model.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    take_steps(model, make_tree())
    assert same(before, state)
    assert all(t.device.type == "cpu" and not t.requires_grad for t in state.values())


def test_state_of_another_model_is_refused():
    with pytest.raises(UserError, match="differ in"):
        make_model("llama").load_state(make_model("llama", value__trunk="own").state())
    with pytest.raises(UserError, match="differ in"):
        make_model("llama").load_state(make_model("gpt_neox").state())


def test_same_seed_same_adapter():
    first, again = (make_model("llama", spread=0, seed=3, value__trunk="own").state() for _ in range(2))
    other = make_model("llama", spread=0, seed=4, value__trunk="own").state()
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base_trains_in_float32(kind):
    """Adapters (all of them), value head, optimizer state and outputs are fp32 over a bf16 base."""
    tree = make_tree()
    model = make_model(kind, dtype="bfloat16", value__trunk="own", ppo__reference="start")
    model.freeze_reference()
    assert next(p for n, p in model.peft.named_parameters() if "lora_" not in n).dtype == torch.bfloat16
    for adapter in (POLICY, CRITIC, REFERENCE):
        assert {p.dtype for p in model.adapter_tensors(adapter).values()} == {torch.float32}
    assert {p.dtype for p in model.value_head.parameters()} == {torch.float32}
    before = model.state()
    optimizer = take_steps(model, tree, n=2, lr=1e-3)
    assert {t.dtype for t in optimizer_state(optimizer).values()} == {torch.float32}
    scores = model.forward(tree, temperature=1.0)
    assert {x.dtype for x in scores} == {torch.float32}
    assert all(x.isfinite().all() for x in scores)
    after = model.state()
    assert all(t.isfinite().all() for t in after.values())
    changed = {n.split("/")[0] for n in before if not torch.equal(before[n], after[n])}
    assert {POLICY, CRITIC} <= changed and REFERENCE not in changed
    exact = make_model(kind, value__trunk="own")
    exact.load_state({n: t for n, t in before.items() if not n.startswith(REFERENCE)})
    first = exact.policy_logprob(tree, temperature=1.0)[0]
    assert (model.reference_logprob(tree, temperature=1.0) - first).abs().max() < 0.3


def test_adapter_loads_in_plain_peft(tmp_path):
    """The tensors' names are PEFT's own: saved as they are, plain transformers + peft compute the same logits."""
    model = make_model("llama", lora__rank=3, lora__alpha=5, lora__rslora=True)
    config: LoraConfig = model.peft_config
    config.save_pretrained(tmp_path)
    save_file(
        {n: p.detach().contiguous() for n, p in model.adapter_tensors(POLICY).items()}, tmp_path / "adapter_model.safetensors"
    )
    sequence = random_prompts(0, 1)[0]
    tree = build_tree([sequence])
    logits = model.backbone.head.logits(model.backbone.hidden(tree))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder("llama")), tmp_path)
    torch.testing.assert_close(plain(torch.tensor([sequence])).logits[0], logits, rtol=1e-5, atol=1e-5)
