"""How fast the engine's update and its sampler are on models of real dimensions, beside what the device can do.

    python -m bench.engine (update | decode) --model 0.5b [--device cuda] [--minutes N] [--out FILE]

Random weights (bf16 on a GPU, float32 on the CPU), fp32 adapters of rank 16 on all linear layers, everything else as in a
training run. Figures are kept after each measurement; the same command goes on with those that are missing. The exit status is
0 where all are measured (out of memory is a result, told in the notes) and 3 where the time was not enough.

**Update**: `ppo.update` over GSM8K-like trees (prompts of 100 tokens, 4 samples of 256 new ones), two micro-batches a step, for
several numbers of tokens a micro-batch; figures that do not name theirs are of the first that fits (`trees` in the data).

    MFU = FLOPs / seconds / measured rate of the best bare GEMM in the base's dtype
    FLOPs = T (4 N + 6 A) + 4 R H V + 12 D P

T: tokens of the trees. N: weights of the adapted linear layers (frozen: one product forward and one for the input's gradient,
2 FLOPs each). A: weights of the adapters (one product more, for their own gradients). R: rows of hidden states that the head
reads, with H V weights. P: pairs of a query and a key that it sees, which is the sum over the tokens of their depth in the
tree, each counting itself. D: width of all heads' queries, summed over the layers; two products forward, four backward. What
an implementation computes twice counts as time, not as FLOPs; norms, the loss and the optimizer count as time alone. Where the
update can be replayed as CUDA graphs it is measured with them, too, padding included, in turn without; what does not say so is
without them and without padding.

**Decode**: seconds from step to step of `generate` (trunk, head, drawing, and what the host does between them), and of the
decoder's step alone, with the adapter beside the base's own layers, which is what merged weights cost; both alternate in one
run. The floor of a step is what it must read (weights, adapter, keys and values) over the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from fastppo.algorithms import optim, ppo
from fastppo.batch.rollout import MicroBatch, MiniBatch, Rollout, Sample, pack_rollout
from fastppo.config import Config, LoraConfig, PpoConfig
from fastppo.model import update_graphs
from fastppo.model.actor_critic import POLICY, ActorCritic
from fastppo.rollout.decoder import make_decoder
from fastppo.rollout.sampler import Sampling, generate
from fastppo.trainer import make_torch_repeatable

from . import memory, models
from .gpu_checks.run import same
from .limits import ceilings
from .record import Figure, Record, folder_of, machine, sources

SOURCES = (
    "fastppo", "kernels/fastppo_kernels", "bench/engine.py", "bench/models.py", "bench/memory.py", "bench/limits.py",
    "bench/timing.py",
)  # fmt: skip
RANK = 16
SHOWN = ("MFU", "tokens/s", "ms per micro-batch", "ms per step", "overhead", "share of bandwidth floor", "MiB")  # printed


@dataclass(frozen=True)
class Sizes:
    """prompt, new: tokens. samples: of a prompt. budgets: tokens of the tree a micro-batch, the one that the goal is about
    first. batches: sequences decoded together. steps: of decoding, a measurement. repeats: measurements, where time allows."""

    prompt: int = 100
    new: int = 256
    samples: int = 4
    budgets: tuple[int, ...] = (8192, 16384, 4096, 2048)
    batches: tuple[int, ...] = (64, 1, 16, 256)
    steps: int = 32
    repeats: int = 3


REAL = Sizes()
TINY = Sizes(prompt=24, new=16, samples=4, budgets=(512, 256), batches=(4, 1), steps=8, repeats=2)


def sizes_of(name: str) -> Sizes:
    return TINY if name == "tiny" else REAL


def open_record(part: str, device: torch.device, settings: dict[str, Any], out: Path) -> Record:
    """The record in `out` where it is of the same sources, machine and settings and not complete; else a new one."""
    here = machine(device) | {"sources": sources(*SOURCES)}
    stored = Record.load(out)
    if stored is not None and not stored.complete and stored.settings == settings:
        if same(stored.machine, here) and stored.machine.get("sources") == here["sources"]:
            return stored
    record = Record(part, here, settings)
    record.follow(stored)
    return record


class Measurement:
    """One part: a record, what of it is measured already, and when to stop."""

    def __init__(self, part: str, device: torch.device, sizes: Sizes, settings: dict[str, Any], out: Path, deadline: float):
        self.device, self.sizes, self.out, self.deadline = device, sizes, out, deadline
        plain = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(sizes).items()}
        self.record = open_record(part, device, settings | plain, out)
        self.before, self.begun = self.record.seconds, time.monotonic()
        self.record.data.setdefault("measured", [])
        self.record.data["about"] = __doc__
        self.prefix = ""  # of the names of figures

    def todo(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.record.data["measured"]]

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def save(self) -> None:
        self.record.seconds = round(self.before + time.monotonic() - self.begun, 1)
        self.record.save(self.out)

    def figure(self, name: str, raw: list[float], unit: str, better: str | None = None) -> None:
        self.record.figures[self.prefix + name] = Figure.of(raw, unit, better)

    def measure(self, name: str, prefix: str, call: Callable[[], None]) -> None:
        """Measure what is called so, keep it; out of memory is a result."""
        self.prefix = prefix
        try:
            call()
        except torch.OutOfMemoryError as error:
            self.note(f"{name}: out of memory ({str(error).splitlines()[0][:120]})")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.record.data["measured"].append(name)
        self.save()
        found = {key.removeprefix(prefix): x for key, x in self.record.figures.items() if key.startswith(prefix)}
        shown = [f"{key} {found[key].value:.4g} {found[key].unit}" for key in SHOWN if key in found]
        print(f"{self.record.part}, {name}: {', '.join(shown) or self.record.notes[-1]}", flush=True)

    def note(self, line: str) -> None:
        if line not in self.record.notes:
            self.record.notes.append(line)

    def finish(self, names: list[str]) -> int:
        self.record.complete = not self.todo(names)
        self.save()
        return 0 if self.record.complete else 3


def make_model(name: str, device: torch.device, budget: int) -> ActorCritic:
    """The actor-critic that a run with default settings would have on this base; nothing ends an answer but its length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = replace(models.random_base(name, device, dtype), eos_ids=())
    settings = Config(lora=LoraConfig(rank=RANK), ppo=PpoConfig(epochs=1, minibatches=1), micro_batch_tokens=budget)
    return models.keep_micro_batch(ActorCritic(base, settings))


def random_prompts(sizes: Sizes, n: int, vocab: int) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(2, vocab) for _ in range(sizes.prompt)] for _ in range(n)]


# -- the update -----------------------------------------------------------------------------------------------------------


def made_rollout(sizes: Sizes, budget: int, vocab: int) -> Rollout:
    """As many prompts as fill two micro-batches, with random answers."""
    group = sizes.prompt + sizes.samples * (sizes.new - 1)
    prompts = random_prompts(sizes, 2 * max(1, budget // group), vocab)
    rng = random.Random(0)
    answers = [[rng.randrange(2, vocab) for _ in range(sizes.new)] for _ in range(len(prompts) * sizes.samples)]
    uniform = [-float(np.log(vocab))] * sizes.new
    samples = [Sample(i // sizes.samples, answer, uniform, "length", "") for i, answer in enumerate(answers)]
    return Rollout(prompts, samples)


def update_flops(model: ActorCritic, parts: list[MicroBatch]) -> dict[str, float]:
    """FLOPs of forward and backward over these trees by what they are for; see the module's docstring for the formula."""
    layers = [m for m in model.peft.modules() if isinstance(m, BaseTunerLayer)]
    weights = sum(layer.get_base_layer().weight.numel() for layer in layers)
    adapters = sum(p.numel() for p in model.adapter_tensors(POLICY).values())
    config = model.base.model.config
    width = config.num_hidden_layers * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    tokens = sum(part.tree.n_tokens for part in parts)
    rows = sum(part.tree.head_rows.shape[0] for part in parts)
    pairs = sum(int((part.tree.positions + 1).sum()) for part in parts)
    return {
        "base": 4.0 * weights * tokens,
        "adapters": 6.0 * adapters * tokens,
        "head": 4.0 * model.backbone.head.weight.numel() * rows,
        "attention": 12.0 * width * pairs,
    }


class _Marks:
    """Instants on the device, without waiting for it between them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self()

    def __call__(self) -> None:
        mark: Any = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self.marks.append(mark)

    def seconds(self) -> list[float]:
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Wall-clock seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure_update(run: Measurement, model: ActorCritic, budget: int, rate: float) -> None:
    """One optimizer step over two micro-batches of `budget` tokens. rate: FLOP/s of a bare GEMM."""
    config = replace(model.config, micro_batch_tokens=budget)
    rollout = made_rollout(run.sizes, budget, model.base.model.config.vocab_size)
    minis = pack_rollout(
        rollout, minibatches=1, budget=budget, padded=not model.backbone.packed, device=run.device, rng=np.random.default_rng(0)
    )
    parts = [part for mini in minis for part in mini.parts]
    rewards = [float(i % 2) for i in range(len(rollout.samples))]
    optimizer = optim.make_optimizer(model.trainable(), 1e-5, config.ppo.adam_eps)

    def estimate() -> None:
        ppo.estimate(model, minis, rollout, rewards, config.ppo.kl_coef, config)

    def update() -> None:
        ppo.update(model, optimizer, minis, config.ppo.kl_coef, config, np.random.default_rng(0), critic_only=False)

    model.graphs = None
    estimate()
    update()  # what is compiled and chosen at the first call
    whole, forward, backward = [], [], []
    for _ in range(run.sizes.repeats):
        whole.append(_seconds(run.device, update))
        split = forward_backward(model, minis, config, run.device)
        forward.append(sum(split[0::2]) / len(parts))
        backward.append(sum(split[1::2]) / len(parts))
        if not run.in_time():
            break
    optimizer.zero_grad(set_to_none=True)

    flops = update_flops(model, parts)
    tokens, total = sum(part.tree.n_tokens for part in parts), sum(flops.values())
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    run.figure("MFU", [100 * total / s / rate for s in whole], "percent", "higher")
    run.figure("MFU of forward and backward", [100 * total / (s * len(parts)) / rate for s in both], "percent", "higher")
    run.figure("tokens/s", [tokens / s for s in whole], "tokens/s", "higher")
    run.figure("ms per micro-batch", [1e3 * s for s in both], "ms", "lower")
    run.figure("ms forward", [1e3 * s for s in forward], "ms", "lower")
    run.figure("ms backward", [1e3 * s for s in backward], "ms", "lower")
    run.figure("ms of the optimizer and the rest", [1e3 * (s - len(parts) * b) for s, b in zip(whole, both, strict=True)], "ms")
    run.figure("ms of the estimate", [1e3 * _seconds(run.device, estimate)], "ms", "lower")
    run.figure("MiB", [_peak(run.device, update)], "MiB", "lower")
    if update_graphs.usable(model.backbone):
        measure_graphs(run, model, minis, estimate, update)
    optimizer.zero_grad(set_to_none=True)
    run.record.data.setdefault("trees", {})[str(budget)] = {
        "micro_batches": len(parts),
        "tokens": tokens,
        "padded_tokens": sum(part.tree.padded_tokens for part in parts),
        "head_rows": sum(part.tree.head_rows.shape[0] for part in parts),
        "flops": flops,
    }


def measure_graphs(
    run: Measurement, model: ActorCritic, minis: list[MiniBatch], estimate: Callable[[], None], update: Callable[[], None]
) -> None:
    """The same step with its micro-batches padded, in turn launch by launch and as CUDA graphs."""
    graphs = model.graphs = update_graphs.UpdateGraphs(model.backbone.borders)
    estimate()
    making = [_seconds(run.device, update) for _ in range(update_graphs.MAKE_AT)]
    if not graphs.made:
        run.note("the update could not be made CUDA graphs")
        return
    whole: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(run.sizes.repeats):
        for on in whole:
            graphs.on = on
            whole[on].append(_seconds(run.device, update))
    tokens = sum(part.computed.n_tokens for mini in minis for part in mini.parts)
    run.figure("padded ms per step", [1e3 * s for s in whole[False]], "ms", "lower")
    run.figure("ms per step as CUDA graphs", [1e3 * s for s in whole[True]], "ms", "lower")
    ratios = [graph / plain for plain, graph in zip(whole[False], whole[True], strict=True)]
    run.figure("CUDA graphs / without", ratios, "ratio", "lower")
    run.figure("ms of a step that makes them", [1e3 * max(making[1:])], "ms")
    run.figure("padded tokens", [tokens], "tokens", "lower")


def forward_backward(model: ActorCritic, minis: list[MiniBatch], config: Config, device: torch.device) -> list[float]:
    """Seconds of forward and backward of each micro-batch in turn, as `ppo.update` runs them."""
    marks = _Marks(device)
    for mini in minis:
        for part in mini.parts:
            loss, _ = ppo.micro_batch_loss(model, part, mini.n_actions, config.ppo.kl_coef, config, False)
            marks()
            loss.backward()
            marks()
    return marks.seconds()


# -- decoding -------------------------------------------------------------------------------------------------------------


def sampler_steps(model: ActorCritic, prompts: list[list[int]], steps: int) -> list[float]:
    """Seconds of each step of `generate`; each ends with the tokens on the host."""
    marks: list[float] = []
    sampling = Sampling(max_new_tokens=steps + 3, slots=len(prompts))
    generate(model, prompts, 1, sampling, seed=0, check=lambda: marks.append(time.perf_counter()))
    # From the second mark on (before it lies the prefill); the first step finds caches and kernels not there yet.
    return [b - a for a, b in zip(marks[2:-1], marks[3:], strict=True)]


@torch.no_grad()
def decoder_steps(model: ActorCritic, prompts: list[list[int]], steps: int) -> list[float]:
    """Seconds of each step of the decoder alone: embedding, layers, last norm; nothing is drawn."""
    decoder = make_decoder(model.backbone, prompts, 1, len(prompts), steps + 1, model.micro_batch_tokens)
    decoder.admit(prompts)
    rows: Any = SimpleNamespace(tokens=torch.full((len(prompts),), 5, device=model.device), state=(), draw=lambda hidden: None)
    return [_seconds(model.device, lambda: decoder.step(rows)) for _ in range(steps + 1)][1:]


@contextmanager
def plain_layers(model: ActorCritic) -> Iterator[None]:
    """Without adapters and without peft's layers around the base's: what a model with merged weights runs."""
    found = [
        (parent, name, layer)
        for parent in model.base.model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseTunerLayer)
    ]
    for parent, name, layer in found:
        setattr(parent, name, layer.get_base_layer())
    try:
        yield
    finally:
        for parent, name, layer in found:
            setattr(parent, name, layer)


def decode_bytes(model: ActorCritic, batch: int, length: float, *, lora: bool) -> float:
    """What one step must read: weights of layers and head, the adapter, keys and values of `length` tokens a sequence."""
    config, head = model.base.model.config, model.backbone.head.weight
    layers = [m.get_base_layer().weight for m in model.peft.modules() if isinstance(m, BaseTunerLayer)]
    adapter = sum(p.numel() * p.element_size() for p in model.adapter_tensors(POLICY).values()) if lora else 0
    width = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    cache = batch * length * config.num_hidden_layers * width * head.element_size()
    return sum(w.numel() * w.element_size() for w in [*layers, head]) + adapter + cache


def measure_decode(run: Measurement, model: ActorCritic, batch: int, bandwidth: float) -> None:
    """`batch` sequences at once, with the adapter and without. bandwidth: bytes/s of a copy."""
    sizes = run.sizes
    prompts = random_prompts(sizes, batch, model.base.model.config.vocab_size)
    variants = ("LoRA", "merged")
    whole: dict[str, list[float]] = {variant: [] for variant in variants}
    trunk: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(sizes.repeats + 1):
        for variant in variants if repeat % 2 else variants[::-1]:
            with nullcontext() if variant == "LoRA" else plain_layers(model):
                steps = sampler_steps(model, prompts, sizes.steps if repeat else 2)
                bare = decoder_steps(model, prompts, sizes.steps if repeat else 2)
            if repeat:  # the first is for what is compiled and chosen at the first call
                whole[variant].append(float(np.median(steps)))
                trunk[variant].append(float(np.median(bare)))
        if repeat and not run.in_time():
            break
    run.figure("tokens/s", [batch / s for s in whole["LoRA"]], "tokens/s", "higher")
    for variant, before in (("LoRA", ""), ("merged", "merged ")):
        floor = decode_bytes(model, batch, sizes.prompt + sizes.steps / 2, lora=variant == "LoRA") / bandwidth
        run.figure(f"{before}ms per step", [1e3 * s for s in whole[variant]], "ms", "lower")
        run.figure(f"{before}ms per decoder step", [1e3 * s for s in trunk[variant]], "ms", "lower")
        run.figure(f"{before}share of bandwidth floor", [100 * floor / s for s in whole[variant]], "percent", "higher")
    # Percents near 0 are no measure of a change, hence the ratios beside them.
    for name, seconds in (("", whole), ("decoder ", trunk)):
        raw = [lora / merged for lora, merged in zip(*(seconds[variant] for variant in variants), strict=True)]
        run.figure(f"{name}LoRA / merged", raw, "ratio", "lower")
        run.figure(f"{name}overhead", [100 * (x - 1) for x in raw], "percent")
    run.figure("MiB", [_peak(run.device, lambda: sampler_steps(model, prompts, 2))], "MiB", "lower")


def _peak(device: torch.device, call: Callable[[], object]) -> float:
    """The most MiB of tensors, the model's included; on the CPU without it."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return (before + memory.peak(call, device)) / 2**20


def measure(kind: str, name: str, device: torch.device, out: Path, deadline: float, sizes: Sizes | None = None) -> int:
    """The part `update-NAME` or `decode-NAME`, into `out`; the exit status. deadline: of `time.monotonic`."""
    make_torch_repeatable()  # as a run is
    sizes = sizes or sizes_of(name)
    run = Measurement(f"{kind}-{name}", device, sizes, {"model": name, "rank": RANK}, out, deadline)
    if kind == "update":
        by_name = {f"{budget} tokens": budget for budget in sizes.budgets}
    else:
        by_name = {f"batch {batch}": batch for batch in sizes.batches}
    todo = run.todo(list(by_name))
    if todo and run.in_time():
        limit = ceilings(device, seconds=3.0)  # in this very process, so that clocks and temperature are the same
        run.record.data["ceilings"] = {name: asdict(figure) for name, figure in limit.items()}
        rate, bandwidth = 1e12 * limit["GEMM"].value, 1e9 * limit["copy"].value
        print(f"{run.record.part}: {len(todo)} of {len(by_name)} to do", flush=True)
        try:
            model = make_model(name, device, sizes.budgets[0])
        except torch.OutOfMemoryError:
            run.note("out of memory: the model alone does not fit")
            run.record.data["measured"], todo = list(by_name), []
        else:
            if not model.backbone.packed:
                run.note(f"padded, not packed: {model.backbone.padded_because}")
        for key in todo:
            if not run.in_time():
                break
            value = by_name[key]
            if kind == "update":
                first = "MFU" not in run.record.figures  # of those that fit, the one that the goal is about
                run.measure(key, "" if first else f"{key}: ", partial(measure_update, run, model, value, rate))
            else:
                run.measure(key, f"{key}: ", partial(measure_decode, run, model, value, bandwidth))
    return run.finish(list(by_name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("update", "decode"))
    parser.add_argument("--model", choices=models.NAMES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="stop after that (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/DEVICE/PART.json")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU that torch can use; --device cpu --model tiny runs a small form", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    out = args.out or folder_of(device) / f"{args.kind}-{args.model}.json"
    return measure(args.kind, args.model, device, out, deadline)


if __name__ == "__main__":
    sys.exit(main())
