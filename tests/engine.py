"""Tiny models on disk, settings and random prompts for tests of the engine's parts."""

import random
import tempfile
from functools import cache
from pathlib import Path

import torch
from tiny import save_tiny_model

from fastppo.batch.token_tree import TokenTree, build_tree
from fastppo.config import Config, load_config
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.model.load import Base, load_base

PACKED_KINDS = ("qwen2", "llama", "mistral", "gpt_neox")
VOCAB = 300  # token ids below this exist in every tiny model


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fastppo-tests-")


@cache
def tiny_folder(kind: str) -> Path:
    """The folder of a tiny model; made once per test process, gone at its end."""
    return save_tiny_model(kind, Path(_folder().name) / kind)


def make_config(kind: str, **settings: object) -> Config:
    """Settings by key with ``__`` for the dot: ``make_config("llama", ppo__lr=1e-2)``."""
    values = {key.replace("__", "."): str(value).lower() for key, value in settings.items()}
    return load_config({"device": "cpu", "lora.rank": "4", **values, "model": str(tiny_folder(kind))})


def make_base(kind: str, **settings: object) -> Base:
    return load_base(make_config(kind, **settings))


def make_model(kind: str, *, spread: float = 0.1, **settings: object) -> ActorCritic:
    """An actor-critic whose policy adapter is not zero (unless ``spread`` is 0)."""
    config = make_config(kind, **settings)
    model = ActorCritic(load_base(config), config)
    if spread:
        spread_adapter(model, POLICY, spread)
    return model


def spread_adapter(model: ActorCritic, adapter: str, spread: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter_tensors(adapter).values():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def sharpen(model: ActorCritic, factor: float = 5.0) -> ActorCritic:
    """Scale the final norm: hidden states of width 32 under a random head cannot make one token of 300 likely otherwise."""
    trunk = model.backbone.trunk
    with torch.no_grad():
        (trunk.norm if hasattr(trunk, "norm") else trunk.norm_f).weight.mul_(factor)
    return model


def random_ids(rng: random.Random, n: int, vocab: int = VOCAB) -> list[int]:
    """Ordinary tokens: none of <s>, </s>, <pad>."""
    return [rng.randrange(3, vocab) for _ in range(n)]


def random_prompts(seed: int, n: int, root: int = 10, longest: int = 9) -> list[list[int]]:
    rng = random.Random(seed)
    stem = random_ids(rng, root)
    return [stem + random_ids(rng, rng.randint(1, longest)) for _ in range(n)]


def tree_of_rollout(rollout) -> TokenTree:
    sequences = [rollout.prompts[s.prompt] + s.tokens for s in rollout.samples]
    return build_tree(sequences, [len(rollout.prompts[s.prompt]) for s in rollout.samples])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
