"""One frozen base, named LoRA adapters, a value head: policy, reference and critic on one copy of the weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fastppo.batch.token_tree import TokenTree
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.backbone import Backbone
from fastppo.model.load import Base, first_line
from fastppo_kernels import patch_peft

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"


class Scores(NamedTuple):
    """What the model says of a tree's actions, all [A] fp32. values is V(state before the action)."""

    logprob: Tensor
    entropy: Tensor
    values: Tensor


def default_micro_batch_tokens(device: torch.device) -> int:
    """On the CPU fewer, which its caches hold, are faster."""
    return 8192 if device.type == "cuda" else 2048


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
        self.halvings = 0  # of the micro-batch, since memory ran out
        self.notice: Callable[[str], None] = lambda text: print(f"fastppo: {text}", file=sys.stderr)
        self.backbone = Backbone(base.model)
        self.device = self.backbone.head.weight.device
        targets: str | list[str] = config.lora.targets
        if targets != "all-linear":
            targets = targets.split(",")  # type: ignore[union-attr]
        self.peft_config = PeftLoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets, use_rslora=config.lora.rslora,
            lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(config.seed)  # peft draws A from the global generator
        try:
            with warnings.catch_warnings():  # of peft's own calls into transformers
                warnings.simplefilter("ignore")
                self.peft: PeftModel = get_peft_model(base.model, self.peft_config, adapter_name=POLICY)
        except ValueError as error:
            raise UserError(f"--lora-targets: {config.lora.targets!r}: {first_line(error)}") from None
        if isinstance(base.model.get_output_embeddings(), BaseTunerLayer):
            raise UserError(
                f"--lora-targets: {config.lora.targets!r} adapts the language-model head; the head stays frozen"
            )
        known = [f".{name}" for name in self.peft.base_model.targeted_module_names]
        for target in targets if isinstance(targets, list) else []:  # peft itself only objects when none of them is found
            if not any(name.endswith(f".{target}") for name in known):
                raise UserError(f"--lora-targets: {target!r} is no module of the base model")
        if sum(p.requires_grad for p in self.peft.parameters()) != len(self.adapter_tensors(POLICY)):
            raise UserError(f"--lora-targets: {config.lora.targets!r} adapts an embedding; only linear layers can be adapted")
        self.peft.eval()
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

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the tree per forward and backward."""
        return max(1, (self.config.micro_batch_tokens or default_micro_batch_tokens(self.device)) >> self.halvings)

    def halve_micro_batch(self, phase: str, reason: str) -> None:
        """For what failed in ``phase`` and for all that follows; says so in one line.

        Raises:
            UserError: it cannot be halved any more.
        """
        before = self.micro_batch_tokens
        if before == 1:
            raise UserError(
                f"out of memory while {phase}, even one sample at a time ({reason}); "
                "lower --max-prompt-tokens, --sample-max-new-tokens or --lora-rank, or take a smaller --model"
            )
        self.halvings += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.notice(
            f"out of memory while {phase}: done again, and the run goes on, with micro-batches of "
            f"{self.micro_batch_tokens:,} tokens instead of {before:,}"
        )

    def states(self, tree: TokenTree) -> tuple[Tensor, Tensor]:
        """Hidden states [R, H] of the rows that predict an action, the policy's and the critic's: what the two heads read.

        One pass over the trunk (two with an own value adapter).
        """
        with self._adapter(POLICY):
            policy_RH = self.backbone.hidden(tree, tree.head_rows)
        if self.config.value.trunk == "own":
            with self._adapter(CRITIC):
                return policy_RH, self.backbone.hidden(tree, tree.head_rows)
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
            critic_RH = self.backbone.hidden(tree, tree.head_rows)
        return self.action_values(critic_RH, tree)

    def policy_logprob(self, tree: TokenTree, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of the actions under the policy, [A]: what SFT needs."""
        with self._adapter(POLICY):
            hidden_RH = self.backbone.hidden(tree, tree.head_rows)
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
        return {
            name.replace(f".{adapter}.", "."): parameter
            for name, parameter in self.peft.named_parameters()
            if f".{adapter}." in name and "lora_" in name
        }

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
