"""Cases of the ops on numbers per token: losses, advantages, whitening."""

from functools import partial
from typing import Any, get_args

import torch

from fastppo_kernels import KLEstimator, gae, ppo_loss, ppo_policy_loss, ppo_value_loss, reduce_metrics, sampled_kl, whiten

from .case import Case, Inputs, Results, randint, randn

_SCALES = {
    "logprob": 0.3, "old_logprob": 0.3, "advantages": 1.0, "values": 1.0, "old_values": 1.0, "returns": 1.0, "entropy": 1.0,
    "ref_logprob": 0.3,
}  # fmt: skip
_POLICY = ("logprob", "old_logprob", "advantages", "entropy", "ref_logprob")
_VALUE = ("values", "old_values", "returns")


def _tokens(device: torch.device, dtype: torch.dtype, seed: int, *, count: int, mask: bool = True) -> Inputs:
    inputs: Inputs = {
        name: randn(device, seed + place, count, scale=scale, dtype=dtype)
        for place, (name, scale) in enumerate(_SCALES.items())
    }
    inputs["mask"] = randint(device, seed, 5, count) > 0 if mask else None
    if mask:  # what is masked out is not read
        for name in _SCALES:
            inputs[name] = torch.where(inputs["mask"], inputs[name], float("nan"))
    return inputs


def _policy_loss(inputs: Inputs, backend: Any, **how) -> Results:
    given = {name: inputs[name] for name in _POLICY}
    loss, metrics = ppo_policy_loss(**given, mask=inputs["mask"], entropy_coef=0.01, kl_coef=0.1, backend=backend, **how)
    return {"loss": loss} | metrics


def _value_loss(inputs: Inputs, backend: Any, **how) -> Results:
    loss, metrics = ppo_value_loss(**{name: inputs[name] for name in _VALUE}, mask=inputs["mask"], backend=backend, **how)
    return {"loss": loss} | metrics


def _both(inputs: Inputs, backend: Any, **how) -> Results:
    given = {name: inputs[name] for name in (*_POLICY, *_VALUE)}
    loss, metrics = ppo_loss(**given, mask=inputs["mask"], entropy_coef=0.01, kl_coef=0.1, backend=backend, **how)
    return {"loss": loss} | metrics


def _parts(inputs: Inputs, backend: Any) -> Results:
    """Metrics of a batch from its halves."""
    half = inputs["logprob"].numel() // 2
    halves = []
    for part in (slice(None, half), slice(half, None)):
        given = {name: inputs[name][part] for name in (*_POLICY, *_VALUE)}
        halves.append(ppo_loss(**given, mask=inputs["mask"][part], backend=backend)[1])
    return reduce_metrics(halves)


def _kl(inputs: Inputs, backend: Any, *, estimator: Any) -> Results:
    """Of torch's operations alone: nothing but that they need no host."""
    logprob, reference = (torch.nan_to_num(inputs[name]) for name in ("logprob", "ref_logprob"))
    return {"kl": sampled_kl(logprob, reference, estimator)}


def _sum_slack(name: str, inputs: Inputs) -> float:
    """Terms of about 1, each rounded in float32; what lies at the edge of a clip counts on either side of it."""
    count = max(inputs["logprob"].numel(), 1)
    if name == "loss":
        return 3e-7 / count**0.5
    if name.endswith("clip_fraction_sum"):
        return 1.0 + 1e-4 * count
    return 3e-7 * count**0.5 if name.endswith("_sum") else 0.0


def _episodes(
    device: torch.device, dtype: torch.dtype, seed: int, *, lengths: tuple[int, ...] | None, shape: tuple[int, ...]
) -> Inputs:
    """Packed with `lengths`, else padded."""
    size = (sum(lengths),) if lengths is not None else shape
    ends = None if lengths is None else torch.tensor([0, *lengths], device=device).cumsum(0)
    sequences = shape[0] if lengths is None else len(lengths)
    return {
        "rewards": randn(device, seed, *size, dtype=dtype),
        "values": randn(device, seed + 1, *size, dtype=dtype),
        "mask": randint(device, seed, 4, *size) > 0,
        "cu_seqlens": ends,
        "lam": randint(device, seed, 100, sequences) / 100.0,
    }


def _gae(inputs: Inputs, backend: Any, *, plain: bool = False) -> Results:
    rewards, values = inputs["rewards"], inputs["values"]
    if plain:
        found = gae(rewards, values, inputs["cu_seqlens"], gamma=0.99, with_sums=True, backend=backend)
        return dict(zip(("advantages", "returns", "sums"), found, strict=True))
    advantages, returns, sums = gae(
        rewards, values, inputs["cu_seqlens"], gamma=0.97, lam=inputs["lam"], mask=inputs["mask"], with_sums=True,
        backend=backend,
    )  # fmt: skip
    white = whiten(advantages, inputs["mask"], sums=sums, backend=backend)
    return {"advantages": advantages, "returns": returns, "sums": sums, "white": white}


def _gae_slack(name: str, inputs: Inputs) -> float:
    """The sums are of the advantages as they are stored, in float32 here and float64 there."""
    return 1e-6 * inputs["rewards"].numel() ** 0.5 if name == "sums" else 0.0


def _steps_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, steps: int) -> Inputs:
    rewards, values = (torch.zeros(rows, steps, dtype=dtype, device=device) for _ in range(2))
    rewards[-1], values[-1] = randn(device, seed, steps, dtype=dtype), randn(device, seed + 1, steps, dtype=dtype)
    return {"all": (rewards, values), "rewards": rewards[-1:].clone(), "values": values[-1:].clone()}


def _last_sequence(inputs: Inputs, backend: Any) -> Results:
    rewards, values = inputs["all"] if backend == "triton" else (inputs["rewards"], inputs["values"])
    advantages, returns = gae(rewards, values, backend=backend)
    return {"advantages": advantages[-1].clone(), "returns": returns[-1].clone()}


def _numbers(device: torch.device, dtype: torch.dtype, seed: int, *, count: int) -> Inputs:
    return {"x": randn(device, seed, count, scale=3.0, dtype=dtype) + 1, "mask": randint(device, seed, 4, count) > 0}


def _whiten(inputs: Inputs, backend: Any, **how) -> Results:
    return {"white": whiten(inputs["x"], inputs["mask"], backend=backend, **how)}


def cases() -> list[Case]:
    many, few = partial(_tokens, count=524_287), partial(_tokens, count=700)
    lengths = tuple((37 * i) % 700 for i in range(300)) + (0, 1, 9000)
    small_lengths = (3, 0, 1, 700)
    return [
        Case(
            "ppo_policy_loss 524287 tokens",
            ("ppo_policy_loss",),
            many,
            partial(_policy_loss, dual_clip=3.0, kl_estimator="k2"),
            ("logprob", "entropy"),
            few,
            slack=_sum_slack,
        ),
        Case(
            "ppo_value_loss 524287 tokens, clipped, Huber",
            ("ppo_value_loss",),
            many,
            partial(_value_loss, clip=0.2, huber_delta=0.5),
            ("values",),
            few,
            slack=_sum_slack,
        ),
        Case(
            "ppo_loss 524287 tokens",
            ("ppo_loss",),
            many,
            partial(_both, kl_estimator="jensen_shannon", denominator=1000.0),
            ("logprob", "entropy", "values"),
            few,
            slack=_sum_slack,
        ),
        Case(
            "reduce_metrics of 2 x 262144 tokens",
            ("reduce_metrics",),
            many,
            _parts,
            (),
            few,
            slack=lambda name, inputs: 1e-3 if "clip_fraction" in name else 2e-6,
        ),
        *(
            Case(f"sampled_kl {estimator}", ("sampled_kl",), many, partial(_kl, estimator=estimator), ("logprob",), few)
            for estimator in get_args(KLEstimator)
        ),
        Case(
            "ppo_loss 1 token",
            ("ppo_loss",),
            partial(_tokens, count=1, mask=False),
            _both,
            ("logprob", "entropy", "values"),
            partial(_tokens, count=1, mask=False),
            slack=_sum_slack,
        ),
        Case(
            "ppo_loss 0 tokens",
            ("ppo_loss",),
            partial(_tokens, count=0),
            _both,
            ("logprob", "entropy", "values"),
            partial(_tokens, count=0),
            checks=("error",),
        ),
        Case(
            "gae and whiten, packed, masked, lambda each",
            ("gae", "whiten"),
            partial(_episodes, lengths=lengths, shape=()),
            _gae,
            (),
            partial(_episodes, lengths=small_lengths, shape=()),
            slack=_gae_slack,
        ),
        Case(
            "gae 512 x 4096",
            ("gae",),
            partial(_episodes, lengths=None, shape=(512, 4096)),
            partial(_gae, plain=True),
            (),
            partial(_episodes, lengths=None, shape=(3, 600)),
            slack=_gae_slack,
        ),
        Case(
            "gae 70000 x 20",
            ("gae",),
            partial(_episodes, lengths=None, shape=(70000, 20)),
            partial(_gae, plain=True),
            slack=_gae_slack,
        ),
        Case(
            "gae past 2^31 steps",
            ("gae",),
            partial(_steps_far_out, rows=2200, steps=1_000_000),
            _last_sequence,
            dtypes=(torch.bfloat16,),
            checks=("error",),
            gibibytes=30,
        ),
        Case(
            "gae 0 steps",
            ("gae",),
            partial(_episodes, lengths=(0, 0), shape=()),
            partial(_gae, plain=True),
            (),
            partial(_episodes, lengths=(0, 0), shape=()),
            checks=("error",),
        ),
        Case(
            "whiten 5000000 numbers",
            ("whiten",),
            partial(_numbers, count=5_000_000),
            _whiten,
            (),
            partial(_numbers, count=1500),
        ),
        Case(
            "whiten, scaled only",
            ("whiten",),
            partial(_numbers, count=4097),
            partial(_whiten, shift_mean=False),
            (),
            partial(_numbers, count=1),
        ),
    ]
