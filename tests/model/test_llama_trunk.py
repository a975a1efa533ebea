"""Our own forward of Llama-shaped trunks against transformers' modules on the same packed tokens.

With ``backbone.llama = None`` the modules run, through the same attention; test_packed_equals_padded.py holds those to the
padded batch.
"""

import copy
import random
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import pytest
import torch
from engine import random_ids, random_prompts, relative, spread_adapter, tree_of_rollout
from tiny import tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from fastppo.batch.token_tree import build_tree
from fastppo.config import load_config
from fastppo.model.actor_critic import CRITIC, POLICY, ActorCritic
from fastppo.model.backbone import Backbone
from fastppo.model.llama_trunk import LlamaTrunk
from fastppo.model.load import Base
from fastppo.rollout.sampler import Sampling, generate
from fastppo_kernels import unpatch_peft

SIZES = {
    "vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-3),
    "llama: biases, wide heads, yarn": LlamaConfig(
        **SIZES, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=YARN
    ),
    "mistral: window": MistralConfig(**SIZES, sliding_window=5),
    "mistral: no window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2: window from the second layer on": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3: window in one layer": Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip
KINDS = tuple(CONFIGS)


@cache
def weights(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:  # biases and norms are seen
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def base_model(kind, dtype=torch.float32):
    return copy.deepcopy(weights(kind)).to(dtype).requires_grad_(False).eval()


def make(kind, dtype=torch.float32, **settings):
    """An actor-critic that runs our trunk, with an adapter that is not zero."""
    values = {key.replace("__", "."): str(value).lower() for key, value in settings.items()}
    config = load_config({"device": "cpu", "lora.rank": "4", **values})
    model = ActorCritic(Base(base_model(kind, dtype), tiny_tokenizer(), (1,), kind), config)
    spread_adapter(model, POLICY, 0.1)
    assert model.backbone.packed and isinstance(model.backbone.llama, LlamaTrunk)
    return model


@contextmanager
def modules_of(model):
    """transformers' own forward."""
    ours, model.backbone.llama = model.backbone.llama, None
    try:
        yield
    finally:
        model.backbone.llama = ours


def both(model, run):
    """What `run` gives with our trunk, and with the modules."""
    ours = run()
    with modules_of(model):
        return ours, run()


def make_tree(seed=0):
    rng = random.Random(seed)
    prompts = random_prompts(seed, 5, root=4)
    answers = [(p, random_ids(rng, rng.randint(1, 7))) for p in prompts for _ in range(2)]
    return build_tree([p + a for p, a in answers], [len(p) for p, _ in answers])


def gradients(model, tree, adapter=POLICY, rows=None):
    """Hidden states, and the gradients of every adapter tensor, of a weighted sum of them."""
    parameters = model.adapter_tensors(adapter)
    with model._adapter(adapter):
        hidden = model.backbone.hidden(tree, rows)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden.dtype)
    return hidden.detach(), dict(zip(parameters, torch.autograd.grad(hidden, [*parameters.values()], weight), strict=True))


# Of float32: random layers in a row blow its rounding up, most of all in gradients.
HIDDEN, GRADIENT = 1e-5, 1e-4


def assert_same(found, wanted):
    (hidden, grads), (plain_hidden, plain_grads) = found, wanted
    assert hidden.shape == plain_hidden.shape and hidden.dtype == plain_hidden.dtype
    assert relative(hidden, plain_hidden) < HIDDEN
    assert all(gradient.norm() > 0 for gradient in plain_grads.values())
    assert_same_gradients(grads.values(), plain_grads.values())


def assert_same_gradients(found, wanted):
    """Each to its own size, and to that of all where its own is next to nothing."""
    found, wanted = list(found), list(wanted)
    typical = 0.1 * sum(y.norm() for y in wanted) / len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= GRADIENT * max(y.norm(), typical)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_gradients(kind):
    model, tree = make(kind), make_tree()
    assert_same(*both(model, lambda: gradients(model, tree)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 40])
def test_one_sequence_of_any_length(kind, length):
    """Windows are shorter than some of them and longer than others; one token has gradients of values alone."""
    model = make(kind)
    tree = build_tree([random_ids(random.Random(length), length)])
    (hidden, grads), (plain_hidden, plain_grads) = both(model, lambda: gradients(model, tree))
    assert hidden.shape == (length, 32) and relative(hidden, plain_hidden) < HIDDEN
    assert_same_gradients(grads.values(), plain_grads.values())


@pytest.mark.parametrize("kind", ["mistral: window", "qwen2: window from the second layer on", "qwen3: window in one layer"])
def test_windows_are_seen(kind):
    """Else the comparisons above could not notice a window that is left out."""
    tree, model = make_tree(), make(kind)
    with torch.no_grad():
        hidden = model.backbone.hidden(tree)
        model.base.model.config.sliding_window = None  # where Mistral has it
        for layer in model.backbone.trunk.layers:
            layer.self_attn.sliding_window = None
        assert relative(model.backbone.hidden(tree), hidden) > 1e-3


def test_a_window_that_the_modules_do_not_look_at_is_none():
    """Llama has no windows, whatever else stands in its config.json."""
    config = LlamaConfig(**SIZES, sliding_window=16)
    assert config.sliding_window == 16
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.load_state_dict(weights("llama").state_dict())
    ids = random_ids(random.Random(0), 40)
    wanted = model(torch.tensor([ids]), use_cache=False).logits[0]
    backbone = Backbone(model)
    found = backbone.head.logits(backbone.hidden(build_tree([ids])))
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["head rows", "first", "last", "some, twice and in any order"])
def test_rows(kind, which):
    model, tree = make(kind), make_tree()
    n = tree.n_tokens
    rows = {"head rows": tree.head_rows, "first": torch.tensor([0]), "last": torch.tensor([n - 1])}.get(which)
    if rows is None:
        rows = torch.tensor([7, 3, 7, n - 2, 0])
    found, wanted = both(model, lambda: gradients(model, tree, rows=rows))
    assert len(found[0]) == len(rows)
    if which != "first":  # which sees only itself
        assert_same(found, wanted)
    whole = model.backbone.hidden(tree)[rows].detach()
    assert relative(found[0], whole) < HIDDEN


def test_rows_that_nobody_reads_are_left_out_behind_the_last_attention(monkeypatch):
    model, tree = make("llama"), make_tree()
    layer = import_module("fastppo_kernels.decoder_layer")
    seen, real = [], layer.swiglu
    monkeypatch.setattr(layer, "swiglu", lambda gate, up: seen.append(len(gate)) or real(gate, up))
    model.backbone.hidden(tree, tree.head_rows)
    n, rows = tree.n_tokens, len(tree.head_rows)
    assert rows < n and seen == [n, n, rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"value__trunk": "own"}, {"ppo__reference": "start"}, {"value__trunk": "detached"}])
def test_policy_reference_and_critic(kind, settings):
    model, tree = make(kind, **settings), make_tree()
    torch.nn.init.normal_(model.value_head.weight)
    if "ppo__reference" in settings:
        model.freeze_reference()
        spread_adapter(model, POLICY, 0.1, seed=5)
    if settings.get("value__trunk") == "own":
        spread_adapter(model, CRITIC, 0.1, seed=2)

    def run():
        scores = model.forward(tree, temperature=0.7)
        reference = model.reference_logprob(tree, temperature=0.7)
        loss = (scores.logprob - reference).sum() + scores.values.square().sum() + scores.entropy.sum()
        grads = torch.autograd.grad(loss, model.trainable())
        return [*(x.detach() for x in scores), reference], grads

    (ours, grads), (plain, plain_grads) = both(model, run)
    for x, y in zip(ours, plain, strict=True):
        assert y.norm() > 0 and relative(x, y) < GRADIENT
    assert all(gradient.norm() > 0 for gradient in plain_grads)
    assert_same_gradients(grads, plain_grads)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_off_is_the_base(kind):
    model, tree = make(kind), make_tree()
    bare = Backbone(base_model(kind))
    with torch.no_grad(), model._adapter(None):
        ours, plain = both(model, lambda: model.backbone.hidden(tree))
    assert relative(ours, plain) < 1e-6 and torch.equal(ours, bare.hidden(tree))
    assert relative(model.backbone.hidden(tree).detach(), ours) > 1e-3


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "o_proj,gate_proj", "down_proj", "k_proj,up_proj"])
@pytest.mark.parametrize("kind", ["llama: biases, wide heads, yarn", "qwen2", "qwen3"])
def test_adapters_on_some_layers(kind, targets):
    model, tree = make(kind, lora__targets=targets), make_tree()
    assert {name.split(".")[-3] for name in model.adapter_tensors(POLICY)} == set(targets.split(","))
    assert_same(*both(model, lambda: gradients(model, tree)))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_of_adapters(rslora):
    model, tree = make("qwen2", lora__rslora=rslora, lora__rank=9, lora__alpha=12), make_tree()
    layer = model.backbone.trunk.layers[0].self_attn.q_proj
    assert layer.scaling[POLICY] == pytest.approx(4.0 if rslora else 12 / 9)
    assert_same(*both(model, lambda: gradients(model, tree)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_as_peft_does(kind):
    """Beside the modules with nothing of ours but attention."""
    model, tree = make(kind), make_tree()
    ours = gradients(model, tree)
    unpatch_peft(model.peft)
    with modules_of(model):
        assert_same(ours, gradients(model, tree))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [3, 64])
def test_the_sampler_draws_the_same(kind, slots):
    """Prefill behind a shared root, steps over the cache, refills: the same tokens and log-probs."""
    model = make(kind)
    prompts = random_prompts(1, 5, root=8)
    sampling = Sampling(temperature=0.8, max_new_tokens=9, slots=slots)
    ours, plain = both(model, lambda: generate(model, prompts, 2, sampling, seed=5))
    assert [s.tokens for s in ours.samples] == [s.tokens for s in plain.samples]
    got, wanted = (torch.tensor([x for s in rollout.samples for x in s.logprobs]) for rollout in (ours, plain))
    assert (got - wanted).abs().max() < 1e-4
    tree = tree_of_rollout(ours)
    assert (model.policy_logprob(tree, temperature=0.8)[0] - got).abs().max() < 1e-4


def test_the_sampler_has_the_adapter_of_now():
    """Nothing that an earlier rollout made of the weights outlives it."""
    model, prompts = make("qwen2"), random_prompts(1, 4, root=8)
    for seed in (1, 2, 3):
        spread_adapter(model, POLICY, 0.1, seed=seed)
        rollout = generate(model, prompts, 2, Sampling(max_new_tokens=5), seed=0)
        got = torch.tensor([x for s in rollout.samples for x in s.logprobs])
        assert (model.policy_logprob(tree_of_rollout(rollout), temperature=1.0)[0] - got).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_is_as_exact_as_the_modules(kind):
    """Against float64 with the same weights: hidden states, and all gradients together."""
    tree = make_tree()
    low = make(kind, torch.bfloat16)
    exact = make(kind, torch.bfloat16)
    exact.base.model.double()
    with modules_of(exact):
        hidden, grads = gradients(exact, tree)
    assert hidden.dtype == torch.float64
    truth = torch.cat([gradient.flatten().double() for gradient in grads.values()])
    errors = []
    for found_hidden, found in both(low, lambda: gradients(low, tree)):
        assert found_hidden.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found.values())
        errors.append((relative(found_hidden, hidden), relative(torch.cat([g.flatten() for g in found.values()]), truth)))
    (ours, our_grads), (plain, plain_grads) = errors
    assert 0 < ours <= 1.2 * plain and 0 < our_grads <= 1.2 * plain_grads, errors


def test_layers_beyond_the_configured_number_are_left_out():
    """As transformers does it."""
    config = copy.deepcopy(CONFIGS["llama"])
    model = base_model("llama")
    model.config.num_hidden_layers = 2
    backbone, tree = Backbone(model), make_tree()
    ours = backbone.hidden(tree)
    assert len(model.model.layers) == config.num_hidden_layers == 3 and len(backbone.llama.layers) == 2
    backbone.llama = None
    assert relative(ours, backbone.hidden(tree)) < 1e-6


# -- what it leaves to the modules ---------------------------------------------------------------------------------------


def test_it_suits_the_four_shapes():
    for kind in KINDS:
        assert LlamaTrunk.suits(base_model(kind).model)


OTHERS = {
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.3, residual_multiplier=0.7),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    "gpt_neox": GPTNeoXConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
    "another activation": LlamaConfig(**SIZES | {"num_hidden_layers": 1}, hidden_act="gelu"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_are_refused(name):
    model = AutoModelForCausalLM.from_config(OTHERS[name])
    assert not LlamaTrunk.suits(model.base_model)


def test_a_subclass_is_another_shape():
    model = base_model("llama")

    class Mine(type(model.model)):
        pass

    model.model.__class__ = Mine
    assert not LlamaTrunk.suits(model.model)


HOOKS = {
    "forward hook": lambda module: module.register_forward_hook(lambda m, args, out: out),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda m, args: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda m, grad_in, grad_out: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda m, grad_out: None),
    "a forward of its own": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["trunk", "decoder layer", "linear layer"])
def test_hooks_are_not_passed_by(hook, where):
    trunk = base_model("llama").model
    HOOKS[hook]({"trunk": trunk, "decoder layer": trunk.layers[1], "linear layer": trunk.layers[0].mlp.up_proj}[where])
    assert not LlamaTrunk.suits(trunk)


def test_a_model_with_hooks_runs_its_modules():
    model = base_model("llama")
    calls = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: calls.append(1) or 2 * out)
    backbone = Backbone(model)
    assert backbone.llama is None and backbone.packed
    before = len(calls)
    assert relative(backbone.hidden(make_tree()), Backbone(base_model("llama")).hidden(make_tree())) > 0.01
    assert len(calls) == before + 1


class Doubled(nn.Linear):
    """A linear layer that is more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def _double(model):
    for layer in model.backbone.trunk.layers:
        new = Doubled(48, 32, bias=False).requires_grad_(False)
        new.weight.data = layer.mlp.down_proj.weight
        layer.mlp.down_proj = new


def _double_the_base(model):
    for layer in model.backbone.trunk.layers:
        layer.self_attn.o_proj.base_layer.__class__ = Doubled


def _merge(model):
    model.peft.merge_adapter()


def _two_at_once(model):
    spread_adapter(model, CRITIC, 0.1, seed=2)
    for layer in model._lora_layers:
        layer._active_adapter = [POLICY, CRITIC]


def _biased(model):
    for layer in model._lora_layers:
        lora_B = layer.lora_B[POLICY]
        lora_B.bias = nn.Parameter(torch.randn(lora_B.out_features))


CHANGES = {
    "a linear layer that is replaced": (_double, {"lora__targets": "q_proj,up_proj"}),
    "a base layer that is replaced": (_double_the_base, {}),
    "merged": (_merge, {}),
    "several active adapters": (_two_at_once, {"value__trunk": "own"}),
    "a bias on B": (_biased, {}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_more_than_a_linear_layer_with_an_adapter_is_left_to_its_module(kind, change):
    apply, settings = CHANGES[change]
    model, tree = make(kind, **settings), make_tree()
    before = model.backbone.hidden(tree).detach()
    apply(model)
    with torch.no_grad():
        ours, plain = both(model, lambda: model.backbone.hidden(tree))
    assert relative(ours, plain) < HIDDEN
    assert (relative(ours, before) > 1e-3) == (change != "merged")
    parameters = {"merged": []}.get(change, [p for p in model.peft.parameters() if p.requires_grad])
    if parameters:
        run = lambda: torch.autograd.grad(  # noqa: E731
            model.backbone.hidden(tree).square().sum(), parameters, allow_unused=True
        )
        found, wanted = both(model, run)
        assert [x is None for x in found] == [y is None for y in wanted]
        assert_same_gradients(*([gradient for gradient in each if gradient is not None] for each in (found, wanted)))


def test_dropout_of_an_adapter_is_left_to_its_module():
    model, tree = make("llama"), make_tree()
    for layer in model._lora_layers:
        layer.lora_dropout[POLICY] = nn.Dropout(0.5).eval()
    quiet = model.backbone.hidden(tree).detach()
    with modules_of(model):
        assert relative(quiet, model.backbone.hidden(tree).detach()) < HIDDEN
    for layer in model._lora_layers:
        layer.lora_dropout.train()
    assert relative(model.backbone.hidden(tree).detach(), quiet) > 1e-3


def test_one_of_three_that_is_left_to_its_module_takes_the_others_along():
    """q, k and v: an adapter that cannot be shared on one of them leaves the others right."""
    model, tree = make("qwen2"), make_tree()
    for layer in model.backbone.trunk.layers:
        layer.self_attn.k_proj.lora_B[POLICY].bias = nn.Parameter(torch.randn(16))
    assert_same(*both(model, lambda: gradients(model, tree)))
