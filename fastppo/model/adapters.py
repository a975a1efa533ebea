"""The LoRA adapters on a base model: their names, how the policy's is made, and where their parameters are."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model.load import first_line

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"


def add_policy(model: PreTrainedModel, config: Config) -> PeftModel:
    """The model, frozen, with the policy's adapter on it; on the device `meta` too.

    Raises:
        UserError: ``lora.targets`` names what is not there, or what cannot be adapted.
    """
    targets: str | list[str] = config.lora.targets
    if targets != "all-linear":
        targets = targets.split(",")  # type: ignore[union-attr]
    peft_config = PeftLoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets, use_rslora=config.lora.rslora,
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(config.seed)  # peft draws A from the global generator
    try:
        with warnings.catch_warnings():  # of peft's own calls into transformers
            warnings.simplefilter("ignore")
            peft = get_peft_model(model, peft_config, adapter_name=POLICY, low_cpu_mem_usage=model.device.type == "meta")
    except ValueError as error:
        raise UserError(f"--lora-targets: {config.lora.targets!r}: {first_line(error)}") from None
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(f"--lora-targets: {config.lora.targets!r} adapts the language-model head; the head stays frozen")
    known = [f".{name}" for name in peft.base_model.targeted_module_names]
    for target in targets if isinstance(targets, list) else []:  # peft itself only objects when none of them is found
        if not any(name.endswith(f".{target}") for name in known):
            raise UserError(f"--lora-targets: {target!r} is no module of the base model")
    if sum(p.requires_grad for p in peft.parameters()) != len(adapter_tensors(peft, POLICY)):
        raise UserError(f"--lora-targets: {config.lora.targets!r} adapts an embedding; only linear layers can be adapted")
    return peft


def adapter_tensors(peft: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; names are the same for every adapter."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in peft.named_parameters()
        if f".{adapter}." in name and "lora_" in name
    }
