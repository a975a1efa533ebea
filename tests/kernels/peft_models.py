"""What the tests of `patch_peft` share: small models with random adapters, and peft's outputs and gradients."""

import copy
import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

# The functions of the same names hide these modules as attributes of the package.
patching = importlib.import_module("fastppo_kernels.patch_peft")
VOCAB = 97


def causal_lm(kind, **lora):
    """A tiny random model with random adapters, and ids for it. Every GPT-NeoX weight gets LoRA, its dropout is off."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    else:
        config = tiny_config(kind, VOCAB)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if kind == "gpt2":
        lora = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} | lora
    return adapted(model, **lora).eval(), torch.randint(VOCAB, (3, 9))


def adapted(model, **lora):
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | lora))


class Toy(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(24, 40, bias=bias, dtype=dtype), nn.Linear(40, 24, bias=False, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def toy(dtype=torch.float32, **lora):
    lora = {"target_modules": ["up", "down"]} | lora
    return adapted(Toy(dtype), **lora), torch.randn(2, 5, 24).to(dtype)


def outputs_of(model, x, **kwargs):
    found = model(x, **kwargs)
    return found.logits if hasattr(found, "logits") else found


def run(model, x, **kwargs):
    """(outputs, every gradient) of one forward and backward."""
    model.zero_grad(set_to_none=True)
    out = outputs_of(model, x, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights + out.square()).float().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, *, atol=1e-6):
    """Outputs and gradients equal to a few roundings of float32."""
    scale = max(1.0, float(wanted[0].abs().max()))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=atol * scale)
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, grad in wanted[1].items():
        assert float((found[1][name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()) + 1e-12, name


def patched(model):
    """A patched copy."""
    return patching.patch_peft(copy.deepcopy(model))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def toy_4bit(compute=torch.bfloat16, stored=torch.bfloat16, kind="nf4", **options):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    base = nn.Sequential(bnb.nn.Linear4bit(128, 64, compute_dtype=compute, quant_type=kind, **options)).to(stored)
    base.is_loaded_in_4bit = True
    model = adapted(base.to("cpu"), target_modules=["0"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.3
    return model, torch.randn(3, 5, 128).to(stored)


def plain(model, x):
    """The outputs without adapters."""
    with model.disable_adapter(), torch.no_grad():
        return outputs_of(model, x)


def patched_with_warning(model, match):
    with pytest.warns(UserWarning, match=match) as caught:
        fast = patched(model)
    assert len(caught) == 1
    return fast
