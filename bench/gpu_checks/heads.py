"""Cases of the ops after (and with) the LM head: log-probs, their PPO loss, sampling."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo_kernels import linear_logprob, linear_ppo_loss, sample, selective_log_softmax, token_logprob
from fastppo_kernels.sample import linear_sample

from .case import Case, Inputs, Results, randint, randn

_HALF = (torch.bfloat16, torch.float16)


def _logits(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, vocab: int) -> Inputs:
    targets = randint(device, seed, vocab, rows)
    targets[:1], targets[-1:] = 0, vocab - 1
    return {"logits": randn(device, seed, rows, vocab, scale=4.0, dtype=dtype), "targets": targets}


def _token_logprob(inputs: Inputs, backend: Any, **how) -> Results:
    # Times one: with `inplace` the backward overwrites what it was given.
    logits = inputs["logits"] * 1 if how.get("inplace") else inputs["logits"]
    logprob, entropy = token_logprob(logits, inputs["targets"], backend=backend, **how)
    return {"logprob": logprob, "entropy": entropy}


def _selective(inputs: Inputs, backend: Any) -> Results:
    """Of three tokens a row, as TRL's DPO takes them of one."""
    index = torch.stack([inputs["targets"], inputs["targets"] // 2, inputs["targets"] // 3], -1)
    return {"logprob": selective_log_softmax(inputs["logits"], index, temperature=0.7, backend=backend)}


def _rows_far_out(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, vocab: int) -> Inputs:
    """Logits of more than 2^31 entries, of which the last rows are looked at."""
    logits = torch.full((rows, vocab), float("nan"), dtype=dtype, device=device)
    logits[-3:] = randn(device, seed, 3, vocab, scale=4.0, dtype=dtype)
    return {"logits": (logits,), "last": logits[-3:].clone(), "targets": randint(device, seed, vocab, rows)}


def _last_rows(inputs: Inputs, backend: Any) -> Results:
    """The twin sees the last rows alone: it is what they should be wherever they lie."""
    (logits,), targets = inputs["logits"], inputs["targets"]
    if backend == "torch":
        logits, targets = inputs["last"], targets[-3:]
    leaf = logits.detach().requires_grad_()
    logprob, entropy = token_logprob(leaf, targets, backend=backend)
    (logprob[-3:].sum() + 0.5 * entropy[-3:].sum()).backward()
    assert leaf.grad is not None
    results = {"logprob": logprob[-3:], "entropy": entropy[-3:], "grad": leaf.grad[-3:]}
    return {name: x.detach().clone() for name, x in results.items()}


def _head(
    device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, hidden: int, vocab: int, actions: int | None = None
) -> Inputs:
    """`actions`: that many, with rows that have several or none; None: one a row."""
    count = rows if actions is None else actions
    inputs: Inputs = {
        "hidden": randn(device, seed, rows, hidden, dtype=dtype),
        "weight": randn(device, seed + 1, vocab, hidden, scale=3 * hidden**-0.5, dtype=dtype),
        "bias": randn(device, seed, vocab, dtype=dtype),
        "lora_A": randn(device, seed + 6, 16, hidden, scale=hidden**-0.5, dtype=dtype),
        "lora_B": randn(device, seed + 7, vocab, 16, scale=0.25, dtype=dtype),
        "targets": randint(device, seed, vocab, count),
        "advantages": randn(device, seed + 2, count),
        "mask": randint(device, seed + 3, 8, count) > 0,
    }
    inputs["rows"] = None if actions is None else randint(device, seed, max(rows - 1, 1), count)
    # Near the log-probs to come, so that some ratios are clipped and some are not.
    with torch.no_grad():
        logprob = linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"], rows_A=inputs["rows"], backend="torch")[
            0
        ]
    inputs["old"] = logprob + randn(device, seed + 4, count, scale=0.3)
    inputs["reference"] = logprob + randn(device, seed + 5, count, scale=0.3)
    return inputs


def _linear_logprob(
    inputs: Inputs, backend: Any, *, bias: bool = False, lora: bool = False, argmax: bool = False, exact: bool = False, **how
) -> Results:
    weight = inputs["weight"]
    how |= _adapter(inputs) if lora else {}
    found: tuple[Tensor, ...] = linear_logprob(
        inputs["hidden"], weight, inputs["targets"], rows_A=inputs["rows"], bias=inputs["bias"] if bias else None,
        logits_dtype=torch.float32 if exact and weight.dtype != torch.float64 else None, argmax=argmax, backend=backend,
        **how,
    )  # fmt: skip
    return dict(zip(("logprob", "entropy", "argmax"), found, strict=False))


def _adapter(inputs: Inputs) -> dict[str, Any]:
    return {"lora_A": inputs["lora_A"], "lora_B": inputs["lora_B"], "lora_scale": 2.0}


def _linear_ppo_loss(
    inputs: Inputs, backend: Any, *, bias: bool = False, lora: bool = False, exact: bool = False, **how
) -> Results:
    weight = inputs["weight"]
    how |= _adapter(inputs) if lora else {}
    if backend == "torch":
        how.pop("chunk_rows", None)  # what is too large for a chunk of float64
    loss, metrics, logprob, entropy = linear_ppo_loss(
        inputs["hidden"], weight, inputs["targets"], inputs["old"], inputs["advantages"], rows_A=inputs["rows"],
        bias=inputs["bias"] if bias else None, mask=inputs["mask"], entropy_coef=0.01, ref_logprob=inputs["reference"],
        kl_coef=0.1, logits_dtype=torch.float32 if exact and weight.dtype != torch.float64 else None, backend=backend, **how,
    )  # fmt: skip
    return {"loss": loss, "logprob": logprob, "entropy": entropy} | metrics


def _ratio(inputs: Inputs, backend: Any) -> Results:
    """How far the first update's ratio is from 1, with old log-probs of `linear_logprob`: not at all, in no bit."""
    head = inputs["hidden"], inputs["weight"], inputs["targets"]
    how = {"rows_A": inputs["rows"], "bias": inputs["bias"], "temperature": 0.7, "chunk_rows": 500, "backend": backend}
    how |= _adapter(inputs)
    with torch.no_grad():
        old = linear_logprob(*head, **how)[0]
    _, metrics, logprob, _ = linear_ppo_loss(*head, old, inputs["advantages"], **how)
    found = {"logprob": logprob - old, "ratio": metrics["ratio_sum"] - len(old), "ratio_max": metrics["ratio_max"] - 1}
    return found | {"kl": metrics["approx_kl_sum"]}


def _sum_slack(name: str, inputs: Inputs, *, exact: bool = False) -> float:
    """Each of a sum's terms (about 1) is as far off as a rounded logit, in whatever direction."""
    count = max(len(inputs["targets"]), 1)
    rounding = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(inputs["hidden"].dtype, 1e-5) if not exact else 1e-5
    if name == "clip_fraction_sum":  # a ratio at the edge of the clip counts on either side of it
        return 1.0 + rounding * count
    by_name = {"loss": rounding / count**0.5, "ratio_max": 2 * rounding}
    return by_name.get(name, rounding * count**0.5 if name.endswith("_sum") else 0.0)


def _draws(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, vocab: int) -> Inputs:
    return {
        "logits": randn(device, seed, rows, vocab, scale=3.0, dtype=dtype),
        "ids": randint(device, seed, 1 << 40, rows),
        "steps": randint(device, seed, 4096, rows),
    }


def _sample(inputs: Inputs, backend: Any, **how) -> Results:
    token, logprob = sample(
        inputs["logits"], sequence_ids_B=inputs["ids"], step_B=inputs["steps"], seed=2**63 + 5, backend=backend, **how
    )  # fmt: skip
    return {"token": token, "logprob": logprob}


def _rollout(device: torch.device, dtype: torch.dtype, seed: int, *, rows: int, hidden: int, vocab: int) -> Inputs:
    return _head(device, dtype, seed, rows=rows, hidden=hidden, vocab=vocab) | {
        "ids": randint(device, seed, 1 << 40, rows),
        "steps": randint(device, seed, 4096, rows),
    }


def _linear_sample(inputs: Inputs, backend: Any, *, bias: bool = False, lora: bool = False, **how) -> Results:
    how |= _adapter(inputs) if lora else {}
    token, logprob = linear_sample(
        inputs["hidden"], inputs["weight"], bias=inputs["bias"] if bias else None, sequence_ids_B=inputs["ids"],
        step_B=inputs["steps"], seed=77, backend=backend, **how,
    )  # fmt: skip
    return {"token": token, "logprob": logprob}


def cases() -> list[Case]:
    token, linear, ppo = ("token_logprob",), ("linear_logprob",), ("linear_ppo_loss",)
    small_head = partial(_head, rows=20, hidden=32, vocab=1030)
    shared, small_shared = (
        partial(_head, rows=1021, hidden=896, vocab=50257, actions=1500),
        partial(_head, rows=20, hidden=32, vocab=1030, actions=64),
    )
    whole = partial(_head, rows=1021, hidden=3584, vocab=152064)
    small_draws = partial(_draws, rows=4, vocab=1030)
    everything, chunks = {"temperature": 0.7, "softcap": 30.0}, {"chunk_rows": 100}
    return [
        Case(
            "token_logprob 4093 x 152064",
            token,
            partial(_logits, rows=4093, vocab=152064),
            _token_logprob,
            ("logits",),
            partial(_logits, rows=5, vocab=5003),
        ),
        Case(
            "token_logprob 1000 x 50257, softcap, in place",
            token,
            partial(_logits, rows=1000, vocab=50257),
            partial(_token_logprob, inplace=True, **everything),
            ("logits",),
            partial(_logits, rows=3, vocab=1001),
        ),
        Case("token_logprob 70000 rows", token, partial(_logits, rows=70000, vocab=1000), _token_logprob, ("logits",)),
        Case("token_logprob 1 row", token, partial(_logits, rows=1, vocab=151936), _token_logprob, ("logits",)),
        Case(
            "token_logprob 0 rows",
            token,
            partial(_logits, rows=0, vocab=32000),
            _token_logprob,
            ("logits",),
            partial(_logits, rows=0, vocab=1000),
            checks=("error",),
        ),
        Case(
            "selective_log_softmax 1000 x 50257, 3 tokens a row",
            ("selective_log_softmax",),
            partial(_logits, rows=1000, vocab=50257),
            _selective,
            ("logits",),
            partial(_logits, rows=5, vocab=5003),
        ),
        Case(
            "token_logprob past 2^31 entries",
            token,
            partial(_rows_far_out, rows=14200, vocab=152064),
            _last_rows,
            dtypes=_HALF,
            checks=("error",),
            gibibytes=12,
        ),
        Case("linear_logprob 1021 x 3584 x 152064, frozen head", linear, whole, _linear_logprob, ("hidden",), small_head),
        Case(
            "linear_logprob trained head with bias, shared rows, argmax",
            linear,
            shared,
            partial(_linear_logprob, bias=True, argmax=True, logit_scale=0.9, chunk_rows=500, **everything),
            ("hidden", "weight", "bias"),
            small_shared,
            ties=0.02,
        ),
        Case(
            "linear_logprob float32 logits",
            linear,
            whole,
            partial(_linear_logprob, exact=True),
            ("hidden",),
            small_head,
            dtypes=_HALF,
        ),
        Case(
            "linear_logprob with an adapter",
            linear,
            shared,
            partial(_linear_logprob, lora=True, chunk_rows=500),
            ("hidden", "lora_A", "lora_B"),
            small_shared,
            roundings=2,
        ),
        Case("ratio is exactly 1", ("linear_logprob", "linear_ppo_loss"), shared, _ratio, (), small_shared),
        Case(
            "linear_logprob 0 rows",
            linear,
            partial(_head, rows=0, hidden=64, vocab=1000),
            _linear_logprob,
            ("hidden", "weight"),
            partial(_head, rows=0, hidden=64, vocab=1000),
            checks=("error",),
        ),
        Case(
            "linear_ppo_loss 1021 x 3584 x 152064, frozen head",
            ppo,
            whole,
            _linear_ppo_loss,
            ("hidden",),
            small_head,
            slack=_sum_slack,
        ),
        Case(
            "linear_ppo_loss with an adapter",
            ppo,
            shared,
            partial(_linear_ppo_loss, lora=True, bias=True, chunk_rows=500),
            ("hidden", "lora_A", "lora_B"),
            small_shared,
            roundings=2,
            slack=_sum_slack,
        ),
        Case(
            "linear_ppo_loss trained head with bias, shared rows",
            ppo,
            shared,
            partial(_linear_ppo_loss, bias=True, dual_clip=3.0, kl_estimator="jensen_shannon", chunk_rows=500, **everything),
            ("hidden", "weight", "bias"),
            small_shared,
            slack=_sum_slack,
        ),
        Case(
            "linear_ppo_loss float32 logits",
            ppo,
            whole,
            partial(_linear_ppo_loss, exact=True, kl_estimator="k2"),
            ("hidden",),
            small_head,
            dtypes=_HALF,
            slack=partial(_sum_slack, exact=True),
        ),
        Case(
            "linear_ppo_loss chunks past 2^31 entries",
            ppo,
            partial(_head, rows=14200, hidden=16, vocab=152064),
            partial(_linear_ppo_loss, chunk_rows=14200),
            ("hidden",),
            dtypes=(torch.bfloat16,),
            checks=("error",),
            slack=_sum_slack,
            gibibytes=12,
        ),
        Case(
            "linear_ppo_loss 0 rows",
            ppo,
            partial(_head, rows=0, hidden=64, vocab=1000),
            _linear_ppo_loss,
            ("hidden",),
            partial(_head, rows=0, hidden=64, vocab=1000),
            checks=("error",),
        ),
        *(
            Case(
                f"sample {name}",
                ("sample",),
                partial(_draws, rows=256, vocab=152064),
                partial(_sample, **how),
                (),
                small_draws,
                keyed_by="token",
                ties=0.01,
            )
            for name, how in (
                ("greedy", {"temperature": 0.0}),
                ("all tokens", {}),
                ("top-k and top-p", {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
            )
        ),
        *(
            Case(
                f"linear_sample {name}",
                ("linear_sample",),
                partial(_rollout, rows=256, hidden=3584, vocab=152064),
                partial(_linear_sample, **how),
                (),
                partial(_rollout, rows=5, hidden=32, vocab=1030),
                keyed_by="token",
                ties=0.02,
            )
            for name, how in (
                ("256 x 3584 x 152064", {"temperature": 0.7}),
                ("bias, adapter, softcap, top-k", {"bias": True, "lora": True, "softcap": 30.0, "top_k": 50} | chunks),
            )
        ),
        Case("sample 70000 rows", ("sample",), partial(_draws, rows=70000, vocab=1000), _sample, keyed_by="token", ties=0.01),
    ]
