"""What the tests of the head ops share, and plain torch to compare with."""

import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import Tensor

INF = float("inf")
BACKENDS = ["triton", "torch"]

# (dtype of the hidden states, of the weight, logits_dtype)
HEADS = [
    (torch.float32, torch.float32, None),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, None),
    (torch.float16, torch.float16, torch.float32),
]


def plain(logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy), in the dtype of the logits."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor, float] | None,
    targets: Tensor,
    *,
    rows_A: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The head as a model has it, with its adapter as PEFT has it under autocast: all in the weight's dtype but the softmax,
    which is in float32 or float64."""
    hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight, bias)
    if adapter is not None:
        lora_A, lora_B, scale = adapter
        logits = logits + F.linear(F.linear(hidden, lora_A.to(weight.dtype)), lora_B.to(weight.dtype)) * scale
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logit_scale * logits.to(wide)
    rows = torch.arange(len(hidden), device=hidden.device) if rows_A is None else rows_A
    return plain(logits[rows], targets, temperature, softcap)


def with_gradient(function, leaves: list[Tensor], weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """(log-prob, entropy, the gradient of every leaf)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logprob, entropy = function(*leaves)[:2]
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return [logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


def make_head(rows: int, vocab: int, width: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = torch.randn(rows, width, device=DEVICE), torch.randn(vocab, width, device=DEVICE)
    return [hidden.to(hidden_dtype), weight.to(weight_dtype), torch.randn(vocab, device=DEVICE).to(weight_dtype)]
