"""The packed forward against plain transformers + peft on a right-padded batch: log-probs, entropies, loss, gradients.

Nothing of the reference comes from this project but the models on disk and the adapter's numbers.
"""

import random

import pytest
import torch
from engine import PACKED_KINDS, make_model, random_ids, relative, tiny_folder
from peft import LoraConfig, get_peft_model
from tiny import KINDS
from transformers import AutoModelForCausalLM

from fastppo.batch.rollout import pack
from fastppo.batch.token_tree import build_tree
from fastppo.model.actor_critic import POLICY

TEMPERATURE = 0.8


class PlainModel:
    """transformers + peft with the numbers of an actor-critic's policy adapter."""

    def __init__(self, kind, model):
        implementation = "eager" if kind == "mpt" else "sdpa"
        base = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), attn_implementation=implementation)
        config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.peft = get_peft_model(base, config, adapter_name=POLICY).eval()
        ours = model.adapter_tensors(POLICY)
        self.parameters = {name.replace(f".{POLICY}.", "."): p for name, p in self.peft.named_parameters() if p.requires_grad}
        assert self.parameters.keys() == ours.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(ours[name])

    def logprob(self, sequences, starts):
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [2] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        logits = self.peft(input_ids=ids, attention_mask=mask, use_cache=False).logits / TEMPERATURE
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        places = [(i, j - 1) for i, s in enumerate(sequences) for j in range(starts[i], len(s))]
        targets = torch.tensor([sequences[i][j + 1] for i, j in places])
        i, j = torch.tensor(places).T
        return log_p[i, j].gather(1, targets[:, None])[:, 0], entropy[i, j]


def random_batch(case, seed):
    """Sequences and where their answers start."""
    rng = random.Random(seed)
    root = random_ids(rng, 8) if case != "no shared prefix" else []
    prompts = [root + random_ids(rng, rng.randint(1, 12)) for _ in range(4)]
    if case == "prompts that begin like each other":
        prompts += [prompts[0][:9], prompts[0][:9] + random_ids(rng, 5), prompts[1]]
    answers = []
    for prompt in prompts:
        if case == "single-token answers":
            answers += [(prompt, random_ids(rng, 1)) for _ in range(3)]
        elif case == "equal samples":
            answers += [(prompt, random_ids(rng, 3))] * 4
        else:
            answers += [(prompt, random_ids(rng, rng.randint(1, 6))) for _ in range(3)]
    return [p + a for p, a in answers], [len(p) for p, _ in answers]


def check(kind, sequences, starts, **settings):
    model = make_model(kind, **settings)
    plain = PlainModel(kind, model)
    tree = build_tree(sequences, starts)
    logprob, entropy = model.policy_logprob(tree, temperature=TEMPERATURE)
    wanted_logprob, wanted_entropy = plain.logprob(sequences, starts)
    assert relative(logprob.detach(), wanted_logprob.detach()) < 1e-5
    assert relative(entropy.detach(), wanted_entropy.detach()) < 1e-5

    weight = torch.randn(2, len(logprob), generator=torch.Generator().manual_seed(0))
    loss, wanted_loss = (
        (x * weight[0] + 0.3 * y * weight[1]).sum() / x.numel()
        for x, y in ((logprob, entropy), (wanted_logprob, wanted_entropy))
    )
    assert abs(loss.item() - wanted_loss.item()) < 1e-5 * max(1, abs(wanted_loss.item()))
    loss.backward()
    wanted_loss.backward()
    for name, parameter in model.adapter_tensors(POLICY).items():
        assert parameter.grad.norm() > 0, name
        assert relative(parameter.grad, plain.parameters[name].grad) < 1e-5, name
    assert all(p.grad is None for p in model.peft.parameters() if not p.requires_grad), "the base is frozen"


CASES = (
    "shared prefix",
    "no shared prefix",
    "prompts that begin like each other",
    "single-token answers",
    "equal samples",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_transformers(kind, case):
    check(kind, *random_batch(case, seed=CASES.index(case)))


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_one_sequence(kind):
    check(kind, [random_ids(random.Random(0), 12)], [11])


def test_sliding_window_is_shorter_than_the_batch():
    """Else the comparison of the mistral model above would not see its window."""
    model = make_model("mistral")
    sequences, _ = random_batch("shared prefix", seed=0)
    assert model.base.model.config.sliding_window < min(map(len, sequences))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind):
    """Whatever the budget, the accumulated gradients are those of one batch."""
    rng = random.Random(0)
    prompts = [random_ids(rng, 6)[:3] + random_ids(rng, rng.randint(1, 9)) for _ in range(6)]
    answers = [(p, random_ids(rng, rng.randint(1, 4))) for p in range(6) for _ in range(2)]
    model = make_model(kind)
    weights = {i: rng.gauss(0, 1) for i in range(len(answers))}

    def gradients(budget):
        parts = pack(prompts, answers, budget=budget, padded=not model.backbone.packed, device="cpu")
        for part in parts:
            logprob, _ = model.policy_logprob(part.tree, temperature=1.0)
            counts = part.tree.cu_actions.diff()
            weight = torch.tensor([weights[i] for i in part.samples]).repeat_interleave(counts.long())
            (logprob * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.adapter_tensors(POLICY).items()}
        for parameter in model.trainable():
            parameter.grad = None
        return len(parts), grads

    one, whole = gradients(10**6)
    several, cut = gradients(30 if model.backbone.packed else 60)
    most, cut_most = gradients(1)
    assert one == 1 and 1 < several < most == 6
    for grads in (cut, cut_most):
        for name in whole:
            assert relative(grads[name], whole[name]) < 1e-5, name
