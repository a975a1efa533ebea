"""What a run takes of a device's memory, counted from shapes alone, and the micro-batch that this leaves room for.

What is not known beforehand is taken as large as it can be: answers of ``sample.max_new_tokens``, and where prompts are not
known ``max_prompt_tokens`` for each, with no prefix in common, and a head that reads every token.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo import memory
from fastppo.batch.buckets import padded_tokens
from fastppo.batch.decoding import FOLD_FROM, GRAPHS_FROM, PAGE, head_dim_of, in_pages, pages_of
from fastppo.batch.token_tree import build_tree, common_prefix
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.machine import memory_of_host
from fastppo.memory import DTYPES, GROUPS, Batch, Head, Layer, Machine
from fastppo.model.adapters import POLICY, adapter_tensors
from fastppo.model.llama_trunk import window_of
from fastppo_kernels import AttentionMemory, TreeLayout, attention_memory, row_multiple

GIB = 1 << 30
# GiB as torch finds them, which is less than the names say.
GPUS = {
    "l4": 22.0, "rtx3090": 23.6, "rtx4090": 23.5, "a100-40": 39.4, "l40s": 44.4,
    "a100-80": 79.1, "h100-80": 79.1, "h200": 139.7,
}  # fmt: skip
# Tokens of a micro-batch. With the most nothing gets faster any more; on a CPU fewer, which its caches hold, are the fastest.
MOST_TOKENS = {"cuda": 8192, "cpu": 2048}
# With so many a GPU is busy: from there on, keeping activations is worth more than further tokens.
ENOUGH_TOKENS = 2048
# FLOPs of a layer's products over a micro-batch, forward and backward, up to which a fast GPU is done with them sooner than the
# host launches all that a layer is made of: 53 launches at 8 us against 400 TFLOP/s. A guess.
HOST_BOUND = 1.7e11
STEP = 256  # of tokens, between micro-batches that are looked at
# Of a GPU: for what is no tensor (CUDA's context, loaded kernels, cuBLAS's workspaces), and the part that is lost in gaps
# between the allocator's blocks.
CONTEXT, GAPS = GIB, 0.05
NF4_BYTES = 0.5 + 4 / 64  # of a weight: four bits, and a float32 scale for 64 of them


@dataclass(frozen=True)
class Device:
    """kind: cuda or cpu. memory: bytes; of the host for a CPU. threads: of torch on a CPU."""

    kind: str
    memory: int
    name: str
    threads: int = 1

    @staticmethod
    def of(device: torch.device) -> Device:
        """Of a GPU all memory, whatever others hold of it now: a run that is resumed must come to the same micro-batch."""
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            return Device("cuda", found.total_memory, found.name)
        return Device("cpu", memory_of_host()[0], "the CPU", torch.get_num_threads())

    @staticmethod
    def named(text: str) -> Device:
        """One of `GPUS`, or a GPU of a size such as 24GiB.

        Raises:
            UserError: neither.
        """
        known, size = GPUS.get(text.lower()), re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(gib|gb)", text.lower())
        if known is not None:
            return Device("cuda", int(known * GIB), text.lower())
        if size is None or not float(size[1]):
            raise UserError(f"--gpu: {text!r} is not allowed; expected one of {', '.join(GPUS)}, or a size such as 24GiB")
        return Device("cuda", int(float(size[1]) * (GIB if size[2] == "gib" else 1e9)), f"a GPU of {text}")

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def usable(self) -> int:
        return max(0, int(self.memory * (1 - GAPS)) - CONTEXT) if self.cuda else self.memory


@dataclass(frozen=True)
class Sizes:
    """What is counted of a model with the policy's adapter on it.

    base: bytes of its weights. linear: weights of its linear layers but the head. adapter: parameters of an adapter, and
    factored: rows and columns of its matrices. vocab, hidden: of the head. layer: None where the trunk is not of Llama's shape.
    outputs: of all linear layers, entries a token. cache: entries of keys and values a token. head_dim: of keys. positions: the
    most that it knows, if it says so. itemsize: bytes of its numbers. blocks: whether it can be computed again block by block.
    windowed: whether a layer's attention has a window.
    """

    base: int
    linear: int
    adapter: int
    factored: int
    vocab: int
    hidden: int
    layers: int
    layer: Layer | None
    outputs: int
    cache: int
    head_dim: int
    positions: int | None
    itemsize: int
    blocks: bool
    windowed: bool = False


def sizes_of(peft: PeftModel, *, llama: bool, nf4: bool = False) -> Sizes:
    """Of a model that `add_policy` gave, on any device. llama: whether `LlamaTrunk` suits it. nf4: its linear layers are."""
    model: Any = peft.base_model.model
    config, trunk, head = model.config.get_text_config(), model.base_model, model.get_output_embeddings()
    linear = {name: m for name, m in trunk.named_modules() if "lora_" not in name and _is_linear(m)}
    # In 4 bits a weight has not as many entries as it stands for.
    weights = sum(m.in_features * m.out_features if isinstance(m, nn.Linear) else m.weight.numel() for m in linear.values())
    rest = {id(m.weight) for m in linear.values()} if nf4 else set()
    base = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" not in n and id(p) not in rest)
    blocks = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
    # Code of its own may know other names: then the count is rough, and training goes on all the same.
    layers = getattr(config, "num_hidden_layers", None) or max(1, len(blocks))
    heads = getattr(config, "num_attention_heads", None) or 1
    width = head_dim_of(config, head.weight.shape[1])
    return Sizes(
        base=base + (int(weights * NF4_BYTES) if nf4 else 0),
        linear=weights,
        adapter=sum(p.numel() for p in adapter_tensors(peft, POLICY).values()),
        factored=sum(sum(p.shape) for p in adapter_tensors(peft, POLICY).values()),
        vocab=head.weight.shape[0],
        hidden=head.weight.shape[1],
        layers=layers,
        layer=_layer(trunk.layers[0], fused=not nf4) if llama else None,
        outputs=sum(_outputs(m) for m in linear.values()),
        cache=2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width,
        head_dim=width,
        positions=getattr(config, "max_position_embeddings", None),
        itemsize=head.weight.element_size(),
        blocks=llama or bool(blocks),
        windowed=llama and any(window_of(layer.self_attn) is not None for layer in trunk.layers),
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, transposed


def _outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]


def _layer(layer: Any, fused: bool) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    modules = {name: getattr(attention if name in "qkvo" else mlp, f"{name}_proj") for group in GROUPS for name in group}
    width = attention.head_dim
    return Layer(
        hidden=modules["q"].in_features,
        inner=modules["gate"].out_features,
        heads=modules["q"].out_features // width,
        kv_heads=modules["k"].out_features // width,
        head_dim=width,
        ranks={name: getattr(module, "r", {}).get(POLICY, 0) for name, module in modules.items()},
        qk_norm=hasattr(attention, "q_norm"),
        fused=fused,
    )


# -- counting -------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """when: always, update, sampling or graphs (held between updates). how: the count in words."""

    name: str
    when: str
    bytes: int
    how: str


class Prompts(NamedTuple):
    """Of all prompts: tokens of the longest, of the prefix that they share, and of the mean (None: not known)."""

    longest: int
    shared: int = 0
    mean: float | None = None

    @staticmethod
    def of(prompts: Sequence[Sequence[int]]) -> Prompts:
        """Of these, token ids, at least one of them; a last token of its own is left to each, as the sampler does."""
        lengths = [len(prompt) for prompt in prompts]
        return Prompts(max(lengths), min(common_prefix(prompts), min(lengths) - 1), sum(lengths) / len(lengths))

    @staticmethod
    def longest_allowed(sizes: Sizes, config: Config) -> Prompts:
        """Before data is read: as long as a run accepts them, with nothing in common."""
        new = config.sample.max_new_tokens
        return Prompts(min(config.max_prompt_tokens, max(1, (sizes.positions or config.max_prompt_tokens + new) - new)))


def machine_of(cuda: bool, itemsize: int) -> Machine:
    return Machine(cuda, itemsize, 1 if cuda else row_multiple(torch.device("cpu"), DTYPES[itemsize]))


@dataclass(frozen=True)
class Choice:
    """tokens: of a micro-batch. activations: keep, recompute or offload. notices: what is new to the user in that. too_much:
    what does not fit, and what to change; empty where all does. A line each. graphs: whether the update may be replayed as CUDA
    graphs."""

    tokens: int
    activations: str
    notices: tuple[str, ...] = ()
    too_much: tuple[str, ...] = ()
    graphs: bool = False


@dataclass(frozen=True)
class Budget:
    """A model with these settings and prompts on a device."""

    sizes: Sizes
    config: Config
    device: Device
    prompts: Prompts

    @property
    def group(self) -> int:
        """Tokens of the longest prompt with its samples, which stay in one micro-batch."""
        return self.prompts.longest + self._answers

    @property
    def _answers(self) -> int:
        """Tokens of a prompt's samples that are computed: of each the last is only a target."""
        return self.config.ppo.samples * (self.config.sample.max_new_tokens - 1)

    def filled(self, tokens: int) -> int:
        """Of a micro-batch of so many tokens those that a step of PPO or SFT fills: both may have fewer."""
        if self.sizes.layer is None:  # which may run padded
            return tokens
        config, (longest, shared, mean) = self.config, self.prompts
        own = round(mean or longest) - shared
        prompts = -(-config.ppo.prompts // config.ppo.minibatches)
        of_sft = config.sft.batch_size * (own + config.sample.max_new_tokens) if config.sft.examples else 0
        of_ppo = prompts * (own + self._answers) if config.ppo.iterations else 0
        return min(tokens, max(self.group, shared + max(of_sft, of_ppo)))

    @property
    def _adapters(self) -> int:
        """How many are trained."""
        return 2 if self.config.value.trunk == "own" else 1

    @property
    def _machine(self) -> Machine:
        return machine_of(self.device.cuda, self.sizes.itemsize)

    @cached_property
    def room(self) -> int:
        """What `fixed` leaves."""
        return self.device.usable - sum(part.bytes for part in self.fixed())

    def fixed(self) -> Iterator[Part]:
        """What is there all the time."""
        sizes, config = self.sizes, self.config
        critic = sizes.hidden + 1
        trained = self._adapters * sizes.adapter + critic
        yield Part("base", "always", sizes.base, "its frozen weights")
        if sizes.layer is not None and self._machine.borders(sizes.layer):
            beside = sizes.layers * memory.borders(sizes.layer, self._machine)
            yield Part("borders", "always", beside, "room for an adapter beside each frozen weight")
        numbers = f"{sizes.adapter:,} fp32 parameters of rank {config.lora.rank}"
        yield Part("policy", "always", 4 * sizes.adapter, numbers)
        if config.ppo.iterations and config.ppo.kl_coef > 0 and config.ppo.reference == "start":
            yield Part("reference", "always", 4 * sizes.adapter, "a frozen copy of the policy's adapter")
        own = " and an adapter of its own" if self._adapters > 1 else ""
        yield Part("critic", "always", 4 * (trained - sizes.adapter), f"a linear head{own}")
        yield Part("gradients", "always", 4 * trained, f"fp32, of {trained:,} trained parameters")
        if config.ppo.optimizer == "adamw" or config.sft.examples:
            yield Part("optimizer", "always", 8 * trained, "AdamW: two fp32 moments a trained parameter")
        else:
            averages = 4 * (self._adapters * sizes.factored + sizes.hidden + 2)  # of the head's one row, its columns, its bias
            yield Part("optimizer", "always", averages, "Adafactor: an fp32 average a row and a column of each matrix")

    def sampling(self, tokens: int) -> Iterator[Part]:
        """What is there while the sampler runs. tokens: of a micro-batch, in which prompts are prefilled too."""
        sizes, config, (longest, shared, _) = self.sizes, self.config, self.prompts
        slots, own = max(config.sample.slots, config.ppo.samples), longest - shared
        capacity = own + config.sample.max_new_tokens
        places, words = slots * capacity, f"{slots:,} slots of {capacity:,} tokens"
        # A prompt's samples share its pages; evaluation takes one of each, and fills all slots with prompts. Nothing is shared
        # either where a model runs padded, as any may whose layers are not known.
        shapes = ((slots, config.ppo.samples), (config.sample.slots, 1))
        pages = max(pages_of(*shape, own, config.sample.max_new_tokens) for shape in shapes)
        paged = in_pages(torch.device(self.device.kind), DTYPES[sizes.itemsize], sizes.head_dim)
        if paged and (sizes.layer is not None or pages * PAGE > places):
            places, words = pages * PAGE, f"{pages:,} pages of {PAGE} tokens for {slots:,} slots"
        cache = (places + shared) * sizes.cache * sizes.itemsize
        yield Part("KV cache", "sampling", cache, f"{words}, and {shared:,} for all of them")
        at_once = max(own, min(tokens, config.sample.slots * own))  # of evaluation's prompts
        prefill = at_once * sizes.cache * sizes.itemsize
        if sizes.layer is not None:
            prefill += memory.layer_forward(sizes.layer, self._machine, Batch(at_once, at_once, at_once))
        yield Part("prefill", "sampling", prefill, f"keys and values of {at_once:,} tokens, and a layer's forward")
        copies = "two float32 copies"
        logits = slots * sizes.vocab * (sizes.itemsize + 8)
        if self.device.cuda and sizes.layer is not None and config.sample.max_new_tokens >= GRAPHS_FROM:
            # The draw's kernels copy nothing, but CUDA graphs have memory of their own.
            copies, logits = "a float32 copy, both in CUDA graphs once more", 2 * slots * sizes.vocab * (sizes.itemsize + 4)
        yield Part("logits", "sampling", logits, f"{slots:,} rows of {sizes.vocab:,}, and {copies}")
        folds = not self.device.cuda and sizes.itemsize == 4 and sizes.layer is not None and sizes.layer.fused
        if folds and config.sample.max_new_tokens >= FOLD_FROM:
            yield Part("folded weights", "sampling", 4 * sizes.linear, "linear layers with the adapter in them, on a CPU")

    def update(self, tokens: int, activations: str, *, padded: bool = False) -> tuple[Part, Part]:
        """What forward and backward of a micro-batch take: activations, and what the head adds to their peak. padded: with the
        padding that CUDA graphs need."""
        sizes, cuda, tokens = self.sizes, self.device.cuda, self.filled(tokens)
        tokens = padded_tokens(tokens) if padded else tokens
        head = Head(sizes.vocab, sizes.itemsize)
        chunk = head.chunk_rows(cuda)
        if sizes.layer is None:
            trunk = self._coarse(tokens, activations)
            whole = trunk + head.chunk_bytes(cuda, min(chunk, tokens))
        else:
            run = partial(memory.micro_batch, sizes.layer, sizes.layers, head, self._machine, self._batch(tokens))
            trunk, whole = (run(activations=activations, passes=self._adapters, chunk=each) for each in (False, True))
        how = {"keep": "kept", "recompute": "blocks' inputs and one block", "offload": "one block, blocks' inputs on the host"}
        words = "peak of forward and backward" if sizes.layer else "roughly, from the widths of linear layers"
        return (
            Part("activations", "update", trunk, f"{tokens:,} tokens, {how[activations]}: {words}"),
            Part("logits chunk", "update", whole - trunk, f"{chunk:,} rows of {sizes.vocab:,}: what it adds to that peak"),
        )

    def _coarse(self, tokens: int, activations: str) -> int:
        """Of a trunk that runs module by module: each linear layer's input and output, and a few states as wide as it is."""
        sizes = self.sizes
        a_layer = tokens * (2 * sizes.outputs // sizes.layers + 6 * sizes.hidden) * sizes.itemsize
        start = 0 if activations == "offload" and self.device.cuda else tokens * sizes.hidden * sizes.itemsize
        kept = sizes.layers * a_layer if activations == "keep" else sizes.layers * start + a_layer
        return self._adapters * kept + 2 * a_layer

    def _batch(self, tokens: int) -> Batch:
        """So many tokens, of prompts of the mean length (not known: the longest, and every token is read by the head)."""
        assert self.sizes.layer is not None
        longest, shared, mean = self.prompts
        samples, new, answers = self.config.ppo.samples, self.config.sample.max_new_tokens, self._answers
        own = max(1, round(mean or longest) - shared)
        groups = max(1, (tokens - shared) // (own + answers))
        own = max(1, (tokens - shared) // groups - answers)
        rows = tokens if mean is None else min(tokens, groups * (answers + 1))
        actions = max(rows, groups * samples * new)
        if self.device.cuda:
            paths = groups * samples * (shared + own + new - 1)
            attention = memory.library_attention(paths, tokens, self.sizes.layer, self._machine)
            return Batch(tokens, rows, actions, attention)
        # No two sequences share a token that they should not: ids count up.
        count = itertools.count()
        root = list(itertools.islice(count, shared))
        sequences, starts = [], []
        for _ in range(groups):
            prompt = [*root, *itertools.islice(count, own)]
            for _ in range(samples):
                sequences.append([*prompt, *itertools.islice(count, new)])
                starts.append(len(prompt))
        return Batch(tokens, rows, actions, self.attention(build_tree(sequences, starts).layout))

    def attention(self, layout: TreeLayout) -> AttentionMemory:
        """On a CPU."""
        layer, sizes = self.sizes.layer, self.sizes
        assert layer is not None
        return attention_memory(
            layout, layer.heads, layer.kv_heads, layer.head_dim, DTYPES[sizes.itemsize],
            backend="torch" if sizes.windowed else "cpu", threads=self.device.threads,
        )  # fmt: skip

    def takes(self, tokens: int, activations: str) -> int:
        return sum(part.bytes for part in self.update(tokens, activations))

    def graphs(self, tokens: int, activations: str) -> Part:
        """What CUDA graphs of the update hold between their replays. Not counted: the graphs themselves, and the copies of the
        trees that they read, a few MiB."""
        held = sum(part.bytes for part in self.update(tokens, activations, padded=True))
        how = f"an update of {padded_tokens(self.filled(tokens)):,} tokens, padding included, held for replays"
        return Part("CUDA graphs", "graphs", held, how)

    # -- choosing ---------------------------------------------------------------------------------------------------------

    def choose(self) -> Choice:
        """The largest micro-batch, up to `MOST_TOKENS`, that leaves room for the rest, and whether blocks are computed again.

        A micro-batch that the settings name is taken as it is, and on a CPU the most is. Activations are kept where that leaves
        `ENOUGH_TOKENS` and the longest prompt with its samples; else what allows most tokens is taken.
        """
        config, blocks = self.config, self.sizes.blocks
        most = config.micro_batch_tokens or MOST_TOKENS[self.device.kind]
        is_given = config.micro_batch_tokens is not None or not self.device.cuda
        wanted = ["keep", "recompute"] if config.activations == "auto" else [config.activations]
        modes = [mode for mode in wanted if mode != "recompute" or blocks] or ["keep"]
        found: dict[str, int] = {}
        for mode in modes:
            steps = [most] if is_given else range(most, 0, -STEP)
            found[mode] = next((tokens for tokens in steps if self.takes(tokens, mode) <= self.room), 0)
            if found[mode] >= min(most, max(ENOUGH_TOKENS, self.group)):
                break
        mode = max(found, key=lambda each: found[each]) if any(found.values()) else modes[-1]  # of equals the first
        tokens = found[mode] or (most if is_given else min(most, STEP))
        notices = []
        if wanted == ["recompute"] and not blocks:
            notices.append("--activations recompute: no blocks are known of this architecture; activations are kept")
        if config.activations == "auto" and mode == "recompute":
            notices.append(
                f"to keep the activations of {self.filled(tokens):,} tokens takes {size(self.takes(tokens, 'keep'))}, "
                f"{size(max(self.room, 0))} are left: blocks are computed again in backward"
            )
        return Choice(tokens, mode, tuple(notices), tuple(self._too_much(tokens, mode)), self._graphs_fit(tokens, mode))

    def _graphs_fit(self, tokens: int, mode: str) -> bool:
        """Whether CUDA graphs of the update are worth their making, and there is room for what they hold: all that an update
        takes stays theirs, while sampling and while a micro-batch runs that has none."""
        sizes = self.sizes
        if not self.device.cuda or sizes.layer is None or not sizes.layer.fused or mode == "offload":
            return False
        if self.config.ppo.kl_target is not None and self.config.ppo.kl_estimator != "k1":
            return False  # the KL weight is in the loss, and another each time: a graph keeps that with which it was made
        if 4 * sizes.linear // sizes.layers * self.filled(tokens) > HOST_BOUND:
            return False
        held = self.graphs(tokens, mode).bytes
        return held + max(held, sum(part.bytes for part in self.sampling(tokens))) <= self.room

    def _too_much(self, tokens: int, mode: str) -> Iterator[str]:
        """What does not fit, and what to change."""
        config, room = self.config, self.room
        where = f"of {size(self.device.usable)} that {self.device.name} has for tensors"
        if room <= 0:
            yield f"base, adapters and optimizer take {size(self.device.usable - room)} {where}: choose a smaller --model"
            return
        needed = self.takes(max(tokens, self.group), mode)
        if needed > room:
            if config.micro_batch_tokens is not None and self.takes(self.group, mode) <= room:
                change = "lower --micro-batch-tokens"
            else:
                longest = f"prompts of up to {self.prompts.longest:,} tokens"
                change = f"shorten {longest}, lower --ppo-samples or --sample-max-new-tokens"
            if mode == "keep" and self.sizes.blocks:
                change += ", or give --activations recompute"
            yield f"a micro-batch takes {size(needed)}, {size(room)} are left {where}: {change}"
        parts = {part.name: part.bytes for part in self.sampling(tokens)}
        while_sampling = sum(parts.values())
        if while_sampling > room:
            slots = max(config.sample.slots, config.ppo.samples)
            a_slot = -(-(parts["KV cache"] + parts["logits"]) // slots)
            fewer = (room - while_sampling) // a_slot + slots
            change = "--micro-batch-tokens and --sample-slots"
            if fewer >= config.ppo.samples:
                change = f"--sample-slots to {fewer:,}"
            yield f"sampling takes {size(while_sampling)}, {size(room)} are left {where}: lower {change}"


def size(amount: int) -> str:
    """Bytes for people."""
    for unit, bytes_of in (("GiB", GIB), ("MiB", 1 << 20)):
        if amount >= bytes_of:
            return f"{amount / bytes_of:.1f} {unit}"
    return f"{amount / 1024:.1f} KiB"
