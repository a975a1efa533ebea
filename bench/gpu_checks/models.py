"""Cases of whole models: what `patch_peft` computes is what peft computes, and decoding and updates by replay are what they are
without."""

import copy
from typing import Any

import torch

from fastppo_kernels import sample
from fastppo_kernels.patch_peft import patch_peft

from .case import Case, Inputs, Results, randint, randn


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


class _Rows:
    """What `PackedDecoder` draws for: what it saw and drew can be looked at."""

    def __init__(self, head: Any, slots: int):
        device = head.weight.device
        self.head = head
        self.tokens, self.ids, self.drawn = torch.arange(3 * slots, device=device).view(3, slots)
        self.hidden = torch.zeros(slots, head.weight.shape[1], dtype=head.weight.dtype, device=device)
        self.state = (self.tokens, self.drawn, self.hidden)

    def draw(self, hidden_RH: torch.Tensor) -> None:
        rows = len(hidden_RH)
        self.hidden[:rows] = hidden_RH
        self.drawn[:rows] = self.again(rows)

    def again(self, rows: int) -> torch.Tensor:
        ids = self.ids[:rows]
        return sample(self.head.logits(self.hidden[:rows]), seed=0, sequence_ids_B=ids, step_B=torch.zeros_like(ids))[0]


@torch.no_grad()
def _steps(inputs: Inputs, backend: Any) -> Results:
    """Hidden states of ten steps of five sequences, the second of which ends after five, and which tokens were not those that
    are drawn from them: none. On a GPU, and but for the torch form, the last of each five are a CUDA graph's replays."""
    from fastppo.batch.decoding import GRAPHS_FROM
    from fastppo.model.backbone import Backbone
    from fastppo.rollout.decoder import PackedDecoder

    backbone = Backbone(copy.deepcopy(inputs["model"]))  # it changes the model's attention
    prompts = [[7, 8, 9, *range(20 * i + 10, 25 * i + 12)] for i in range(5)]
    decoder = PackedDecoder(backbone, prompts, 1, 6, GRAPHS_FROM, 10**6)
    if backend == "torch":
        decoder.graphs = None
    decoder.admit(prompts)
    found, order, rows = {}, list(range(5)), _Rows(backbone.head, 6)
    for i, ids in enumerate(inputs["ids"]):
        here = slice(len(order))
        rows.tokens[here] = ids[torch.tensor(order, device=ids.device)]
        decoder.step(rows)
        found[f"step {i}"] = rows.hidden[here].clone()
        found[f"other draws {i}"] = (rows.drawn[here] != rows.again(len(order))).to(rows.hidden.dtype)
        if i == 4:
            order = [order[place] for place in decoder.keep([0, 2, 3, 4])]
    return found


def _updates(inputs: Inputs, backend: Any) -> Results:
    """How many entries of a micro-batch's gradients and metrics are not, to the bit, those of the same launches without a
    graph, which was made of another micro-batch with another adapter; and whether one is missing where it is expected."""
    import numpy as np

    from fastppo.algorithms import ppo
    from fastppo.algorithms.optim import make_optimizer
    from fastppo.batch.rollout import MiniBatch, Rollout, Sample, pack_rollout
    from fastppo.config import Config, LoraConfig, PpoConfig
    from fastppo.model import update_graphs
    from fastppo.model.actor_critic import ActorCritic
    from fastppo.model.load import Base

    config = Config(lora=LoraConfig(rank=8), ppo=PpoConfig(minibatches=1, max_grad_norm=1e9), micro_batch_tokens=512)
    base = Base(copy.deepcopy(inputs["model"]).requires_grad_(False), None, (), "llama")  # type: ignore[arg-type]
    model = ActorCritic(base, config)
    graphs = model.graphs = update_graphs.UpdateGraphs(model.backbone.borders)
    if inputs["model"].dtype == torch.float64:  # of which the engine knows nothing: what is right
        return {"differing": torch.zeros(2, dtype=torch.int64, device=model.device)}
    replays = backend != "torch" and update_graphs.usable(model.backbone)
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)

    def prepared(shift: int) -> MiniBatch:
        """Of the same lengths whatever the shift, but for the last prompt's."""
        ids = ((inputs["ids"] + shift) % 500).tolist()
        prompts = [[7, 8, *row[:3]] for row in ids[:4]] + [[7, *ids[4][: 2 + shift]]]
        answers = [[5 + i, *ids[i][: 1 + i % 4]] for i in range(10)]
        samples = [Sample(i // 2, answer, [-6.2] * len(answer), "length", "") for i, answer in enumerate(answers)]
        rollout = Rollout(prompts, samples)
        [mini] = pack_rollout(
            rollout, minibatches=1, budget=512, padded=False, device=model.device, rng=np.random.default_rng(0)
        )
        ppo.estimate(model, [mini], rollout, [float(i % 3) for i in range(10)], 0.1, config)
        return mini

    def gradients(mini: MiniBatch, on: bool) -> list[torch.Tensor]:
        graphs.on = on
        [metrics], norm = ppo._gradients(model, optimizer, mini, 0.1, config, False)
        return [p.grad.clone() for p in model.trainable() if p.grad is not None] + [*metrics.values(), norm]

    def move(seed: int) -> None:
        with torch.no_grad():
            for i, p in enumerate(model.trainable()):
                p.copy_(randn(p.device, 100 * seed + i, *p.shape, scale=0.05))

    move(1)
    first, second = prepared(0), prepared(1)
    for _ in range(update_graphs.MAKE_AT):
        gradients(first, replays)
    missing = torch.tensor(int(replays and len(graphs.made) != 1), device=model.device)
    move(2)
    pairs = zip(gradients(second, replays), gradients(second, False), strict=True)
    return {"differing": torch.stack([sum((a != b).sum() for a, b in pairs), missing])}  # type: ignore[list-item]


def cases() -> list[Case]:
    return [
        Case(
            "updates as CUDA graphs",
            ("decoder_layer", "linear_ppo_loss", "ppo_value_loss"),
            _plain_llama,
            _updates,
            (),
            _plain_llama,
            checks=("error", "determinism"),
        ),
        Case(
            "decoding steps as CUDA graphs",
            ("decoder_layer", "sample"),
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
