"""One frozen base, named LoRA adapters, a value head: policy, reference and critic on one copy of the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastppo import budget
from fastppo.batch.token_tree import TokenTree
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.adapters import CRITIC, POLICY, REFERENCE, adapter_tensors, add_policy
from fastppo.model.backbone import Backbone
from fastppo.model.load import Base
from fastppo.model.nf4 import in_4_bits
from fastppo.model.recompute import Recompute
from fastppo.model.update_graphs import UpdateGraphs, usable
from fastppo_kernels import patch_peft


class Scores(NamedTuple):
    """What the model says of a tree's actions, all [A] fp32. values is V(state before the action)."""

    logprob: Tensor
    entropy: Tensor
    values: Tensor


class ActorCritic:
    """Policy, reference and critic over one frozen base.

    - ``policy``: the LoRA adapter that SFT and PPO train.
    - reference: the base with adapters off (``reference="base"``), or ``reference``, a frozen copy of the policy made
      by ``freeze_reference`` when PPO starts.
    - critic: a linear head on the policy's trunk (``value.trunk="detached"`` keeps its loss out of the adapter), or on
      a trunk of its own adapter, ``critic`` (``"own"``).

    Adapters, head and optimizer state are fp32 whatever the base is.
    """

    def __init__(self, base: Base, config: Config):
        self.base, self.config = base, config
        # Since memory ran out: tokens of a micro-batch, and sequences sampled at a time.
        self.most_tokens: int | None = None
        self.most_slots: int | None = None
        self.notify: Callable[[str], None] = lambda text: print(f"fastppo: {text}", file=sys.stderr)
        self.backbone = Backbone(base.model)
        self.device = self.backbone.head.weight.device
        self.peft = add_policy(base.model, config)
        self.peft_config: PeftLoraConfig = self.peft.peft_config[POLICY]
        self.peft.eval()
        self._sizes = budget.sizes_of(self.peft, llama=self.backbone.llama is not None, nf4=in_4_bits(base.model))
        machine, layer = budget.machine_of(self.device.type == "cuda", self._sizes.itemsize), self._sizes.layer
        if self.backbone.llama is not None and layer is not None and machine.borders(layer):
            self.backbone.llama.border()
        patch_peft(self.peft)
        self._lora_layers = [m for m in self.peft.modules() if isinstance(m, BaseTunerLayer)]
        hidden = self.backbone.head.weight.shape[1]
        # Zero: the first values are 0 everywhere, so the first advantages are the rewards (N+ details, value head init).
        self.value_head = nn.Linear(hidden, 1, device=self.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if config.value.trunk == "own":
            self._add_adapter(CRITIC)
        self._activate(POLICY)
        self.choose(budget.Prompts.longest_allowed(self._sizes, config))

    def choose(self, prompts: budget.Prompts) -> None:
        """Choose the micro-batch, and how activations reach backward, for these prompts."""
        chosen = budget.Budget(self._sizes, self.config, budget.Device.of(self.device), prompts).choose()
        self._chosen_tokens = chosen.tokens
        self.activations = chosen.activations  # keep, recompute or offload
        self.plan_notices = (*chosen.notices, *chosen.too_much)  # for the user, a line each
        # Where an update's micro-batches are padded to buckets, and replayed as CUDA graphs.
        self.graphs = UpdateGraphs(self.backbone.borders) if chosen.graphs and usable(self.backbone) else None

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the tree per forward and backward."""
        return min(self._chosen_tokens, self.most_tokens or self._chosen_tokens)

    def tokens_of(self, tree: TokenTree) -> int:
        """How many tokens a forward of this tree computes."""
        return tree.n_tokens if self.backbone.packed else tree.padded_tokens

    def states(self, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """Hidden states [R, H] of the rows that predict an action, the policy's and the critic's: what the two heads read.

        One pass over the trunk (two with an own value adapter).
        """
        with self._adapter(POLICY):
            policy_RH = self.backbone.hidden(tree, tree.head_rows, self._recompute(POLICY))
        if self.config.value.trunk == "own":
            with self._adapter(CRITIC):
                return policy_RH, self.backbone.hidden(tree, tree.head_rows, self._recompute(CRITIC))
        return policy_RH, policy_RH.detach() if self.config.value.trunk == "detached" else policy_RH

    def action_values(self, critic_RH: Tensor, tree: TokenTree) -> Tensor:
        """Values [A] fp32 from the critic's hidden states."""
        return self.value_head(critic_RH.float())[:, 0][tree.action_rows]

    def forward(self, tree: TokenTree, *, temperature: float) -> Scores:
        """Log-probs and entropies of the policy, and values."""
        return self.scores(*self.states(tree), tree, temperature=temperature)

    def scores(self, policy_RH: Tensor, critic_RH: Tensor, tree: TokenTree, *, temperature: float) -> Scores:
        """The same from hidden states that ``states`` gave."""
        logprob, entropy = self.backbone.head.logprob(policy_RH, tree.action_targets, tree.action_rows, temperature)
        return Scores(logprob, entropy, self.action_values(critic_RH, tree))

    def values(self, tree: TokenTree) -> Tensor:
        """Values alone, [A]: what a step that trains only the critic needs. No gradient reaches the policy's adapter."""
        own = self.config.value.trunk == "own"
        with self._adapter(CRITIC if own else POLICY), torch.set_grad_enabled(own and torch.is_grad_enabled()):
            critic_RH = self.backbone.hidden(tree, tree.head_rows, self._recompute(CRITIC))
        return self.action_values(critic_RH, tree)

    def policy_logprob(self, tree: TokenTree, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of the actions under the policy, [A]: what SFT needs."""
        with self._adapter(POLICY):
            hidden_RH = self.backbone.hidden(tree, tree.head_rows, self._recompute(POLICY))
        return self.backbone.head.logprob(hidden_RH, tree.action_targets, tree.action_rows, temperature)

    @torch.no_grad()
    def reference_logprob(self, tree: TokenTree, *, temperature: float) -> Tensor:
        """Log-prob of the actions under the reference, [A]."""
        with self._adapter(REFERENCE if self.config.ppo.reference == "start" else None):
            hidden_RH = self.backbone.hidden(tree, tree.head_rows)
        return self.backbone.head.logprob(hidden_RH, tree.action_targets, tree.action_rows, temperature)[0]

    def freeze_reference(self) -> None:
        """Copy the policy's adapter as it is now into the frozen reference adapter."""
        if REFERENCE not in self.peft.peft_config:
            self._add_adapter(REFERENCE)
        policy, reference = self.adapter_tensors(POLICY), self.adapter_tensors(REFERENCE)
        with torch.no_grad():
            for name, tensor in reference.items():
                tensor.copy_(policy[name])
                tensor.requires_grad_(False)

    def trainable(self, *, critic_only: bool = False) -> list[nn.Parameter]:
        """Parameters in a fixed order: policy adapter, critic adapter if there is one, value head.

        critic_only: without the policy's adapter, for the critic's warm-up.
        """
        parameters = [] if critic_only else list(self.adapter_tensors(POLICY).values())
        if self.config.value.trunk == "own":
            parameters += self.adapter_tensors(CRITIC).values()
        return parameters + list(self.value_head.parameters())

    def adapter_tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name; names are the same for every adapter."""
        return adapter_tensors(self.peft, adapter)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes: adapters and value head, on the CPU, by name."""
        tensors = {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        for adapter in self.peft.peft_config:
            tensors |= {f"{adapter}/{name}": p for name, p in self.adapter_tensors(adapter).items()}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Bring back what ``state`` gave; a reference adapter is made if the state holds one."""
        if any(name.startswith(f"{REFERENCE}/") for name in tensors):
            self.freeze_reference()
        own = {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        for adapter in self.peft.peft_config:
            own |= {f"{adapter}/{name}": p for name, p in self.adapter_tensors(adapter).items()}
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise UserError(f"the checkpoint and the model differ in {len(odd)} tensors, the first is {odd[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def _adapter(self, name: str | None) -> Iterator[None]:
        """Run with one adapter, or with none; afterwards the policy's is active again."""
        self._activate(name)
        try:
            yield
        finally:
            self._activate(POLICY)

    def _recompute(self, adapter: str) -> Recompute | None:
        """How the trunk, run with this adapter, is computed again in backward; None: what it needs is kept."""
        if self.activations == "keep":
            return None
        return Recompute(partial(self._adapter, adapter), self.activations == "offload")

    def _activate(self, name: str | None) -> None:
        # peft's own set_adapter and disable_adapter also flip requires_grad, which would drop gradients of a graph that
        # was built with another adapter; here the choice is only which branch a forward takes.
        for layer in self._lora_layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def _add_adapter(self, name: str) -> None:
        self.peft.add_adapter(name, self.peft_config)
        for adapter in self.peft.peft_config:
            for parameter in self.adapter_tensors(adapter).values():
                parameter.requires_grad_(adapter != REFERENCE)
        self._activate(POLICY)
