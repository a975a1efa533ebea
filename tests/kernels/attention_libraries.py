"""Stand-ins for the library functions behind the attention back ends, with their arguments and meaning, on the CPU.

Each sequence is a dense softmax whose causal mask is aligned at the bottom right. The backward uses the forward's logarithms
of the denominators, as the real ones do, and insists on what the real ones insist on.
"""

from importlib import import_module

import torch

from fastppo_kernels import _attention_varlen as varlen

module = import_module("fastppo_kernels.attention")  # the package's attribute of this name is the function

calls: list[str] = []


def _scores(q, k, scale, left, softcap):
    """[H, Q, K] in float64, -inf where not seen, and the derivative of the cap."""
    n_q, n_k = q.shape[0], k.shape[0]
    raw = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    slope = 1 - (capped / softcap) ** 2 if softcap else torch.ones_like(raw)
    distance = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)[None]
    unseen = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros((), dtype=torch.bool))
    return capped.masked_fill(unseen, -torch.inf), slope


def _sequences(q, cu_q, cu_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == q.shape[0]
    for (a, b), (c, d) in zip(*(zip(cu.tolist(), cu.tolist()[1:], strict=False) for cu in (cu_q, cu_k)), strict=True):
        yield slice(a, b), slice(c, d)


def _check(q, k, v, cu_q, cu_k, max_q, max_k):
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert max_q >= max(2, int(cu_q.diff().max())) and max_k >= int(cu_k.diff().max())


def dense_forward(q, k, v, cu_q, cu_k, scale, left, softcap):
    group = q.shape[1] // k.shape[1]
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for rows, keys in _sequences(q, cu_q, cu_k):
        k_s, v_s = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        s, _ = _scores(q[rows], k_s, scale, left, softcap)
        lse[:, rows] = s.logsumexp(-1).float()
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v_s.double()).to(q.dtype)
    return out, lse


def dense_backward(d_out, q, k, v, out, lse, cu_q, cu_k, scale, left, softcap):
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys in _sequences(q, cu_q, cu_k):
        k_s, v_s = (x[keys].repeat_interleave(group, 1).double() for x in (k, v))
        s, slope = _scores(q[rows], k_s, scale, left, softcap)
        p, do = (s - lse[:, rows, None].double()).exp(), d_out[rows].double()
        delta = (do * out[rows].double()).sum(-1).T[:, :, None]
        ds = p * (torch.einsum("qhd,khd->hqk", do, v_s) - delta) * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k_s).to(q.dtype)
        dk_s, dv_s = torch.einsum("hqk,qhd->khd", ds, q[rows].double()), torch.einsum("hqk,qhd->khd", p, do)
        for d, new in ((dk, dk_s), (dv, dv_s)):
            d[keys] = new.unflatten(1, (-1, group)).sum(2).to(d.dtype)
    return dq, dk, dv


def flash_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    calls.append("forward")
    assert dropout_p == 0 and causal and window_size_right == 0 and alibi_slopes is None
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = dense_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, softcap)
    return out, lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def flash_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    calls.append("backward")
    assert dropout_p == 0 and causal and window_size_right == 0 and alibi_slopes is None and deterministic
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert all(x.is_contiguous() for x in (dout, out, dq, dk, dv))
    grads = dense_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, softcap
    )  # fmt: skip
    for d, new in zip((dq, dk, dv), grads, strict=True):
        d.copy_(new)
    return torch.empty(0)


def torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    calls.append("forward")
    assert dropout_p == 0 and not return_debug_mask and window_size_right == 0
    assert is_causal == (window_size_left == -1)
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    out, lse = dense_forward(query, key, value, cum_seq_q, cum_seq_k, scale, window_size_left, 0.0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), query.new_empty(0), query.new_empty(0)


def torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    calls.append("backward")
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert dropout_p == 0 and window_size_right == 0 and rng_state.dtype == torch.uint64
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    return dense_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale, window_size_left, 0.0)


class CausalFromBottomRight:
    """`BlockDiagonalCausalFromBottomRightMask`: lengths on the host."""

    made = 0

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        cls.made += 1
        mask = cls()
        mask.lengths = q_seqlen, kv_seqlen
        assert all(n_k >= n_q for n_q, n_k in zip(q_seqlen, kv_seqlen, strict=True))
        cumulative = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in mask.lengths)
        mask.cu_q, mask.cu_k = (cu.to(device) for cu in cumulative)
        return mask


def xformers_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    calls.append("forward")
    assert query.ndim == 4 and query.shape[0] == 1 and query.shape[2] == key.shape[2] and op == "forward op" and p == 0
    rows, cu_q = [x[0] for x in (query, key, value)], attn_bias.cu_q
    out, lse = dense_forward(*rows, cu_q, attn_bias.cu_k, scale, -1, 0.0)
    padded = torch.full((len(cu_q) - 1, query.shape[2], (max(attn_bias.lengths[0]) + 31) // 32 * 32), torch.inf)
    for s, (rows_s, _) in enumerate(_sequences(rows[0], cu_q, attn_bias.cu_k)):
        padded[s, :, : rows_s.stop - rows_s.start] = lse[:, rows_s]
    return out[None], padded


def xformers_backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    calls.append("backward")
    assert torch.are_deterministic_algorithms_enabled() and op == "backward op"
    rows = [x[0] for x in (query, key, value)]
    assert lse.shape[2] == (max(attn_bias.lengths[0]) + 31) // 32 * 32 and lse.is_contiguous()
    flat = torch.cat([lse[s, :, :n] for s, n in enumerate(attn_bias.lengths[0])], 1)
    grads = dense_backward(grad[0], *rows, output[0], flat, attn_bias.cu_q, attn_bias.cu_k, scale, -1, 0.0)
    return tuple(d[None] for d in grads)


def install(monkeypatch, name: str) -> None:
    """Make the back end usable on the CPU, in float32 too, with the stand-ins in the place of the library."""
    xformers = varlen._XFormersFunctions(
        xformers_forward, xformers_backward, ("forward op", "backward op"), CausalFromBottomRight
    )  # fmt: skip
    found = {
        "flash-attn": ("_flash_attn", (flash_forward, flash_backward)),
        "varlen": ("_torch_flash", (torch_forward, torch_backward)),
        "xformers": ("_xformers", xformers),
    }
    attribute, functions = found[name]
    monkeypatch.setattr(module, "_found", {})
    monkeypatch.setattr(varlen, attribute, lambda: functions)
    library = type(varlen.LIBRARIES[name])
    monkeypatch.setattr(library, "missing", lambda self: "")
    monkeypatch.setattr(library, "device_types", ("cpu", "cuda"))
    monkeypatch.setattr(library, "dtypes", (*varlen.HALF_DTYPES, torch.float32))
    calls.clear()
