"""Cases of whole models: what `patch_peft` computes is what peft computes, and decoding by replay what decoding computes."""

import copy
from typing import Any

import torch

from fastppo_kernels.patch_peft import patch_peft

from .case import Case, Inputs, Results, randint


def _llama(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).to(device, dtype).eval()
    return {"peft": model, "patched": patch_peft(copy.deepcopy(model)), "ids": randint(device, seed, 500, 3, 40)}


def _logits(inputs: Inputs, backend: Any) -> Results:
    model = inputs["patched" if backend == "triton" else "peft"]
    logits = model(inputs["ids"]).logits
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = torch.arange(logits.numel(), device=logits.device, dtype=torch.float32).mul_(1.7).cos_().view(logits.shape)
    gradients = torch.autograd.grad((logits * weight).sum(), list(parameters.values()))
    return {"logits": logits.detach()} | {f"d {name}": grad for name, grad in zip(parameters, gradients, strict=True)}


def _plain_llama(device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return {"model": LlamaForCausalLM(config).to(device, dtype).eval(), "ids": randint(device, seed, 500, 10, 5)}


@torch.no_grad()
def _steps(inputs: Inputs, backend: Any) -> Results:
    """Hidden states of ten steps of five sequences, the second of which ends after five. On a GPU, and but for the torch form,
    the last of each five are a CUDA graph's replays."""
    from fastppo.model.backbone import Backbone
    from fastppo.rollout.decoder import PackedDecoder
    from fastppo.rollout.step_graphs import GRAPHS_FROM

    backbone = Backbone(copy.deepcopy(inputs["model"]))  # it changes the model's attention
    prompts = [[7, 8, 9, *range(20 * i + 10, 25 * i + 12)] for i in range(5)]
    decoder = PackedDecoder(backbone, prompts, 1, 6, GRAPHS_FROM, 10**6)
    if backend == "torch":
        decoder.graphs = None
    decoder.admit(prompts)
    found, order = {}, list(range(5))
    for i, ids in enumerate(inputs["ids"]):
        found[f"step {i}"] = decoder.step(ids[torch.tensor(order, device=ids.device)]).clone()
        if i == 4:
            order = [order[place] for place in decoder.keep([0, 2, 3, 4])]
    return found


def cases() -> list[Case]:
    return [
        Case(
            "decoding steps as CUDA graphs",
            ("decoder_layer",),
            _plain_llama,
            _steps,
            (),
            _plain_llama,
            checks=("error", "determinism"),
            roundings=8,
        ),
        Case(
            "patch_peft Llama, all linears",
            ("patch_peft",),
            _llama,
            _logits,
            (),
            _llama,
            checks=("error", "determinism"),
            roundings=8,
        ),
    ]
