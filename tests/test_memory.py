"""The counted peak of a micro-batch's forward and backward beside the measured one, on the CPU."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine import make_config
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bench import memory as measure
from bench import models
from fastppo import budget, memory
from fastppo.algorithms import ppo
from fastppo.batch.rollout import MicroBatch
from fastppo.batch.token_tree import TokenTree, build_tree
from fastppo.memory import Batch, Head
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import Base, load_base, pick_dtype

# Of what is measured. Each case below says what it is of.
ALLOWED = 0.1


def make_model(kind: str, **settings: Any) -> ActorCritic:
    config = make_config("llama", **settings)
    if kind == "builtin":
        return ActorCritic(load_base(replace(config, model=None)), config)
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    if kind == "bench":
        return ActorCritic(models.random_base("tiny", "cpu", dtype), config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tiny_tokenizer())), dtype=dtype)
    return ActorCritic(Base(model.requires_grad_(False).eval(), tiny_tokenizer(), (1,), kind), config)


def make_tree(tokens: int, prompt: int, new: int, root: int) -> TokenTree:
    """About so many tokens: prompts with a common root, four answers each."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(3, 300) for _ in range(n)]  # noqa: E731
    stem, sequences, starts = ids(root), [], []
    for _ in range(max(1, (tokens - root) // (prompt - root + 4 * (new - 1)))):
        of_prompt = stem + ids(prompt - root)
        sequences += [of_prompt + ids(new) for _ in range(4)]
        starts += [prompt] * 4
    return build_tree(sequences, starts)


def known(tree: TokenTree) -> dict[str, torch.Tensor]:
    random_numbers = torch.randn(4, tree.n_actions, generator=torch.Generator().manual_seed(0))
    old, values, advantages, returns = random_numbers
    return {"old_logprob": -3 - old.abs(), "old_values": values, "advantages": advantages, "returns": returns}


def measured(model: ActorCritic, tree: TokenTree) -> int:
    """Of a micro-batch after another one: gradients are there, and what is prepared of a tree."""
    part = MicroBatch(tree, [], known(tree))

    def run() -> None:
        ppo.micro_batch_loss(model, part, tree.n_actions, 0.05, model.config, False)[0].backward()

    run()
    return measure.peak(run)


def counted(model: ActorCritic, tree: TokenTree) -> int:
    sizes = model._sizes
    assert sizes.layer is not None
    device = budget.Device.of(model.device)
    run = budget.Budget(sizes, model.config, device, budget.Prompts(1))
    machine, attention = run._machine, run.attention(tree.layout)
    batch = Batch(tree.n_tokens, len(tree.head_rows), tree.n_actions, attention)
    head = Head(sizes.vocab, sizes.itemsize)
    passes = 2 if model.config.value.trunk == "own" else 1
    return memory.micro_batch(sizes.layer, sizes.layers, head, machine, batch, activations=model.activations, passes=passes)


SHORT, LONG, PREFIX = (40, 4, 25), (100, 64, 1), (400, 4, 380)  # prompt, new tokens, root


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("tokens", [512, 2048])
@pytest.mark.parametrize("shape", [SHORT, LONG, PREFIX], ids=["short", "long", "prefix"])
@pytest.mark.parametrize(
    ("kind", "rank", "dtype"),
    [
        ("builtin", 16, "float32"),
        ("builtin", 64, "float32"),
        ("bench", 8, "float32"),
        ("llama", 4, "float32"),
        ("qwen2", 16, "float32"),
        ("mistral", 16, "float32"),  # its window is the back end torch's
        ("builtin", 16, "bfloat16"),
        ("bench", 8, "bfloat16"),
        ("mistral", 16, "bfloat16"),
    ],
)
def test_the_peak_is_counted_within_a_tenth(kind, rank, dtype, shape, tokens, activations):
    model = make_model(kind, lora__rank=rank, activations=activations, dtype=dtype)
    tree = make_tree(tokens, *shape)
    found, wanted = counted(model, tree), measured(model, tree)
    assert abs(found - wanted) < ALLOWED * wanted, f"{found:,} counted, {wanted:,} measured"


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("builtin", {"value__trunk": "own"}),
        ("builtin", {"value__trunk": "detached"}),
        ("builtin", {"lora__targets": "q_proj,v_proj"}),
        ("builtin", {"ppo__entropy_coef": 0.01}),
    ],
)
def test_the_peak_is_counted_for_other_runs_too(kind, settings, activations):
    model = make_model(kind, activations=activations, **settings)
    tree = make_tree(1024, *SHORT)
    found, wanted = counted(model, tree), measured(model, tree)
    assert abs(found - wanted) < ALLOWED * wanted, f"{found:,} counted, {wanted:,} measured"


def test_few_tokens_are_counted_too():
    """Unpadded, and with adapters that are not folded into the weights."""
    model = make_model("builtin")
    tree = make_tree(60, 20, 4, 10)
    assert tree.n_tokens < 64
    found, wanted = counted(model, tree), measured(model, tree)
    assert abs(found - wanted) < ALLOWED * wanted, f"{found:,} counted, {wanted:,} measured"


@pytest.mark.parametrize(("tokens", "prompt", "new", "root"), [(2048, *SHORT), (1024, *LONG)])
def test_what_is_planned_of_settings_and_prompts_is_what_full_answers_take(tokens, prompt, new, root):
    model = make_model("builtin", sample__max_new_tokens=new, ppo__prompts=2 * tokens // (prompt - root + 4 * (new - 1)))
    tree = make_tree(tokens, prompt, new, root)
    prompts = budget.Prompts(longest=prompt, shared=root, mean=prompt)
    run = budget.Budget(model._sizes, model.config, budget.Device.of(model.device), prompts)
    planned, wanted = run.takes(tree.n_tokens, "keep"), measured(model, tree)
    assert abs(planned - wanted) < ALLOWED * wanted, f"{planned:,} planned, {wanted:,} measured"


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_the_peak_is_counted_of_a_base_in_4_bits(activations):
    """Its layers run part by part."""
    pytest.importorskip("bitsandbytes")
    model = make_model("builtin", activations=activations, dtype="nf4")
    assert model._sizes.layer is not None and not model._sizes.layer.fused
    tree = make_tree(1024, *SHORT)
    found, wanted = counted(model, tree), measured(model, tree)
    assert abs(found - wanted) < ALLOWED * wanted, f"{found:,} counted, {wanted:,} measured"
