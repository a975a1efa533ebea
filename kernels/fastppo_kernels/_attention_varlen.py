"""Attention through the variable-length kernels of libraries: flash-attn, torch's own, xformers.

Segment s of a packed tree is a "sequence" with its own queries and, as keys, its gathered root path; the causal mask of these
kernels is aligned at the bottom right, so this is exact. Each library is used through its forward and backward functions
rather than its autograd function, inside two operators of our own: so the gathered keys and values, which repeat every prefix
once a segment, are gathered again in backward instead of kept, the backward can be made deterministic, and torch.compile
sees one operator without a break.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._gather import Occurrences, occurrences, sum_rows
from ._products import no_autocast

HALF_DTYPES = (torch.bfloat16, torch.float16)
# The kernels read rows of 16 bytes; other head sizes are filled up with zeros, which changes nothing.
_DIM_MULTIPLE = 8


class Numbers(NamedTuple):
    """What a kernel is asked beside tensors. max_q, max_k: upper bounds. window, softcap: None for none."""

    max_q: int
    max_k: int
    scale: float
    window: int | None
    softcap: float | None


class Library(ABC):
    """The forward and backward of one library, on q [T, H, D] and gathered k, v [N, Hkv, D] with equal D.

    cu_q, cu_k come as the caller has them, int32 or int64: what is kept of a tree is found by them.
    """

    name: ClassVar[str]
    device_types: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALF_DTYPES
    largest_dim: ClassVar[int] = 256
    windows: ClassVar[bool] = True
    softcaps: ClassVar[bool] = False

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot be used in this installation; empty if it can."""

    @abstractmethod
    def lse_shape(self, q: Tensor, cu_q: Tensor, max_q: int) -> tuple[int, ...]:
        """Of the logarithms of the softmax's denominators, float32, that forward hands to backward."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers) -> tuple[Tensor, Tensor]:
        """(out, lse)."""

    @abstractmethod
    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dq, dk, dv) of the gathered rows, the same in every run."""

    def refuses(self, q: Tensor, v: Tensor, window: int | None, softcap: float | None) -> str:
        """Why it cannot do this; empty if it can."""
        if q.device.type not in self.device_types:
            return f"needs {' or '.join(self.device_types)} tensors, got {q.device.type}"
        if q.dtype not in self.dtypes:
            return f"has no kernel for {str(q.dtype).removeprefix('torch.')}"
        if max(q.shape[2], v.shape[2]) > self.largest_dim:
            return f"has no kernel for a head size over {self.largest_dim}, got {max(q.shape[2], v.shape[2])}"
        if window is not None and not self.windows:
            return "has no kernel for a window"
        if softcap is not None and not self.softcaps:
            return "has no kernel for a softcap"
        return ""


class FlashAttn(Library):
    """https://github.com/Dao-AILab/flash-attention, 2.7 or newer (FlashAttention 2)."""

    name = "flash-attn"
    softcaps = True

    def missing(self) -> str:
        found = _flash_attn()
        return found if isinstance(found, str) else _no_flash_hardware()

    def lse_shape(self, q: Tensor, cu_q: Tensor, max_q: int) -> tuple[int, ...]:
        return q.shape[1], q.shape[0]

    def _options(self, ask: Numbers) -> dict[str, Any]:
        return {
            "dropout_p": 0.0, "softmax_scale": ask.scale, "causal": True, "window_size_left": _left(ask),
            "window_size_right": 0, "softcap": ask.softcap or 0.0, "alibi_slopes": None,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers) -> tuple[Tensor, Tensor]:
        run, _ = _flash_attn()
        out, lse, *_ = run(q, k, v, *_int32(cu_q, cu_k), _queries(ask), ask.max_k, **self._options(ask))
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _, run = _flash_attn()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        bounds = _queries(ask), ask.max_k
        run(d_out, q, k, v, out, lse, dq, dk, dv, *_int32(cu_q, cu_k), *bounds, **self._options(ask), deterministic=True)
        return dq, dk, dv


class TorchVarlen(Library):
    """The operators behind `torch.nn.attention.varlen` (FlashAttention 2 in torch; 3 or 4 where those are activated).

    `varlen_attn` itself changed its arguments with nearly every release (is_causal, then window_size, then enable_gqa) and
    has no backward to call; the operators under it kept theirs. They take fewer key heads than query heads as they are.
    """

    name = "varlen"

    def missing(self) -> str:
        found = _torch_flash()
        return found if isinstance(found, str) else _no_flash_hardware()

    def lse_shape(self, q: Tensor, cu_q: Tensor, max_q: int) -> tuple[int, ...]:
        return q.shape[1], q.shape[0]

    def _options(self, ask: Numbers) -> dict[str, Any]:
        return {"scale": ask.scale, "window_size_left": _left(ask), "window_size_right": 0}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers) -> tuple[Tensor, Tensor]:
        run, _ = _torch_flash()
        numbers = _queries(ask), ask.max_k, 0.0, ask.window is None, False
        out, lse, *_ = run(q, k, v, *_int32(cu_q, cu_k), *numbers, **self._options(ask))
        return out, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        _, run = _torch_flash()
        # State of the random numbers of dropout, of which there is none.
        state, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
        numbers = _queries(ask), ask.max_k, 0.0, ask.window is None
        with deterministic():
            return run(d_out, q, k, v, out, lse, *_int32(cu_q, cu_k), *numbers, state, unused, **self._options(ask))


class XFormers(Library):
    """https://github.com/facebookresearch/xformers: its CUTLASS kernels, which also take float32 and large heads.

    Its FlashAttention operators are the ones above and are not deterministic through it; its CUTLASS backward is (with torch's
    switch), but needs as many key heads as query heads and knows no windows aligned at the bottom right.
    """

    name = "xformers"
    dtypes = (*HALF_DTYPES, torch.float32)
    largest_dim = 65536
    windows = False

    def __init__(self) -> None:
        self._newest: tuple[Tensor, Tensor, Any, int] | None = None

    def missing(self) -> str:
        found = _xformers()
        return found if isinstance(found, str) else _no_flash_hardware()

    def lse_shape(self, q: Tensor, cu_q: Tensor, max_q: int) -> tuple[int, ...]:
        return cu_q.shape[0] - 1, q.shape[1], _up(max_q, 32)

    def _mask(self, cu_q: Tensor, cu_k: Tensor) -> tuple[Any, int]:
        """(mask, its own max_q rounded up as in the denominators).

        It wants lengths on the host: looked up once a tree, for all layers and both directions.
        """
        if self._newest is None or self._newest[0] is not cu_q or self._newest[1] is not cu_k:
            lengths = [cu.diff().tolist() for cu in (cu_q, cu_k)]
            mask = _xformers().mask.from_seqlens(*lengths, device=cu_q.device)
            self._newest = cu_q, cu_k, mask, _up(max(lengths[0]), 32)
        return self._newest[2:]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers) -> tuple[Tensor, Tensor]:
        found, group = _xformers(), q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        mask, width = self._mask(cu_q, cu_k)
        out, lse = found.forward(q[None], k[None], v[None], mask, scale=ask.scale, op=found.op[0])
        return out[0], torch.nn.functional.pad(lse, (0, _up(ask.max_q, 32) - width))

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, ask: Numbers
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found, kv_heads = _xformers(), k.shape[1]
        group = q.shape[1] // kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        rows, (mask, width) = (x[None] for x in (q, k, v)), self._mask(cu_q, cu_k)
        lse = lse[..., :width].contiguous()
        with deterministic():
            dq, dk, dv = found.backward(d_out[None], out[None], lse, *rows, mask, scale=ask.scale, op=found.op[1])
        dk, dv = (x[0].unflatten(1, (kv_heads, group)).sum(2, dtype=torch.float32) for x in (dk, dv))
        return dq[0], dk, dv


LIBRARIES: dict[str, Library] = {library.name: library for library in (FlashAttn(), TorchVarlen(), XFormers())}


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _left(ask: Numbers) -> int:
    """How many keys before its own a query sees, as the kernels want it."""
    return -1 if ask.window is None else ask.window - 1


def _int32(*cumulative: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.to(torch.int32) for each in cumulative)


def _queries(ask: Numbers) -> int:
    """At least 2: for one query a sequence the kernels regroup heads and rely on every sequence having exactly one."""
    return max(ask.max_q, 2)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's kernels without atomics inside; the switch is as before afterwards.

    By the function under `torch.use_deterministic_algorithms`, which also writes to Inductor's settings, and by that makes
    what is compiled afterwards be compiled anew.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill = options.fill_uninitialized_memory
    # Filling new tensors first, which comes with the switch, would only cost time.
    options.fill_uninitialized_memory = False
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fill


def _no_flash_hardware() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return "" if torch.cuda.get_device_capability() >= (8, 0) else "needs a GPU of compute capability 8.0 or newer"


def _lacks(function: Callable, wanted: set[str]) -> set[str]:
    return wanted - inspect.signature(getattr(function, "_init_fn", function)).parameters.keys()


_FLASH_ARGUMENTS = {
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal",
    "window_size_left", "window_size_right", "softcap", "alibi_slopes",
}  # fmt: skip


@cache
def _flash_attn() -> Any:
    """(forward, backward), or why there are none."""
    try:
        interface = import_module("flash_attn.flash_attn_interface")
        functions = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward
    except ImportError as error:
        return f"flash-attn is not installed ({error})"
    except AttributeError as error:
        return f"this flash-attn is not known here ({error})"
    except Exception as error:  # a build for another torch or CUDA may fail in any way
        return f"flash-attn cannot be imported ({type(error).__name__}: {error})"
    lacking = _lacks(functions[0], _FLASH_ARGUMENTS) | _lacks(functions[1], _FLASH_ARGUMENTS | {"deterministic", "dq"})
    return f"this flash-attn is not known here (no {', '.join(sorted(lacking))})" if lacking else functions


@cache
def _torch_flash() -> Any:
    """(forward, backward), or why there are none."""
    try:
        functions = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
        for function, positional in zip(functions, (10, 14), strict=True):
            arguments = function.default._schema.arguments
            names = {argument.name for argument in arguments if argument.kwarg_only}
            if sum(not argument.kwarg_only for argument in arguments) != positional:
                return f"this torch is not known here ({function.default._schema})"
            if not {"scale", "window_size_left", "window_size_right"} <= names:
                return f"this torch is not known here ({function.default._schema})"
    except AttributeError as error:
        return f"this torch is not known here ({error})"
    return functions


class _XFormersFunctions(NamedTuple):
    forward: Callable
    backward: Callable
    op: tuple[Any, Any]
    mask: Any


@cache
def _xformers() -> Any:
    """An `_XFormersFunctions`, or why there is none."""
    try:
        ops, bias = import_module("xformers.ops"), import_module("xformers.ops.fmha.attn_bias")
        return _XFormersFunctions(
            ops.memory_efficient_attention_forward_requires_grad, ops.memory_efficient_attention_backward,
            ops.MemoryEfficientAttentionCutlassOp, bias.BlockDiagonalCausalFromBottomRightMask,
        )  # fmt: skip
    except ImportError as error:
        return f"xformers is not installed ({error})"
    except AttributeError as error:
        return f"this xformers is not known here ({error})"
    except Exception as error:  # a build for another torch or CUDA may fail in any way
        return f"xformers cannot be imported ({type(error).__name__}: {error})"


def _width(q: Tensor, v: Tensor) -> int:
    return _up(max(q.shape[2], v.shape[2]), _DIM_MULTIPLE)


def _filled(x: Tensor, width: int) -> Tensor:
    return x if x.shape[2] == width else torch.nn.functional.pad(x, (0, width - x.shape[2]))


def _shares_nothing(k: Tensor, kv_index: Tensor) -> bool:
    """Whether every path is its segment's own rows: it ends with those, so there are no more entries than rows only then, and
    they are the rows in order. (Or it is one segment, after a prefix of the past.)"""
    return kv_index.shape[0] == k.shape[0]


def _gathered(q: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = _width(q, v)
    if _shares_nothing(k, kv_index):
        k, v = (_filled(x, width).contiguous() for x in (k, v))
    else:
        k, v = (_filled(x.index_select(0, kv_index), width) for x in (k, v))
    return _filled(q, width).contiguous(), k, v


@torch.library.custom_op("fastppo_kernels::varlen_attention", mutates_args=())
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    order_N: Tensor | None,
    start_R1: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    library: str,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, Dv], log of the denominators); order_N and start_R1 are ``kv_index``'s ``Occurrences`` or None."""
    chosen = LIBRARIES[library]
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(chosen.lse_shape(q, cu_q, max_q), dtype=torch.float32)
    ask = Numbers(max_q, max_k, scale, window, softcap)
    with no_autocast(q.device):
        out, lse = chosen.forward(*_gathered(q, k, v, kv_index), cu_q, cu_k, ask)
    return out[..., : v.shape[2]].contiguous(), lse


@varlen_attention.register_fake
def _(q, k, v, cu_q, cu_k, kv_index, order_N, start_R1, max_q, max_k, scale, window, softcap, library):
    lse_shape = LIBRARIES[library].lse_shape(q, cu_q, max_q)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("fastppo_kernels::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    kv_index: Tensor,
    order_N: Tensor | None,
    start_R1: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[0] == 0:
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    rows = _gathered(q, k, v, kv_index)
    d_out, out = (_filled(x, _width(q, v)).contiguous() for x in (d_out, out))
    ask = Numbers(max_q, max_k, scale, window, softcap)
    with no_autocast(q.device):
        dq, dk, dv = LIBRARIES[library].backward(d_out, *rows, out, lse, cu_q, cu_k, ask)
    if _shares_nothing(k, kv_index):
        return *(d[..., : x.shape[2]].contiguous() for d, x in ((dq, q), (dk, k), (dv, v))),  # type: ignore[return-value]
    if order_N is None or start_R1 is None:
        where = occurrences(kv_index, k.shape[0])
    else:
        where = Occurrences(order_N, start_R1)
    dk, dv = (sum_rows(d[..., : x.shape[2]], where, x.dtype) for d, x in ((dk, k), (dv, v)))
    return dq[..., : q.shape[2]].contiguous(), dk, dv


@_varlen_attention_backward.register_fake
def _(d_out, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, kv_index, order_N, start_R1, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, kv_index, order_N, start_R1)


def _backward(ctx, d_out: Tensor, d_lse: Tensor):
    return *_varlen_attention_backward(d_out, *ctx.saved_tensors, *ctx.numbers), *(11 * [None])


varlen_attention.register_autograd(_backward, setup_context=_setup_context)
