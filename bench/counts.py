"""What a decoder layer and an update step cost, counted rather than timed, beside peft and beside what none can go below.

    python -m bench.counts [--model 7b] [--tokens 8192] [--length 512] [--rank 16] [--ops] [--json]

One layer, forward and backward, adapters on all seven linear maps, a bfloat16 base; run on meta tensors (`bench.counting` says
how and what that misses), so no GPU is needed. The same sequences go through each, without shared prefixes: what a tree spares
comes on top. `fastppo` is `decoder_layer` as the engine calls it on a GPU: through bordered buffers, peft's float32 adapters,
attention by torch's FlashAttention. `peft` has float32 adapters, too,
as it makes them by itself, without autocast.

The floor has every FLOP that the formulas need, and one pass over what must lie in memory between two products: each norm,
SwiGLU and rotation reads its inputs once and writes its results once, the residual sums ride along, backward makes again what
is cheap; inputs and dY are read once more for dA and dB, S and dS are made and used within the other products.

The step: the layers, all alike, the adapters copied into their buffers, then embedding, last norm, head, both losses, clipping
and AdamW, every token an action.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from fastppo.algorithms.optim import make_optimizer
from fastppo.model.llama_trunk import LlamaTrunk, _norm, _weights
from fastppo_kernels import LoRAWeightBuffer, decoder_layer, linear_ppo_loss, ppo_value_loss
from fastppo_kernels._attention_varlen import varlen_attention

from . import models
from .counting import ATTENTION, COPIES, FROZEN, KINDS, OTHER, TRAINED, Counter, Counts, Tally, as_on_cuda, observe

META = torch.device("meta")
FLOOR, OURS, HALF, PEFT, EAGER = "floor", "fastppo", "peft, bf16 adapters", "peft", "peft, bf16 adapters, eager attention"


@dataclass(frozen=True)
class Case:
    """model: one of `models.NAMES`. tokens: of all sequences, each of `length`. rank: of the adapters."""

    model: str
    tokens: int
    length: int
    rank: int

    @property
    def sequences(self) -> int:
        return self.tokens // self.length

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        return self.sequences * self.length * (self.length + 1) // 2

    @property
    def config(self) -> Any:
        return models.config_of(self.model)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


def peft_model(case: Case, adapters: torch.dtype, attention: str) -> Qwen2ForCausalLM:
    """The model with one layer, frozen, and peft's adapters in it; nothing of it is in memory."""
    config = case.config
    config.layer_types, config.num_hidden_layers = config.layer_types[:1], 1
    config._attn_implementation = attention
    with META:
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        settings = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, settings)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to(adapters)
            module.lora_B.to(adapters)
    return model.eval()


def _leaves(model: nn.Module) -> list[Tensor]:
    return [x for x in model.parameters() if x.requires_grad]


def _frozen(model: nn.Module) -> list[Tensor]:
    return [x for x in model.parameters() if not x.requires_grad]


# -- a layer --------------------------------------------------------------------------------------------------------------


class LayerCall(NamedTuple):
    """A layer as the engine calls it, and what `observe` is to know of its tensors."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    frozen: list[Tensor]
    given: list[Tensor]
    buffers: tuple[LoRAWeightBuffer, ...]


def fastppo_call(case: Case) -> LayerCall:
    model = peft_model(case, torch.float32, "sdpa")
    layer, head_dim = model.model.layers[0], model.model.layers[0].self_attn.head_dim
    x = meta(case.tokens, case.config.hidden_size, grad=True)
    cos, sin = (meta(case.tokens, head_dim) for _ in range(2))
    trunk = LlamaTrunk(model.model)
    trunk.border()
    buffers = trunk.buffers[layer]
    weights = _weights(layer, torch.bfloat16)
    assert weights is not None
    weights = weights._replace(buffers=buffers)
    cu = meta(case.sequences + 1, dtype=torch.int32)
    index, order, start = (meta(n, dtype=torch.int64) for n in (case.tokens, case.tokens, case.tokens + 1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds, scale = (case.length, case.length), head_dim**-0.5
        return varlen_attention(q, k, v, cu, cu, index, order, start, *bounds, scale, None, None, "varlen")[0]

    adapters, given = _leaves(layer), [cos, sin, cu, index, order, start]
    run = lambda: decoder_layer(x, cos, sin, weights, attend, fold=True)  # noqa: E731
    return LayerCall(run, [x, *adapters], _frozen(layer), [*adapters, *given], buffers)


def fastppo_layer(case: Case) -> Counts:
    run, leaves, frozen, given, buffers = fastppo_call(case)
    return observe(run, leaves, frozen=frozen, given=given, pairs=case.pairs, buffers=buffers)


def refreshed(case: Case) -> Counts:
    """A layer's adapters copied into its buffers, once a step: to the products they are as if they had always been there."""
    buffers, counter = fastppo_call(case).buffers, Counter()
    with as_on_cuda(counter), counter:
        for buffer in buffers:
            buffer.refresh(force=True)
    return counter.counts


def peft_layer(case: Case, adapters: torch.dtype, attention: str = "sdpa") -> Counts:
    layer = peft_model(case, adapters, attention).model.layers[0]
    shape = case.sequences, case.length
    x = meta(*shape, case.config.hidden_size, grad=True)
    positions = meta(1, case.length, layer.self_attn.head_dim), meta(1, case.length, layer.self_attn.head_dim)
    mask = meta(1, 1, case.length, case.length) if attention == "eager" else None
    trained = _leaves(layer)
    return observe(
        lambda: layer(x, attention_mask=mask, position_embeddings=positions), [x, *trained],
        frozen=_frozen(layer), given=[*trained, *positions, *([] if mask is None else [mask])], pairs=case.pairs,
    )  # fmt: skip


def floor_layer(case: Case) -> Counts:
    """See the module's docstring; a table of what is left once all that can be fused is."""
    c, counts = case.config, Counts()
    hidden, inner, head = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * head, c.num_key_value_heads * head
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (inner, hidden), (inner, hidden)]
    shapes.append((hidden, inner))
    weights, adapters = sum(n * k for n, k in shapes), sum(case.rank * (n + k) for n, k in shapes)
    entry = 2 * case.tokens  # bytes of a bfloat16 number of each token
    inputs, outputs = 2 * hidden + queries + inner, sum(n for n, _ in shapes)
    counts.add(FROZEN, FLOOR, Tally(14, 4.0 * weights * case.tokens))
    counts.add(TRAINED, FLOOR, Tally(4 + 7, 6.0 * adapters * case.tokens, entry * (inputs + outputs + 4 * 7 * case.rank)))
    counts.add(ATTENTION, FLOOR, Tally(2, 14.0 * case.pairs * queries))
    # Forward: two sums with the norm behind them (two read, two written), rotation, SwiGLU. Backward: SwiGLU's gradients and h
    # from three; twice a norm's result again and its gradient, with the residual's added, from three; rotation.
    passes = 2 * 4 * hidden + 2 * (queries + keys) + 3 * inner + 6 * inner + 2 * 5 * hidden + 2 * (queries + keys)
    counts.add(OTHER, FLOOR, Tally(8, 0, entry * passes))
    # x, y; queries, keys, values, the attention's result and its denominators; gate, up; S.
    kept = 2 * hidden + 2 * queries + 2 * keys + 2 * inner + 7 * case.rank
    counts.saved = entry * kept + 4 * case.tokens * c.num_attention_heads
    return counts


def layers(case: Case) -> dict[str, Counts]:
    """By name, forward and backward of one layer."""
    return {
        FLOOR: floor_layer(case),
        OURS: fastppo_layer(case),
        HALF: peft_layer(case, torch.bfloat16),
        PEFT: peft_layer(case, torch.float32),
        EAGER: peft_layer(case, torch.bfloat16, "eager"),
    }


# -- a step ---------------------------------------------------------------------------------------------------------------


def _ends(case: Case, loss: Callable[[Tensor, dict[str, Any]], tuple[Tensor, Tensor]]) -> Counts:
    """Embedding, last norm, head and losses. loss: (input of the norm, all else by name) -> the policy's and the values'."""
    model = peft_model(case, torch.float32, "sdpa")
    head, embedding, norm = model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm
    value_head = nn.Linear(case.config.hidden_size, 1, device=META)
    hidden = meta(case.tokens, case.config.hidden_size, grad=True)
    ids = meta(case.tokens, dtype=torch.int64)
    known = {name: meta(case.tokens, dtype=torch.float32) for name in ("old_logprob", "advantages", "old_values", "returns")}
    parts = {"norm": norm, "head": head, "value_head": value_head, "targets": ids, **known}

    def forward() -> Tensor:
        F.embedding(ids, embedding)
        policy, value = loss(hidden, parts)
        return policy + 0.5 * value

    trained = list(value_head.parameters())
    frozen, given = [head, embedding, norm.weight], [*trained, ids, *known.values()]
    return observe(forward, [hidden, *trained], frozen=frozen, given=given)


def fastppo_ends(case: Case) -> Counts:
    def loss(hidden: Tensor, parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        states = _norm(parts["norm"], hidden)
        policy, *_ = linear_ppo_loss(
            states, parts["head"], parts["targets"], parts["old_logprob"], parts["advantages"], denominator=case.tokens
        )
        values = parts["value_head"](states.float())[:, 0]
        value, _ = ppo_value_loss(values, parts["old_values"], parts["returns"], denominator=case.tokens)
        return policy, value

    return _ends(case, loss)


def plain_ends(case: Case) -> Counts:
    """Logits, log-softmax and losses written down in torch, with the entropy as a metric."""

    def loss(hidden: Tensor, parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        states = parts["norm"](hidden)
        logprobs = F.linear(states, parts["head"]).float().log_softmax(-1)
        with torch.no_grad():
            (logprobs.exp() * logprobs).sum(-1)
        ratio = (logprobs.gather(1, parts["targets"][:, None])[:, 0] - parts["old_logprob"]).exp()
        policy = torch.max(-parts["advantages"] * ratio, -parts["advantages"] * ratio.clamp(0.8, 1.2)).mean()
        values, old = parts["value_head"](states.float())[:, 0], parts["old_values"]
        clipped = old + (values - old).clamp(-0.2, 0.2)
        errors = torch.max((values - parts["returns"]).square(), (clipped - parts["returns"]).square())
        return policy, 0.5 * errors.mean()

    return _ends(case, loss)


def optimizer_step(case: Case) -> Counts:
    """Clipping and AdamW of the adapters of all layers: peft's float32 tensors, the same for each engine."""
    shapes = [x.shape for x in _leaves(peft_model(case, torch.float32, "sdpa").model.layers[0])]
    parameters = [nn.Parameter(meta(*shape, dtype=torch.float32)) for shape in shapes * case.config.num_hidden_layers]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    counter = Counter()
    with as_on_cuda(counter):
        optimizer = make_optimizer(parameters, 1e-5, 1e-8)
        optimizer.step()  # which makes the moments
    with as_on_cuda(counter), counter:
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
    return counter.counts


def floor_ends(case: Case) -> Counts:
    """Embedding, norm, head and loss."""
    c, counts = case.config, Counts()
    vocab, hidden, entry = c.vocab_size, c.hidden_size, 2 * case.tokens
    counts.add(FROZEN, FLOOR, Tally(2, 4.0 * case.tokens * vocab * hidden))
    # The logits and their gradient; the embedding; the norm forward and backward.
    counts.add(OTHER, FLOOR, Tally(4, 0, entry * (2 * vocab + 2 * hidden + 2 * hidden + 3 * hidden)))
    counts.saved = 2.0 * entry * hidden  # the norm's input, and the gradient of what it gives
    return counts


def floor_optimizer(case: Case) -> Counts:
    """AdamW reads four numbers of each parameter and writes three; the norm of the gradients is one pass."""
    counts = Counts()
    parameters = sum(x.numel() for x in _leaves(peft_model(case, torch.float32, "sdpa").model.layers[0]))
    counts.add(OTHER, FLOOR, Tally(2, 0, 4.0 * (1 + 7) * parameters * case.config.num_hidden_layers))
    return counts


def steps(case: Case, of_layer: dict[str, Counts]) -> dict[str, Counts]:
    """By name, a whole update step of one micro-batch."""
    number, optimizer, plain = case.config.num_hidden_layers, optimizer_step(case), plain_ends(case)
    ends = {FLOOR: (floor_ends(case), floor_optimizer(case)), OURS: (fastppo_ends(case), optimizer)}
    found = {}
    for name in (FLOOR, OURS, HALF, PEFT):
        head, update = ends.get(name, (plain, optimizer))
        found[name] = head.plus(update).plus(of_layer[name], number)
    found[OURS] = found[OURS].plus(refreshed(case), number)
    return found


# -- what is printed ------------------------------------------------------------------------------------------------------


def table(title: str, found: dict[str, Counts]) -> Table:
    columns = ("", "frozen GEMMs TFLOP", "adapters TFLOP", "attention TFLOP", "adapter GEMMs GB", "copies, casts GB")
    made = Table(*columns, "other kernels GB", "launches", "saved GB", title=title, box=MARKDOWN, title_justify="left")
    for name, counts in found.items():
        flops = (f"{counts.of(kind).flops / 1e12:.3f}" for kind in (FROZEN, TRAINED, ATTENTION))
        moved = (f"{counts.of(kind).bytes / 1e9:.2f}" for kind in (TRAINED, COPIES, OTHER))
        made.add_row(name, *flops, *moved, f"{counts.of().launches:.0f}", f"{counts.saved / 1e9:.2f}")
    return made


def table_of_ops(title: str, counts: Counts) -> Table:
    """Every operator, those that move the most first."""
    made = Table("operator", "counted as", "launches", "GB", "TFLOP", title=title, box=MARKDOWN, title_justify="left")
    for (kind, name), tally in sorted(counts.ops.items(), key=lambda entry: -entry[1].bytes):
        made.add_row(name, kind, f"{tally.launches:.0f}", f"{tally.bytes / 1e9:.3f}", f"{tally.flops / 1e12:.4f}")
    return made


def as_json(counts: Counts) -> dict[str, Any]:
    kinds = {kind: asdict(counts.of(kind)) for kind in KINDS}
    ops = [{"op": name, "kind": kind, **asdict(tally)} for (kind, name), tally in counts.ops.items()]
    return {"kinds": kinds, "launches": counts.of().launches, "saved_bytes": counts.saved, "ops": ops}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=models.NAMES, default="7b", help="whose dimensions (default: 7b)")
    for name, default, what in (
        ("tokens", 8192, "of all sequences"), ("length", 512, "tokens of a sequence"), ("rank", 16, "of the adapters")
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--ops", action="store_true", help="also every operator")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args(arguments)
    case = Case(args.model, args.tokens, args.length, args.rank)
    for name in ("tokens", "length", "rank"):
        if getattr(case, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(case, name)}")
    if case.tokens % case.length:
        parser.error(f"--tokens must be a multiple of --length, got {case.tokens} and {case.length}")
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: what is counted are its kernels", file=sys.stderr)
        return 2
    of_layer = layers(case)
    of_step = steps(case, of_layer)
    if args.json:
        found = {"layer": of_layer, "step": of_step}
        listed = {part: {name: as_json(counts) for name, counts in each.items()} for part, each in found.items()}
        print(json.dumps(asdict(case) | listed, indent=1))
        return 0
    console = Console(width=200)
    sizes = f"{case.model}, {case.tokens} tokens in sequences of {case.length}, rank {case.rank}, bf16"
    console.print(table(f"One layer, forward and backward: {sizes}", of_layer))
    console.print(table(f"One update step, {case.config.num_hidden_layers} layers: {sizes}", of_step))
    if args.ops:
        for part, found in (("layer", of_layer), ("update step", of_step)):
            for name, counts in found.items():
                console.print(table_of_ops(f"One {part}: {name}", counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
