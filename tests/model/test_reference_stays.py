"""The reference is the base with adapters off: nothing but adapters and the value head may ever be trained, biases neither."""

import pytest
import torch
from engine import make_model, random_prompts

from fastppo.algorithms.sft import sft_step
from fastppo.batch.token_tree import build_tree
from fastppo.config import load_config
from fastppo.errors import UserError


@pytest.mark.parametrize("reference", ["base", "start"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])  # with biases in the layers that are adapted
def test_fifty_updates_leave_the_reference_bit_for_bit(kind, reference):
    model = make_model(kind, spread=0 if reference == "base" else 0.1, ppo__reference=reference)
    if reference == "start":
        model.freeze_reference()
    base = {name: p for name, p in model.base.model.named_parameters() if "lora_" not in name}
    biases = [name for name in base if name.endswith("bias") and "norm" not in name]
    before = {name: p.detach().clone() for name, p in base.items()}
    assert biases and all(before[name].abs().max() > 0 for name in biases)
    prompts, answers = random_prompts(0, 8), [[20 + i, 30, 1] for i in range(8)]
    tree = build_tree([p + a for p, a in zip(prompts, answers, strict=True)], [len(p) for p in prompts])
    at_start = model.reference_logprob(tree, temperature=1.0)
    policy_at_start = model.policy_logprob(tree, temperature=1.0)[0].detach()
    assert torch.equal(at_start, policy_at_start)
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-2)
    for _ in range(50):
        sft_step(model, optimizer, model.config, prompts, answers)
    assert all(torch.equal(p, before[name]) for name, p in base.items())
    assert torch.equal(model.reference_logprob(tree, temperature=1.0), at_start)
    assert (model.policy_logprob(tree, temperature=1.0)[0].detach() - policy_at_start).abs().max() > 0.5


def test_biases_cannot_be_asked_for():
    """PEFT's bias="all" trains the base's own biases in place, which switching the adapter off does not undo."""
    model = make_model("qwen2")
    assert model.peft_config.bias == "none"
    assert not any(p.requires_grad for name, p in model.peft.named_parameters() if name.endswith("bias"))
    with pytest.raises(UserError, match="^unknown setting 'lora.bias'"):
        load_config({"lora.bias": "all"})
