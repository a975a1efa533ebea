"""A model's trunk as a function from a TokenTree to hidden states, packed where possible and padded where not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo.batch.token_tree import TokenTree, build_tree
from fastppo.errors import UserError
from fastppo.model import attention as tree_attention
from fastppo.model.llama_trunk import LlamaTrunk
from fastppo.model.recompute import Recompute, modules_again
from fastppo_kernels import LoRAWeightBuffer, linear_logprob


@dataclass(frozen=True)
class Head:
    """The language-model head: ``softcap * tanh(scale * (hidden W^T + bias) / softcap)``.

    weight: [V, H]; bias: [V] or None; scale: factor on the logits; softcap: None or the cap (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, V] fp32."""
        logits = nn.functional.linear(hidden_RH.to(self.weight.dtype), self.weight, self.bias).float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprob(self, hidden_RH: Tensor, targets_A: Tensor, rows_A: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each target and entropy of its row, both [A] fp32, at the sampling temperature."""
        out = linear_logprob(
            hidden_RH,
            self.weight,
            targets_A,
            rows_A=rows_A,
            bias=self.bias,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.scale,
        )
        return out[0], out[1]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model with the factors its architecture puts on the logits."""
    layer = model.get_output_embeddings()
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise UserError(f"model {model.name_or_path!r}: no language-model head found; a decoder (causal LM) is needed")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


class Backbone:
    """Hidden states of a tree's tokens, ``hidden(tree) -> [T, H]``, the same numbers on both paths.

    ``packed`` (else ``padded_because`` says why not): whether the model's attention goes through transformers' attention
    interface, so that each token of the tree is computed once. Otherwise the tree's leaves run as a right-padded batch (for
    example MPT with its ALiBi). ``llama``: our own forward of a packed trunk, where it is of that shape
    (``modules_because`` says why not, where it is).
    """

    padded_because = modules_because = ""
    graphs = True  # until a CUDA graph of a decoding step could not be made

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.trunk: nn.Module = model.base_model
        if self.trunk is model:  # no trunk under the name that the architecture gives
            raise UserError(f"model {model.name_or_path!r} ({type(model).__name__}): this architecture is not supported")
        self.accepts_positions = "position_ids" in inspect.signature(type(self.trunk).forward).parameters
        self.head = head_of(model)
        self.llama = LlamaTrunk(self.trunk) if LlamaTrunk.suits(self.trunk) else None
        # What transformers calls a block; models from before it has that, or with code of their own, may have none.
        self.blocks = [module for module in self.trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.packed = self._choose_path()

    def hidden(self, tree: TokenTree, rows_R: Tensor | None = None, recompute: Recompute | None = None) -> Tensor:
        """[T, H], or [R, H] of these rows. recompute: how blocks are computed again in backward; None: not at all."""
        if self.packed:
            context = tree_attention.TreeContext(tree.layout)
            return self.run(tree.token_ids, tree.positions, context, rows_R, recompute)
        with modules_again(self.blocks, recompute, self.head.weight.device):
            hidden_TH = self._padded(tree)
        return hidden_TH if rows_R is None else hidden_TH[rows_R]

    def run(
        self, token_ids_T: Tensor, positions_T: Tensor, context: Any, rows_R: Tensor | None = None,
        recompute: Recompute | None = None,
    ) -> Tensor:  # fmt: skip
        """One packed call of the trunk: hidden states [T, H], or [R, H] of these rows. Only where ``packed``."""
        if self.llama is not None:
            return self.llama.run(token_ids_T, positions_T, context, rows_R, recompute)
        with modules_again(self.blocks, recompute, self.head.weight.device):
            out = self.trunk(
                input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False, fastppo_context=context
            )
        hidden_TH = out.last_hidden_state[0]
        return hidden_TH if rows_R is None else hidden_TH[rows_R]

    def _padded(self, tree: TokenTree) -> Tensor:
        paths = tree.paths
        lengths = (paths >= 0).sum(1)
        ends = paths[np.arange(len(paths)), lengths - 1]
        inner = np.setdiff1d(paths[:, :-1][paths[:, 1:] >= 0], [-1])
        _, first = np.unique(ends, return_index=True)
        leaves = first[~np.isin(ends[first], inner)]  # sequences that no other one continues: they hold every token
        rows, places = paths[leaves], np.nonzero(paths[leaves] >= 0)
        device = tree.token_ids.device
        rows_t = torch.as_tensor(np.maximum(rows, 0), device=device)
        mask = torch.as_tensor(rows >= 0, device=device)
        ids = torch.where(mask, tree.token_ids[rows_t], 0)
        out = self.trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        # Each row's state is taken from the first leaf that passes through it; the others hold equal copies.
        row, place = np.unique(rows[places], return_index=True)
        assert len(row) == tree.n_tokens
        flat = torch.as_tensor(places[0][place] * rows.shape[1] + places[1][place], device=device)
        return out.flatten(0, 1)[flat]

    @property
    def borders(self) -> list[LoRAWeightBuffer]:
        """The bordered buffers of all layers."""
        return [] if self.llama is None else [buffer for of_layer in self.llama.buffers.values() for buffer in of_layer]

    @torch.no_grad()
    def _choose_path(self) -> bool:
        """Try a tiny tree both ways; the packed path is taken when the model's own forward agrees with it."""
        rng = np.random.default_rng(0)
        vocab = min(self.head.weight.shape[0], self.model.get_input_embeddings().weight.shape[0])
        stem = rng.integers(vocab, size=9).tolist()
        sequences = [stem[:6] + rng.integers(vocab, size=n).tolist() for n in (1, 3)] + [stem]
        device = self.head.weight.device
        tree = build_tree(sequences, device=device)
        own = [self.model(torch.tensor([s], device=device), use_cache=False).logits[0].float() for s in sequences]
        if not all(logits.isfinite().all() for logits in own):
            raise UserError(f"model {self.model.name_or_path!r}: its logits are not finite numbers: damaged weights?")
        full = self.head.weight.dtype == torch.float32
        original = self.model.config._attn_implementation
        context, limit = tree_attention.TreeContext(tree.layout), 1e-3 if full else 0.06
        if self.llama is not None:  # an error in it would be ours, and is not caught
            error = self._error(tree, self.run(tree.token_ids, tree.positions, context), own)
            if error <= limit:
                self.padded_because = ""
                self.model.set_attn_implementation(tree_attention.NAME)
                return True
            self.modules_because = f"our own forward of it is {error:.2g} off its own (allowed: {limit:g})"
            self.llama, context.calls = None, 0
        self.padded_because = "transformers' attention interface does not reach it"
        try:
            self.model.set_attn_implementation(tree_attention.NAME)
            hidden = self.run(tree.token_ids, tree.positions, context)
            if context.calls and self._error(tree, hidden, own) <= limit:
                self.padded_because = ""
                return True
            if context.calls:
                self.padded_because = "its packed forward differs from its own"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any architecture may refuse in its own way; the padded path is the answer to all
            if context.calls:
                self.padded_because = f"no packed forward ({error})"
        self.model.set_attn_implementation(original)
        if not self._error(tree, self._padded(tree), own) <= (1e-3 if full else 0.15):
            raise UserError(
                f"model {self.model.name_or_path!r} ({type(self.model).__name__}): its logits are not those of its last "
                "hidden state and head, so log-probabilities would be wrong; this architecture is not supported"
            )
        return False

    def _error(self, tree: TokenTree, hidden: Tensor, own: list[Tensor]) -> float:
        """Distance of the tree's log-probs from the model's own, relative to how much the model's own vary."""
        logits = self.head.logits(hidden)
        rows = torch.cat([torch.as_tensor(path[path >= 0], device=logits.device) for path in tree.paths])
        expected = torch.cat(own).log_softmax(-1)
        scale = (expected - expected.mean(-1, keepdim=True)).norm() + 0.1 * expected.numel() ** 0.5
        return float((logits[rows].log_softmax(-1) - expected).norm() / scale)
