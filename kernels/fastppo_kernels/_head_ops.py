"""The head ops as torch operators: opaque to torch.compile, whose graph then has no loop over chunks; no host synchronisation.

One operator a direction. A chunk of rows goes through the head's product here; what happens to its rows of logits is that
of `_rows` (the torch twin) or of `_triton_head`, as `use_triton` says. Arguments are checked by the public functions;
`softcap` and the like are None for none.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _rows
from ._checks import accumulate_dtype
from ._eager import eager_or
from ._gather import add_rows_, occurrences
from ._products import no_autocast, product
from ._rows import Actions, Statistics, Transform
from .frozen_linear import row_multiple

# Rows of the head whose weight gradient is made at a time: bounds the float32 product before it is added.
_WEIGHT_ROWS = 16384
# Rows of given logits that the torch twin works on at a time: bounds its copies.
_COPIED_ROWS = 1024

# What the Triton PPO kernel sums over the actions of a row: the loss, then these.
METRICS = (
    "count", "ratio_sum", "ratio_max", "clip_fraction_sum", "approx_kl_sum", "policy_loss_sum", "entropy_sum", "kl_ref_sum",
)  # fmt: skip


def _kernels(use_triton: bool) -> ModuleType:
    if not use_triton:
        return _rows
    from . import _triton_head  # imports triton

    return _triton_head


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))


def _padded(hidden_RH: Tensor, dtype: torch.dtype, chunk_rows: int) -> Tensor:
    """Hidden states with rows of 0 after them where the last chunk's products with a weight of this dtype are faster for it."""
    multiple = row_multiple(hidden_RH.device, dtype)
    missing = -len(hidden_RH) % multiple
    if missing == 0 or chunk_rows % multiple or len(hidden_RH) < multiple:
        return hidden_RH
    return torch.nn.functional.pad(hidden_RH, (0, 0, 0, missing))


def _finite(x: Tensor) -> Tensor:
    """x, 0 where it is not finite: for products with gradients, which are 0 in rows that the loss does not look at and NaN in
    all other such rows, so that nothing is hidden."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _new_statistics(like: Tensor, dtype: torch.dtype, actions: int, rows: int) -> Statistics:
    return Statistics(*(like.new_empty(size, dtype=accumulate_dtype(dtype)) for size in (actions, rows, rows, rows)))


def _actions(targets_A: Tensor, rows_A: Tensor | None, rows: int, use_triton: bool) -> Actions:
    sort = rows_A is not None and (use_triton or rows_A.is_cpu)
    return Actions(targets_A, rows_A, *(occurrences(rows_A, rows) if sort and rows_A is not None else ()))


class _Head(NamedTuple):
    """logits = hidden weight^T + lora_scale (hidden lora_A^T) lora_B^T (+ bias, which the kernels of the rows add).

    The product with the weight is in the weight's dtype, the adapter's (a rank wide) in `logits_dtype`. It is added to the
    chunk of logits where that lies: a copy of the weight with B beside it would spare reading and writing the chunk once more,
    and is what a chunked head is there to do without: another tensor of the weight's size.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    lora_A_KH: Tensor | None
    lora_B_VK: Tensor | None
    lora_scale: float
    logits_dtype: torch.dtype

    def rounded_bias(self) -> Tensor | None:
        dtype = self.weight_VH.dtype
        return None if self.bias_V is None else self.bias_V.to(dtype).to(accumulate_dtype(dtype)).contiguous()

    def adapter_input(self, hidden_CH: Tensor) -> Tensor:
        """S = hidden A^T: [C, K] in `logits_dtype`."""
        assert self.lora_A_KH is not None
        hidden_CH = hidden_CH.to(self.weight_VH.dtype).to(self.logits_dtype)
        return product(hidden_CH, self.lora_A_KH.to(self.logits_dtype).t(), self.logits_dtype)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        logits_CV = product(hidden_CH.to(self.weight_VH.dtype), self.weight_VH.t(), self.logits_dtype)
        if self.lora_B_VK is None:
            return logits_CV
        s_CK, b_KV = self.adapter_input(hidden_CH), self.lora_B_VK.to(self.logits_dtype).t()
        with no_autocast(hidden_CH.device):
            if hidden_CH.is_cuda:  # no second tensor of the chunk's size
                return logits_CV.addmm_(s_CK, b_KV, alpha=self.lora_scale)
            return logits_CV.add_((s_CK @ b_KV).mul_(self.lora_scale))  # PEFT's arithmetic, to the bit


def _new_gradients(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of hidden state (in its dtype) and of the head's four (as sums are kept); of size 0 if not needed."""
    hidden_RH = inputs[0]
    assert hidden_RH is not None

    def new(tensor: Tensor | None, need: bool) -> Tensor:
        if tensor is None or not need:
            return hidden_RH.new_empty(0)
        # Sums over chunks stay in float32: added up in bfloat16 they would lose the later chunks.
        return tensor.new_empty(tensor.shape, dtype=tensor.dtype if tensor is hidden_RH else accumulate_dtype(tensor.dtype))

    grad_hidden_RH, *of_head = (new(tensor, need) for tensor, need in zip(inputs, needs, strict=True))
    grad_weight_VH, grad_bias_V, grad_A_KH, grad_B_VK = of_head
    return grad_hidden_RH, grad_weight_VH, grad_bias_V, grad_A_KH, grad_B_VK


class _HeadGradient:
    """Gradients of hidden state, weight, bias and adapter, added up from the gradients of chunks of logits."""

    def __init__(self, hidden_RH: Tensor, head: _Head, needs: list[bool]) -> None:
        self.hidden_RH, self.head, self.needs = hidden_RH, head, needs
        self.all = _new_gradients((hidden_RH, *head[:4]), needs)
        for total in self.all[1:]:
            total.zero_()

    def add(self, chunk: slice, grad_CV: Tensor) -> None:
        need_hidden, need_weight, need_bias, need_A, need_B = self.needs
        grad_hidden_RH, grad_weight_VH, grad_bias_V, grad_A_KH, grad_B_VK = self.all
        head, hidden_CH, dtype = self.head, self.hidden_RH[chunk], grad_CV.dtype
        wide = accumulate_dtype(dtype)
        if need_hidden:
            product_dtype = wide if hidden_CH.dtype == wide else dtype
            grad_hidden_RH[chunk] = product(grad_CV, head.weight_VH, product_dtype)
        if need_weight:
            finite_CH = _finite(hidden_CH.to(dtype))
            for part in _chunks(len(head.weight_VH), _WEIGHT_ROWS):
                grad_weight_VH[part] += product(grad_CV[:, part].t(), finite_CH, wide)
        if need_bias:
            grad_bias_V += grad_CV.sum(0, dtype=wide)
        if head.lora_A_KH is None or head.lora_B_VK is None:
            return
        if need_hidden or need_A:
            ds_CK = product(grad_CV, head.lora_B_VK.to(dtype), wide).mul_(head.lora_scale)
            if need_hidden:
                grad_hidden_RH[chunk] += product(ds_CK, head.lora_A_KH.to(wide), wide)
            if need_A:
                grad_A_KH += product(ds_CK.t(), _finite(hidden_CH.to(dtype).to(wide)), wide)
        if need_B:
            s_CK = _finite(head.adapter_input(hidden_CH)).to(dtype)
            grad_B_VK += product(grad_CV.t(), s_CK, wide).mul_(head.lora_scale)


def _gradient_place(logits_CV: Tensor, dtype: torch.dtype, use_triton: bool) -> Tensor:
    """Where the gradient of a chunk of logits goes, in a dtype that is no wider: over the logits' own memory if it can."""
    if logits_CV.dtype == dtype:
        return logits_CV
    return logits_CV.view(dtype)[:, : logits_CV.shape[1]] if use_triton else logits_CV.new_empty(logits_CV.shape, dtype=dtype)


def _token_logprob(
    logits_RV: Tensor, targets_RJ: Tensor, temperature: float, softcap: float | None, inplace: bool, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob_A, maximum_R, log S_R, entropy_R) of J targets a row, A = R J. `inplace` is for the backward alone."""
    rows = len(logits_RV)
    out = _new_statistics(logits_RV, logits_RV.dtype, targets_RJ.numel(), rows)
    actions = Actions(targets_RJ.view(-1), per_row=targets_RJ.shape[1])
    transform = Transform(1.0, temperature, softcap)
    for chunk, logits_CV in _given(logits_RV, use_triton):
        _kernels(use_triton).statistics(logits_CV, None, chunk.start, actions, transform, out, None)
    return out


token_logprob = torch.library.custom_op("fastppo_kernels::token_logprob", mutates_args=())(_token_logprob)


def _given(logits_RV: Tensor, use_triton: bool) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of logits that may be used up: the Triton kernels read all logits where they lie, the twin copies some."""
    rows = len(logits_RV)
    for chunk in _chunks(rows, max(rows, 1) if use_triton else _COPIED_ROWS):
        if use_triton:
            yield chunk, logits_RV
        else:
            dtype, form = accumulate_dtype(logits_RV.dtype), torch.contiguous_format
            yield chunk, logits_RV[chunk].to(dtype, copy=True, memory_format=form)


@token_logprob.register_fake
def _(logits_RV: Tensor, targets_RJ: Tensor, *_: Any) -> tuple[Tensor, ...]:
    actions = targets_RJ.shape[0] * targets_RJ.shape[1]
    return _new_statistics(logits_RV, logits_RV.dtype, actions, logits_RV.shape[0])


def _token_logprob_gradient(
    logits_RV: Tensor,
    grad_RV: Tensor,
    targets_RJ: Tensor,
    statistics: list[Tensor],
    grad_logprob_A: Tensor,
    grad_entropy_R: Tensor,
    transform: Transform,
    use_triton: bool,
) -> None:
    each = targets_RJ.shape[1]
    actions = Actions(targets_RJ.view(-1), per_row=each)
    # The kernels take entropy gradients by action and add up a row's: its first action has it all.
    grads = grad_logprob_A.contiguous(), torch.nn.functional.pad(grad_entropy_R[:, None], (0, each - 1)).view(-1)
    for chunk, logits_CV in _given(logits_RV, use_triton):
        _kernels(use_triton).gradient(
            logits_CV, grad_RV[chunk], None, chunk.start, actions, transform, Statistics(*statistics), *grads
        )


def _token_logprob_backward(
    logits_RV: Tensor,
    targets_RJ: Tensor,
    statistics: list[Tensor],
    grad_logprob_A: Tensor,
    grad_entropy_R: Tensor,
    temperature: float,
    softcap: float | None,
    use_triton: bool,
) -> Tensor:
    grad_RV = logits_RV.new_empty(logits_RV.shape)
    transform = Transform(1.0, temperature, softcap)
    _token_logprob_gradient(logits_RV, grad_RV, targets_RJ, statistics, grad_logprob_A, grad_entropy_R, transform, use_triton)
    return grad_RV


token_logprob_backward = torch.library.custom_op("fastppo_kernels::token_logprob_backward", mutates_args=())(
    _token_logprob_backward
)


@token_logprob_backward.register_fake
def _(logits_RV: Tensor, *_: Any) -> Tensor:
    return logits_RV.new_empty(logits_RV.shape)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_RV, targets_RJ, ctx.temperature, ctx.softcap, ctx.inplace, ctx.use_triton = inputs
    ctx.mark_non_differentiable(*output[1:3])
    ctx.save_for_backward(logits_RV, targets_RJ, *output)


def _token_gradients(
    ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor], backward: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    logits_RV, targets_RJ, *statistics = saved
    settings = (targets_RJ, statistics, grads[0], grads[3])
    # A compiled graph may not write to what it was given; its memory planner reuses the logits' memory by itself.
    if ctx.inplace and not torch.compiler.is_compiling():
        place_RV = logits_RV.detach()
        _token_logprob_gradient(place_RV, place_RV, *settings, Transform(1.0, ctx.temperature, ctx.softcap), ctx.use_triton)
        torch.autograd.graph.increment_version(logits_RV)  # a second backward raises instead of giving nonsense
        return place_RV, *(None,) * 5
    return backward(logits_RV, *settings, ctx.temperature, ctx.softcap, ctx.use_triton), *(None,) * 5


token_logprob.register_autograd(
    lambda ctx, *grads: _token_gradients(ctx, ctx.saved_tensors, grads, token_logprob_backward), setup_context=_token_setup
)
call_token_logprob = eager_or(
    token_logprob, _token_logprob, _token_setup, partial(_token_gradients, backward=_token_logprob_backward)
)


def _linear_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_A_KH: Tensor | None,
    lora_B_VK: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    lora_scale: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    want_argmax: bool,
    ahead: int,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob_A, entropy_A, argmax_R, maximum_R, log S_R, entropy_R, mean_RH, slope_RH).

    Without a softcap the gradients of a row are, in the hidden state and up to logit_scale / temperature,

        d log p_y = W_y - sum_j p_j W_j = W_y - mean        d H = -sum_j p_j (log p_j + H) W_j = -slope

    W the rows of weight and adapter together: apart from what the loss makes of them, all that takes the logits is known in the
    forward. ahead: 1 makes mean_RH there, 2 slope_RH, too (in the torch twin); backward, for the hidden state alone and at 1
    for the log-probs alone, then has no product left. At 0 they are empty and backward makes the logits again.
    """
    real, hidden_RH = len(hidden_RH), _padded(hidden_RH, weight_VH.dtype, chunk_rows)
    rows = len(hidden_RH)
    head = _Head(weight_VH, bias_V, lora_A_KH, lora_B_VK, lora_scale, logits_dtype)
    bias, actions = head.rounded_bias(), _actions(targets_A, rows_A, rows, use_triton)
    transform = Transform(logit_scale, temperature, softcap)
    out = _new_statistics(hidden_RH, weight_VH.dtype, len(targets_A), rows)
    argmax_R = targets_A.new_empty(rows if want_argmax else 0)
    mean, slope = (_HeadGradient(hidden_RH, head, [ahead >= least, *[False] * 4]) for least in (1, 2))
    for chunk in _chunks(rows, chunk_rows):
        softmax = _kernels(use_triton).statistics(
            head.logits(hidden_RH[chunk]), bias, chunk.start, actions, transform, out, argmax_R if want_argmax else None
        )
        if ahead:
            mean.add(chunk, softmax.weight_RV)
            mean.all[0][chunk] /= softmax.total_R[:, None]
        if ahead == 2:
            shift_C1 = (out.entropy_R - out.log_sum_R)[chunk, None]
            slope.add(chunk, softmax.product_RV.addcmul_(softmax.weight_RV, shift_C1))
            slope.all[0][chunk] /= softmax.total_R[:, None]
        del softmax  # before the next chunk is made
    entropy_A = out.entropy_R[:real].clone() if rows_A is None else out.entropy_R[rows_A]
    maximum_R, log_sum_R, entropy_R = (tensor[:real] for tensor in out[1:])
    return out.logprob_A, entropy_A, argmax_R[:real], maximum_R, log_sum_R, entropy_R, mean.all[0][:real], slope.all[0][:real]


linear_logprob = torch.library.custom_op("fastppo_kernels::linear_logprob", mutates_args=())(_linear_logprob)


@linear_logprob.register_fake
def _(hidden_RH: Tensor, weight_VH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    targets_A, (want_argmax, ahead, _) = others[3], others[-3:]
    rows, actions = hidden_RH.shape[0], targets_A.shape[0]
    logprob_A, *of_rows = _new_statistics(hidden_RH, weight_VH.dtype, actions, rows)
    argmax_R = targets_A.new_empty(rows if want_argmax else 0)
    made = (hidden_RH.new_empty(hidden_RH.shape if ahead >= least else 0) for least in (1, 2))
    return logprob_A, torch.empty_like(logprob_A), argmax_R, *of_rows, *made


def _hidden_gradient(
    out_RH: Tensor,
    head: _Head,
    targets_A: Tensor,
    rows_A: Tensor | None,
    mean_RH: Tensor,
    slope_RH: Tensor,
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor,
) -> None:
    """Fill `out_RH` from what the forward made ahead, see `_linear_logprob`. A row without gradient gets exactly 0."""

    def of_rows(grad_A: Tensor) -> Tensor:
        return (grad_A if rows_A is None else _rows.add_at_(grad_A.new_zeros(len(out_RH)), rows_A, grad_A))[:, None]

    logprob_R1 = of_rows(grad_logprob_A)
    ignored_R1 = logprob_R1 == 0
    torch.mul(mean_RH, -logprob_R1, out=out_RH)
    if slope_RH.numel():
        entropy_R1 = of_rows(grad_entropy_A)
        ignored_R1 &= entropy_R1 == 0
        out_RH.addcmul_(slope_RH, entropy_R1, value=-1)
    out_RH.masked_fill_(ignored_R1, 0.0)
    target_AH = head.weight_VH.index_select(0, targets_A)
    if head.lora_A_KH is not None and head.lora_B_VK is not None:
        lora_A_KH, lora_B_AK = (x.to(target_AH.dtype) for x in (head.lora_A_KH, head.lora_B_VK.index_select(0, targets_A)))
        target_AH.add_(product(lora_B_AK, lora_A_KH, target_AH.dtype), alpha=head.lora_scale)
    target_AH.mul_(grad_logprob_A[:, None])
    if rows_A is None:
        out_RH.add_(target_AH)
    else:
        add_rows_(out_RH, rows_A, target_AH)


def _linear_logprob_backward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_A_KH: Tensor | None,
    lora_B_VK: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    lora_scale: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    ahead: int,
    use_triton: bool,
    saved: list[Tensor],
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden state, weight, bias and adapter, see `_new_gradients`; `saved`: the statistics, mean and slope."""
    head = _Head(weight_VH, bias_V, lora_A_KH, lora_B_VK, lora_scale, logits_dtype)
    *statistics, mean_RH, slope_RH = saved
    if ahead:
        gradients = _new_gradients((hidden_RH, *head[:4]), needs)
        grads = grad_logprob_A * (logit_scale / temperature), grad_entropy_A * (logit_scale / temperature)
        _hidden_gradient(gradients[0], head, targets_A, rows_A, mean_RH, slope_RH, *grads)
        return gradients
    bias, actions = head.rounded_bias(), _actions(targets_A, rows_A, len(hidden_RH), use_triton)
    transform, of = Transform(logit_scale, temperature, softcap), Statistics(*statistics)
    gradient = _HeadGradient(hidden_RH, head, needs)
    grads = grad_logprob_A.contiguous(), grad_entropy_A.contiguous()
    for chunk in _chunks(len(hidden_RH), chunk_rows):
        logits_CV = head.logits(hidden_RH[chunk])
        grad_CV = _gradient_place(logits_CV, weight_VH.dtype, use_triton)
        _kernels(use_triton).gradient(logits_CV, grad_CV, bias, chunk.start, actions, transform, of, *grads)
        gradient.add(chunk, grad_CV)
        del logits_CV, grad_CV  # before the next chunk is made
    return gradient.all


linear_logprob_backward = torch.library.custom_op("fastppo_kernels::linear_logprob_backward", mutates_args=())(
    _linear_logprob_backward
)


@linear_logprob_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return _new_gradients(inputs[:5], inputs[-1])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *settings, _, ahead, use_triton = inputs[7:]
    ctx.settings = (*settings, ahead, use_triton)
    logprob_A, _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*inputs[:7], logprob_A, *others[1:])


def _linear_gradients(
    ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor], backward: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    inputs, made, needs = saved[:7], list(saved[7:]), list(ctx.needs_input_grad[:5])
    gradients = backward(*inputs, *ctx.settings, made, grads[0], grads[1], needs)
    of_inputs = zip(gradients, inputs, needs, strict=False)
    return *(gradient.to(x.dtype) if need else None for gradient, x, need in of_inputs), *(None,) * 11


linear_logprob.register_autograd(
    lambda ctx, *grads: _linear_gradients(ctx, ctx.saved_tensors, grads, linear_logprob_backward), setup_context=_linear_setup
)
call_linear_logprob = eager_or(
    linear_logprob, _linear_logprob, _linear_setup, partial(_linear_gradients, backward=_linear_logprob_backward)
)


@torch.library.custom_op("fastppo_kernels::linear_ppo_loss", mutates_args=())
def linear_ppo_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_A_KH: Tensor | None,
    lora_B_VK: Tensor | None,
    targets_A: Tensor,
    rows_A: Tensor | None,
    lora_scale: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    logits_dtype: torch.dtype,
    old_logprob_A: Tensor,
    advantages_A: Tensor,
    mask_A: Tensor,
    ref_logprob_A: Tensor | None,
    denominator: Tensor,
    settings: list[float],
    kl_kind: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Triton form alone; `settings` are clip_low, clip_high, dual_clip (inf for none), entropy_coef and kl_coef.

    Returns:
        (loss, metrics, logprob_A, entropy_A, gradients as in `_new_gradients`, what these are to be multiplied by).
    """
    rows = len(hidden_RH)
    head = _Head(weight_VH, bias_V, lora_A_KH, lora_B_VK, lora_scale, logits_dtype)
    bias, actions = head.rounded_bias(), _actions(targets_A, rows_A, rows, True)
    transform = Transform(logit_scale, temperature, softcap)
    gradient = _HeadGradient(hidden_RH, head, needs)
    of_actions = [hidden_RH.new_empty(len(targets_A), dtype=torch.float32) for _ in range(3)]
    metrics_RM = hidden_RH.new_empty(rows, 1 + len(METRICS), dtype=torch.float32)
    inverse = denominator.reciprocal()
    # Divided by thousands of tokens, most of a row's gradient would be below what float16 can hold: that comes afterwards.
    late = weight_VH.dtype == torch.float16
    inside, after = (torch.ones_like(inverse), inverse) if late else (inverse, torch.ones_like(inverse))
    constants = old_logprob_A, advantages_A, mask_A, ref_logprob_A, inside
    for chunk in _chunks(rows, chunk_rows):
        logits_CV = head.logits(hidden_RH[chunk])
        grad_CV = _gradient_place(logits_CV, weight_VH.dtype, True)
        _kernels(True).ppo(
            logits_CV, grad_CV if any(needs) else None, bias, chunk.start, actions, transform, constants, settings, kl_kind,
            of_actions, metrics_RM,
        )  # fmt: skip
        gradient.add(chunk, grad_CV)
        del logits_CV, grad_CV
    metrics_M = metrics_RM.sum(0, dtype=torch.float64)
    largest = METRICS.index("ratio_max") + 1
    if rows:  # amax passes NaN on, but a kernel's maximum of a row does not: the row's sum of ratios does
        ratio_sum_R, ratio_max_R = metrics_RM[:, largest - 1], metrics_RM[:, largest]
        metrics_M[largest] = torch.where(ratio_sum_R.isnan(), ratio_sum_R, ratio_max_R).amax()
    loss = (metrics_M[0] / denominator).float()
    return loss, metrics_M[1:].clone(), of_actions[0], of_actions[1], *gradient.all, after


@linear_ppo_loss.register_fake
def _(hidden_RH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden_RH.new_empty(shape, dtype=dtype)

    actions = others[4].shape[0]
    gradients = _new_gradients((hidden_RH, *others[:4]), others[-1])
    return new(), new(len(METRICS), dtype=torch.float64), new(actions), new(actions), *gradients, new()


def _ppo_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for each output that has no gradient, one of them [T, H]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:5]]
    ctx.save_for_backward(*output[4:])


def _ppo_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *gradients, after = ctx.saved_tensors
    scale = (grad_loss * after).view(1)  # one dimension: of none it would be rounded to the gradient's dtype first
    scaled: list[Tensor | None] = [None] * 21
    for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            scaled[i] = torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    return tuple(scaled)


linear_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)
