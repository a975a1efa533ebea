"""LoRA inside the base GEMM: weights, A and B in one buffer, bordered so that one product gives base and adapter together.

    y = [S | x] [B | W]^T        dX = [dY | dS] [W ; A]

For the projections of one input (first, others) the buffers are

    weight, [N + L, left + K + right]                     activation, [M, left + K + right]
      [ B_0 |  W_0  |   -   ]                               [ S_0 | X | S_1 S_2 .. ]
      [  -  |  W_1  | B_1   ]                             gradient, [M, N + L]
      [  -  |  W_2  |   B_2 ]                               [ dY_0 | dY_1 | dY_2 .. | dS ]
      [  -  |   A   |   -   ]   L = left + right rows

The first projection multiplies the columns [0, left + K), the others [left, left + K + right), where their B's are blocks on
a diagonal; so no product has zeros in it but those blocks (k and v beside q). The corners marked - are never read. The
adapter's part is added up in the GEMM's own float32 sums: y is neither read again nor rounded twice.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import accumulate_dtype, check_float, check_integer, check_shape
from ._products import masked, product
from .lora_linear import LoRAProjection, check_projection, check_projections, flatten_mask

_MOST = 4

# The attribute of a buffer's A or B that counts the steps that torch optimizers have made with it: some write to a parameter
# without a trace in its version counter.
_STEPS = "_fastppo_kernels_steps"


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, _STEPS):
                setattr(parameter, _STEPS, getattr(parameter, _STEPS) + 1)


@cache
def _watch_optimizers() -> None:
    """Count from now on, once a process: without a buffer, no optimizer is any slower."""
    register_optimizer_step_post_hook(_count_step)


def _steps(parameter: Tensor) -> int:
    if not hasattr(parameter, _STEPS):
        setattr(parameter, _STEPS, 0)
    return getattr(parameter, _STEPS)


def _ranks_of(projections: Sequence[LoRAProjection]) -> list[int]:
    return [0 if projection.lora_A is None else projection.lora_A.shape[0] for projection in projections]


class _Run(NamedTuple):
    """Columns of S, counted over left and right, that one product makes: those of neighbours of one side with one scale.

    rows: of the outputs, those of the same projections. side: 0 left, 1 right.
    """

    side: int
    columns: slice
    rows: slice
    scale: float


class LoRAWeightBuffer:
    """Up to 4 projections of one input with their adapters, in one buffer.

    Args:
        projections: each with a weight [N, K] that is frozen. Weights are copied: point the model's parameter at
            `weight_view` afterwards, and there is one copy, until something gives that parameter memory of its own, as
            `module.bfloat16()` and `module.to(...)` do where they change it. Without any adapter there are no borders: what is
            left is one product for dX.
        align: `left` and `right` are multiples of this; 8 keeps rows on 16 bytes in half precision, 64 on whole K tiles.
        masked: whether calls may have a mask. Without, a refresh is two copies an adapter, and S and dS are written to their
            columns by the products that make them, with the scale as a factor of those.

    Attributes:
        weight: the buffer, [N + left + right, left + K + right], in the dtype of the weights. N is the sum over projections.
        left, right: columns of S before and after X.
        width: left + K + right. outputs: N.
        column_scale: [left + right], what column c of S and dS is multiplied by. float32 (float64 for float64 weights).

    A and B stay the parameters that are trained, in their own dtype. `refresh` copies them in after an optimizer step; calling
    the buffer does that by itself, but not while torch.compile traces, in what it has compiled, or in a CUDA graph. `use`
    copies in other adapters of the same ranks: one buffer serves all adapters of a model, one after the other.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or a weight or bias that requires a gradient.
    """

    def __init__(self, projections: Sequence[LoRAProjection], *, align: int = 8, masked: bool = True) -> None:
        check_integer("align", align, at_least=1)
        check_projections(projections)
        if not 1 <= len(projections) <= _MOST:
            raise ValueError(f"projections must be 1 to {_MOST}, got {len(projections)}")
        first = projections[0].weight
        check_float("projections[0].weight", first)
        if first.dim() != 2 or first.shape[1] == 0:
            raise ValueError(f"projections[0].weight must have shape [N, K], K >= 1, got {list(first.shape)}")
        for i, projection in enumerate(projections):
            check_projection(f"projections[{i}].", projection, first, False, like_name="projections[0].weight")
            for name in ("weight", "bias"):
                part = getattr(projection, name)
                if part is not None and part.requires_grad:
                    raise ValueError(f"projections[{i}].{name} must be frozen, got one that requires a gradient")
        ranks = _ranks_of(projections)
        self.projections, self.masked = tuple(projections), masked
        self.dtype, self.device = first.dtype, first.device
        self.left, self.right = (-(-rank // align) * align for rank in (ranks[0], sum(ranks[1:])))
        self.inputs = first.shape[1]
        self.width = self.left + self.inputs + self.right
        self._middle = slice(self.left, self.left + self.inputs)
        self._ranks = ranks
        # Columns of S of each projection, counted over left and right.
        starts = [0] + [self.left + sum(ranks[1:i]) for i in range(1, len(ranks))]
        self._columns = [slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True)]
        ends = [0]
        for projection in projections:
            ends.append(ends[-1] + projection.weight.shape[0])
        self._rows = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        self.outputs = ends[-1]
        with torch.no_grad():
            self.weight = first.new_empty(self.outputs + self.left + self.right, self.width)
            self.lora_A_stacked.zero_()
            self.border(0).zero_()
            self.border(1).zero_()
            for i, projection in enumerate(projections):
                self.weight_view(i).copy_(projection.weight)
            self.column_scale = torch.zeros(self.left + self.right, dtype=accumulate_dtype(self.dtype), device=self.device)
            self._biases = self._joined_bias(projections[:1]), self._joined_bias(projections[1:])
        self._addresses = [self.weight_view(i).data_ptr() for i in range(len(projections))]
        self._groups: dict[int, Tensor] = {}
        self._runs: list[_Run] = []
        self._scales: list[float | None] = [None] * len(projections)
        self._seen: list[tuple[int, ...] | None] = [None] * len(projections)
        # Keeps the memory that `_seen` has the address of, so that no other can come to have that address.
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * len(projections)
        self.refresh()

    def _joined_bias(self, projections: Sequence[LoRAProjection]) -> Tensor | None:
        if all(projection.bias is None for projection in projections):
            return None
        return torch.cat(
            [self.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias.to(self.dtype) for each in projections]
        )

    def weight_view(self, i: int) -> Tensor:
        """W_i in the buffer, [N_i, K], rows `width` apart; for a model's parameter to be pointed at."""
        return self.weight[self._rows[i], self._middle]

    @property
    def lora_A_stacked(self) -> Tensor:
        """[left + right, K], row c makes column c of S; rows `width` apart."""
        return self.weight[self.outputs :, self._middle]

    def border(self, side: int) -> Tensor:
        """Side 0: B of the first projection, [N_0, left]. Side 1: of the others, [N - N_0, right], blocks on a diagonal."""
        first = self._rows[0].stop
        if side == 0:
            return self.weight[:first, : self.left]
        return self.weight[first : self.outputs, self.left + self.inputs :]

    def column_group(self, groups: int) -> Tensor:
        """[left + right] int32: the column of a mask [M, groups] that a column of S is multiplied by."""
        if groups not in self._groups:
            group = torch.zeros(self.left + self.right, dtype=torch.int32, device=self.device)
            for columns in self._columns:
                rank = columns.stop - columns.start
                if rank % groups:
                    raise ValueError(f"groups must divide every rank, got {groups} and a rank of {rank}")
                group[columns] = torch.arange(rank, dtype=torch.int32, device=self.device) // max(rank // groups, 1)
            self._groups[groups] = group
        return self._groups[groups]

    def refresh(self, force: bool = False) -> bool:
        """Copy in the adapters that have changed since; whether any had.

        Looks on the host, at addresses, version counters, and whether a torch optimizer that was given A or B has made a step.
        What else writes to `parameter.data` or to raw memory goes unseen, such as weights copied back from an optimizer's own
        float32 ones: `force` copies regardless. A new Parameter that takes the place of A or B in a model is never seen:
        `projections` holds the old one.

        Where there may be masks, entries that are not finite are copied as 0, and the adapter's `column_scale` becomes NaN
        instead: rows that use it see it, rows whose mask is 0 do not.
        """
        _watch_optimizers()
        changed = False
        for i, (_, lora_A, lora_B, scale, _) in enumerate(self.projections):
            if lora_A is None or lora_B is None:
                continue
            addresses, versions = (lora_A.data_ptr(), lora_B.data_ptr()), (lora_A._version, lora_B._version)
            seen = (*addresses, *versions, _steps(lora_A), _steps(lora_B))
            if seen != self._seen[i] or scale != self._scales[i] or force:
                self._seen[i] = None  # should the copy fail
                self._copy_in(i, lora_A, lora_B, scale)
                self._seen[i], self._kept[i], changed = seen, (lora_A.detach(), lora_B.detach()), True
        if not self._runs and not self.masked:
            self._runs = self._find_runs()
        return changed

    def forget(self) -> None:
        """Take for unknown what is held: the next `refresh` copies. For whoever writes here unseen, as a CUDA graph does in
        which a `refresh` was captured; and before one is, so that its copies are."""
        self._seen = [None] * len(self._seen)

    @torch.no_grad()
    def _copy_in(self, i: int, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
        columns, rows = self._columns[i], self._rows[i]
        shift = min(i, 1) * self.inputs
        low_A, low_B = self.lora_A_stacked[columns], self.weight[rows, columns.start + shift : columns.stop + shift]
        low_A.copy_(lora_A)
        low_B.copy_(lora_B)
        if scale != self._scales[i] or self.masked:
            self._scales[i], self._runs = scale, []
            self.column_scale[columns] = scale
        if self.masked:
            finite_R = low_A.isfinite().all(1) & low_B.isfinite().all(0)
            low_A.nan_to_num_(0.0, 0.0, 0.0)
            low_B.nan_to_num_(0.0, 0.0, 0.0)
            self.column_scale[columns] = self.column_scale[columns].masked_fill(~finite_R, torch.nan)

    def _find_runs(self) -> list[_Run]:
        runs: list[_Run] = []
        for i, scale in enumerate(self._scales):
            if scale is None:
                continue
            side, rows, columns = min(i, 1), self._rows[i], self._columns[i]
            if runs and (runs[-1].side, runs[-1].scale) == (side, scale):
                last = runs.pop()
                rows, columns = slice(last.rows.start, rows.stop), slice(last.columns.start, columns.stop)
            runs.append(_Run(side, columns, rows, scale))
        for side, end in ((0, self.left), (1, self.left + self.right)):  # what only rounds up is written, too: as zeros
            of_side = [place for place, run in enumerate(runs) if run.side == side]
            if of_side:
                last = runs[of_side[-1]]
                runs[of_side[-1]] = last._replace(columns=slice(last.columns.start, end))
        return runs

    def holds(self, projections: Sequence[LoRAProjection]) -> bool:
        """Whether these are the weights and biases of this buffer, with adapters of the ranks that it has room for."""
        if _ranks_of(projections) != self._ranks:
            return False
        for projection, own, address in zip(projections, self.projections, self._addresses, strict=True):
            if projection.weight.data_ptr() != address or projection.bias is not own.bias:
                return False
        return True

    def use(self, projections: Sequence[LoRAProjection]) -> bool:
        """Hold these adapters from now on, copied in where they are others or have changed (`refresh`); whether any was.

        Raises:
            ValueError: not the weights and biases of this buffer, or other ranks than it was made with.
        """
        if not self.holds(projections):
            raise ValueError(f"projections must have this buffer's weights and biases, and ranks {self._ranks}")
        return self.take(projections)

    def take(self, projections: Sequence[LoRAProjection]) -> bool:
        """`use` of what it is known to hold."""
        self.projections = tuple(projections)
        return self.refresh()

    def new_input(self, rows: int) -> Tensor:
        """An activation buffer [rows, width], not yet written: a producer or the caller writes X to `x_of` it."""
        return self.weight.new_empty(rows, self.width)

    def new_grad(self, rows: int) -> Tensor:
        """A gradient buffer [rows, N + left + right], not yet written."""
        return self.weight.new_empty(rows, self.outputs + self.left + self.right)

    def x_of(self, x_buffer: Tensor) -> Tensor:
        """X in the activation buffer, [M, K]."""
        return x_buffer[:, self._middle]

    def grads_of(self, grad_buffer: Tensor) -> tuple[Tensor, ...]:
        """dY of each projection in the gradient buffer, [M, N_i]."""
        return tuple(grad_buffer[:, rows] for rows in self._rows)

    def s_of(self, x_buffer: Tensor) -> Tensor:
        """S in the activation buffer, copied: [M, left + right]."""
        left, right = x_buffer[:, : self.left], x_buffer[:, self.left + self.inputs :]
        return torch.cat((left, right), 1) if self.left and self.right else (left if self.left else right).clone()

    def _rows_of(self, mask: Tensor | None, rows: Tensor) -> Tensor | None:
        if mask is not None and not self.masked:
            raise ValueError("adapter_mask must be None: the buffer was made with masked=False")
        return flatten_mask(mask, rows, [columns.stop - columns.start for columns in self._columns])

    def _scaled(self, s_ML: Tensor, mask: Tensor | None) -> Tensor:
        """column_scale * mask * S, from the sums of a product in the dtype of column_scale, so that S is rounded once."""
        scaled = s_ML * self.column_scale
        if mask is None:
            return scaled
        return masked(scaled, mask if mask.shape[1] == 1 else mask[:, self.column_group(mask.shape[1])])

    def fill_s(self, x_buffer: Tensor, mask: Tensor | None = None) -> None:
        """Write S to the borders of the activation buffer, from its X; where no producer has done so.

        mask: [M], [M, G] or None, as `adapter_mask` of `lora_linear`.
        """
        check_float("x_buffer", x_buffer)
        check_shape("x_buffer", x_buffer, (*x_buffer.shape[:1], self.width), "[M, left + K + right]")
        mask = self._rows_of(mask, x_buffer)
        if not self.masked:
            for run in self._runs:
                shift = run.side * self.inputs
                s_MR = x_buffer[:, run.columns.start + shift : run.columns.stop + shift]
                s_MR.addmm_(self.x_of(x_buffer), self.lora_A_stacked[run.columns].t(), beta=0, alpha=run.scale)
            return
        sums = product(self.x_of(x_buffer), self.lora_A_stacked.t(), self.column_scale.dtype)
        scaled = self._scaled(sums, mask)
        x_buffer[:, : self.left] = scaled[:, : self.left]
        x_buffer[:, self.left + self.inputs :] = scaled[:, self.left :]

    def forward(self, x_buffer: Tensor) -> tuple[Tensor, ...]:
        """y of each projection, [M, N_i], from an activation buffer with X and S; those after the first share memory."""
        check_float("x_buffer", x_buffer)
        check_shape("x_buffer", x_buffer, (*x_buffer.shape[:1], self.width), "[M, left + K + right]")
        first = self._rows[0].stop
        reach = self.left + self.inputs
        outputs = (F.linear(x_buffer[:, :reach], self.weight[:first, :reach], self._biases[0]),)
        if len(self._rows) > 1:
            others = F.linear(x_buffer[:, self.left :], self.weight[first : self.outputs, self.left :], self._biases[1])
            outputs += others.split([rows.stop - rows.start for rows in self._rows[1:]], 1)
        return outputs

    def fill_ds(self, grad_buffer: Tensor, mask: Tensor | None = None) -> None:
        """Write dS to the gradient buffer, from its dY's; where no producer has done so. mask: as of `fill_s`."""
        check_float("grad_buffer", grad_buffer)
        check_shape("grad_buffer", grad_buffer, (*grad_buffer.shape[:1], len(self.weight)), "[M, N + left + right]")
        mask = self._rows_of(mask, grad_buffer)
        first = self._rows[0].stop
        if not self.masked:
            for run in self._runs:
                grad_s_MR = grad_buffer[:, self.outputs + run.columns.start : self.outputs + run.columns.stop]
                shift = run.side * self.inputs
                lora_B_NR = self.weight[run.rows, run.columns.start + shift : run.columns.stop + shift]
                grad_s_MR.addmm_(grad_buffer[:, run.rows], lora_B_NR, beta=0, alpha=run.scale)
            return
        dtype = self.column_scale.dtype
        parts = []
        if self.left:
            parts.append(product(grad_buffer[:, :first], self.border(0), dtype))
        if self.right:
            parts.append(product(grad_buffer[:, first : self.outputs], self.border(1), dtype))
        grad_buffer[:, self.outputs :] = self._scaled(torch.cat(parts, 1), mask)

    def backward(
        self, x_buffer: Tensor, grad_buffer: Tensor, *, need_x: bool = True, need_A: bool = True, need_B: bool = True
    ) -> tuple[Tensor | None, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """(dX [M, K], dA of each projection, dB of each), from the buffers as `fill_s` and `fill_ds` (or producers) left them.

        dA and dB are in the dtype of A and B, summed up in float32. None for a projection without adapter, and for what is not
        needed.
        """
        check_float("x_buffer", x_buffer)
        check_float("grad_buffer", grad_buffer)
        check_shape("grad_buffer", grad_buffer, (*x_buffer.shape[:1], len(self.weight)), "[M, N + left + right]")
        grad_x = self.input_gradient(grad_buffer) if need_x else None
        shift = self.left + self.inputs
        s_parts = x_buffer[:, : self.left], x_buffer[:, shift:]
        found = self.adapter_gradients(self.x_of(x_buffer), s_parts, grad_buffer, [(need_A, need_B)] * len(self.projections))
        return grad_x, tuple(grad_A for grad_A, _ in found), tuple(grad_B for _, grad_B in found)

    def input_gradient(self, grad_buffer: Tensor) -> Tensor:
        """dX [M, K], from the gradient buffer with dY's and dS: one product."""
        return grad_buffer @ self.weight[:, self._middle]

    def adapter_gradients(
        self, x_MK: Tensor, s_parts: tuple[Tensor, Tensor], grad_buffer: Tensor, needs: Sequence[tuple[bool, bool]]
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """(dA, dB) of each projection, in the dtype of A and B, summed up in float32; None where not needed or not there.

        Args:
            x_MK: the input. s_parts: its S, [M, left] and [M, right]. grad_buffer: with dY's and dS.
            needs: whether dA and dB of each projection are wanted.
        """
        grad_A: list[Tensor | None] = [None] * len(self.projections)
        grad_B: list[Tensor | None] = [None] * len(self.projections)
        wide = {each.lora_A.dtype for each in self.projections if each.lora_A is not None} != {self.dtype}
        if any(need_A for need_A, _ in needs) and self.left + self.right:
            dtype = accumulate_dtype(self.dtype) if wide else self.dtype
            stacked = product(grad_buffer[:, self.outputs :].t(), x_MK, dtype)
        for i, (projection, (need_A, need_B)) in enumerate(zip(self.projections, needs, strict=True)):
            if projection.lora_A is None or projection.lora_B is None:
                continue
            columns, side = self._columns[i], min(i, 1)
            if need_A:  # copied, so that no two gradients share memory
                grad_A[i] = stacked[columns].to(projection.lora_A.dtype, copy=len(stacked) > self._ranks[i])
            if need_B:
                s_MR = s_parts[side][:, columns.start - side * self.left : columns.stop - side * self.left]
                grad_B[i] = product(grad_buffer[:, self._rows[i]].t(), s_MR, projection.lora_B.dtype)
        return list(zip(grad_A, grad_B, strict=True))

    def __call__(self, x: Tensor, adapter_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """y of each projection, [..., N_i], differentiable in x and the adapters; equal to `lora_linear_group`.

        Args:
            x: [..., K] in the dtype of the weights (under autocast, any). It is copied into an activation buffer, which is
                kept for the backward in its place.
            adapter_mask: as in `lora_linear`.

        Raises:
            ValueError: a wrong shape, dtype, device or mask.
        """
        check_float("x", x)
        if x.dim() == 0 or x.shape[-1] != self.inputs:
            raise ValueError(f"x must have shape [..., {self.inputs}], got {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x must be on the device of the weights ({self.device}), got {x.device}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        if x.dtype != self.dtype:
            raise ValueError(f"x must have the dtype of the weights ({self.dtype}), got {x.dtype}")
        mask = self._rows_of(adapter_mask, x)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if not torch.compiler.is_compiling() and not capturing:
            self.refresh()
        adapters = [part for each in self.projections for part in (each.lora_A, each.lora_B)]
        outputs = _Bordered.apply(self, x.reshape(-1, self.inputs), mask, self.weight, *adapters)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _Bordered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, buffer: LoRAWeightBuffer, x_MK: Tensor, mask_MG: Tensor | None, weight: Tensor, *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        x_buffer = buffer.new_input(x_MK.shape[0])
        buffer.x_of(x_buffer).copy_(x_MK)
        with torch.autocast(x_MK.device.type, enabled=False):
            buffer.fill_s(x_buffer, mask_MG)
            outputs = buffer.forward(x_buffer)
        # The weight is saved for its version: a refresh between forward and backward raises.
        ctx.save_for_backward(x_buffer, mask_MG, weight)
        ctx.buffer = buffer
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_buffer, mask_MG, _ = ctx.saved_tensors
        buffer = ctx.buffer
        need_A, need_B = any(ctx.needs_input_grad[4::2]), any(ctx.needs_input_grad[5::2])
        grad_buffer = buffer.new_grad(x_buffer.shape[0])
        for place, grad in zip(buffer.grads_of(grad_buffer), grads, strict=True):
            place.copy_(grad)
        with torch.autocast(x_buffer.device.type, enabled=False):
            buffer.fill_ds(grad_buffer, mask_MG)
            grad_x, grad_A, grad_B = buffer.backward(
                x_buffer, grad_buffer, need_x=ctx.needs_input_grad[1], need_A=need_A, need_B=need_B
            )
        return None, grad_x, None, None, *(grad for pair in zip(grad_A, grad_B, strict=True) for grad in pair)
