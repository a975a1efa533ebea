"""What is counted of a run beside what a loaded model has; the micro-batch that is chosen; what is said where nothing fits."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine import make_config, make_model, random_ids
from tiny import KINDS

from fastppo import budget, plan
from fastppo.algorithms.optim import make_optimizer, optimizer_state
from fastppo.budget import GIB, Budget, Device, Prompts
from fastppo.config import Config, PpoConfig, SampleConfig
from fastppo.errors import UserError
from fastppo.memory import Layer
from fastppo.model.actor_critic import CRITIC, POLICY, REFERENCE
from fastppo.model.adapters import add_policy
from fastppo.model.llama_trunk import LlamaTrunk
from fastppo.model.load import pick_dtype
from fastppo.rollout import decoder
from fastppo_kernels import _dispatch

CPU = Device("cpu", 16 * GIB, "the CPU")


def parts_of(config: Config, device: Device = CPU) -> dict[str, int]:
    """By name, of the configuration alone."""
    model, _ = plan.shapes(config, pick_dtype(config.dtype, torch.device("cpu")))
    llama = LlamaTrunk.suits(model.base_model)
    sizes = budget.sizes_of(add_policy(model, config), llama=llama)
    run = Budget(sizes, config, device, Prompts.longest_allowed(sizes, config))
    return {part.name: part.bytes for part in (*run.fixed(), *run.update(256, "keep"), *run.sampling(64))}


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_all_the_time_is_what_a_loaded_model_has(kind, dtype):
    config = make_config(kind, dtype=dtype, value__trunk="own")
    parts = parts_of(config)
    model = make_model(kind, dtype=dtype, value__trunk="own")
    model.freeze_reference()
    assert parts["base"] == bytes_of(p for name, p in model.base.model.named_parameters() if "lora_" not in name)
    assert parts["policy"] == bytes_of(model.adapter_tensors(POLICY).values())
    assert parts["reference"] == bytes_of(model.adapter_tensors(REFERENCE).values())
    assert parts["critic"] == bytes_of(model.adapter_tensors(CRITIC).values()) + bytes_of(model.value_head.parameters())
    assert parts["gradients"] == bytes_of(model.trainable())
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-5)
    for parameter in model.trainable():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parts["optimizer"] == bytes_of_state(optimizer)


def bytes_of_state(optimizer) -> int:
    return bytes_of(tensor for name, tensor in optimizer_state(optimizer).items() if not name.endswith("step"))


@pytest.mark.parametrize("trunk", ["shared", "own"])
def test_adafactor_has_rows_and_columns_but_sft_has_moments(trunk):
    changes = {"value__trunk": trunk, "ppo__optimizer": "adafactor"}
    model = make_model("llama", **changes)
    factored = make_optimizer(model.trainable(), 1e-3, 1e-5, "adafactor")
    assert parts_of(make_config("llama", **changes, sft__examples=0))["optimizer"] == bytes_of_state(factored)
    moments = make_optimizer(model.trainable(), 1e-3, 1e-5)
    assert parts_of(make_config("llama", **changes))["optimizer"] == bytes_of_state(moments)


def test_only_what_a_run_has_is_counted():
    parts = parts_of(make_config("llama", ppo__reference="base"))
    model = make_model("llama")
    assert "reference" not in parts and parts["critic"] == bytes_of(model.value_head.parameters())
    assert "reference" not in parts_of(make_config("llama", ppo__kl_coef=0)) and "reference" in parts_of(make_config("llama"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_the_cache_is_that_of_the_longest_prompts(kind, monkeypatch):
    """Prompts of the most tokens with nothing in common: in pages evaluation's, one sample of each."""
    monkeypatch.delenv("FASTPPO_KERNELS", raising=False)
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", True)
    model = make_model(kind, max_prompt_tokens=9, sample__max_new_tokens=5, sample__slots=6, ppo__samples=2)
    prompts = [[3 + i, *random_ids(random.Random(i), 8)] for i in range(3)]
    for device in (CPU, Device.named("24GiB")):
        monkeypatch.setattr(decoder, "in_pages", lambda *_, cuda=device.cuda: cuda)
        there = []
        for samples in (2, 1):
            made = decoder.PackedDecoder(model.backbone, prompts, samples, 6, 5, 64)
            with torch.no_grad():
                made.admit(prompts)
            there.append(bytes_of(x for layer in made.cache.own for x in layer))
        assert parts_of(model.config, device)["KV cache"] == max(there) == there[1]
    # 6 x 69 places against 6 x (8 + 2) + 1 pages.
    long = make_config(kind, max_prompt_tokens=64, sample__max_new_tokens=5, sample__slots=6, ppo__samples=2)
    lines, pages = (parts_of(long, device)["KV cache"] for device in (CPU, Device.named("24GiB")))
    assert lines * 61 * 8 == pages * 6 * 69
    # With fewer slots than samples it is these that count: 8 x 2 + 8 + 1 pages. Where models may run padded, 8 x 69 places.
    few = replace(long, sample=replace(long.sample, slots=1), ppo=replace(long.ppo, samples=8))
    lines, pages = (parts_of(few, device)["KV cache"] for device in (CPU, Device.named("24GiB")))
    assert (lines == pages) if kind == "gpt_neox" else (lines * 25 * 8 == pages * 8 * 69)
    monkeypatch.setenv("FASTPPO_KERNELS", "torch")  # which reads no pages where they lie
    assert parts_of(long, Device.named("24GiB"))["KV cache"] == parts_of(long)["KV cache"]
    monkeypatch.setenv("FASTPPO_KERNELS", "gpu")
    with pytest.raises(UserError, match="^FASTPPO_KERNELS must be one of auto, triton, torch, got 'gpu'$"):
        parts_of(long, Device.named("24GiB"))


@pytest.mark.parametrize("samples", [1, 8])
def test_prompts_of_an_evaluation_are_counted_where_they_are_prefilled(samples):
    """As many at a time as a micro-batch takes, with one sample of each: not an eighth of them."""
    config = make_config("llama", max_prompt_tokens=16, sample__slots=64, ppo__samples=samples)
    model, _ = plan.shapes(config, torch.float32)
    run = Budget(budget.sizes_of(add_policy(model, config), llama=True), config, CPU, Prompts(16))
    for tokens, at_once in ((8, 16), (200, 200), (4096, 64 * 16)):
        [how] = [part.how for part in run.sampling(tokens) if part.name == "prefill"]
        assert how.startswith(f"keys and values of {at_once:,} tokens, ")


def test_weights_that_the_sampler_folds_are_counted():
    model = make_model("llama", sample__max_new_tokens=8)
    prompts = [[5, 6, 7], [8, 9, 10]]
    made = decoder.PackedDecoder(model.backbone, prompts, 1, 2, 8, 64)
    with torch.no_grad():
        made.admit(prompts)
        made.step(SimpleNamespace(tokens=torch.tensor([5, 6]), draw=lambda hidden: None))
    assert made.folded
    folded = bytes_of(each[0] for each in made.folded.values() if each is not None)
    assert parts_of(model.config)["folded weights"] == folded
    assert "folded weights" not in parts_of(make_config("llama", sample__max_new_tokens=7))


def test_four_bits_a_weight():
    model, _ = plan.shapes(make_config("llama"), torch.bfloat16)
    numbers = sum(p.numel() for p in model.base_model.layers.parameters() if p.ndim == 2)
    others = sum(p.numel() for p in model.parameters()) - numbers
    sizes = budget.sizes_of(add_policy(model, make_config("llama")), llama=True, nf4=True)
    assert sizes.linear == numbers and sizes.base == 2 * others + numbers // 2 + 4 * (numbers // 64)
    assert sizes.layer is not None and not sizes.layer.fused  # it is not `decoder_layer` that computes it


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_four_bits_are_those_of_the_loaded_model(kind):
    """GPT-2's weights are no `nn.Linear` before they are quantised."""
    pytest.importorskip("bitsandbytes", reason="bases in 4 bits need bitsandbytes")
    config = make_config(kind, dtype="nf4")
    shapes, _ = plan.shapes(config, torch.float32)
    counted = budget.sizes_of(add_policy(shapes, config), llama=kind == "llama", nf4=True)
    model = make_model(kind, dtype="nf4").base.model
    tensors = [p for name, p in model.named_parameters() if "lora_" not in name]
    scales = [p.quant_state.absmax for p in tensors if hasattr(p, "quant_state")]
    assert scales and counted.base == bytes_of([*tensors, *scales])


# -- choosing -------------------------------------------------------------------------------------------------------------


RANKS = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 16)
# Llama 3 8B in bfloat16.
LAYER = Layer(hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128, ranks=RANKS)
EIGHT = budget.Sizes(
    base=16_060_522_496, linear=6_979_321_856, adapter=41_943_040, factored=2_628_608, vocab=128256, hidden=4096, layers=32,
    layer=LAYER, outputs=32 * (4096 * 3 + 2 * 1024 + 2 * 14336), cache=2 * 32 * 1024, head_dim=128, positions=8192, itemsize=2,
    blocks=True,
)  # fmt: skip
SHORT = Config(max_prompt_tokens=128, sample=SampleConfig(slots=64))


def of(device: Device, config: Config = SHORT, sizes: budget.Sizes = EIGHT) -> Budget:
    return Budget(sizes, config, device, Prompts.longest_allowed(sizes, config))


@pytest.mark.parametrize("name", budget.GPUS)
def test_the_largest_micro_batch_that_fits(name):
    device = Device.named(name)
    counted = of(device)
    choice = counted.choose()
    assert not choice.too_much and counted.takes(choice.tokens, choice.activations) <= counted.room
    assert 0 < choice.tokens <= 8192 and choice.tokens % 256 == 0
    larger = counted.takes(choice.tokens + 256, choice.activations)
    assert choice.tokens == 8192 or larger > counted.room
    if choice.activations == "recompute":  # then too little would be left where they were kept
        assert counted.takes(2048, "keep") > counted.room and "blocks are computed again" in choice.notices[0]


def test_more_memory_allows_more():
    choices = [of(Device.named(f"{size}GiB")).choose() for size in (20, 24, 40, 80, 200)]
    modes, tokens = [choice.activations for choice in choices], [choice.tokens for choice in choices]
    assert modes[0] == "recompute" and modes[-1] == "keep" and modes == sorted(modes, reverse=True)
    assert tokens[-1] == 8192 and not any(choice.too_much for choice in choices[1:])


def test_the_settings_have_the_last_word():
    large, small = Device.named("h200"), Device.named("24GiB")
    for mode in ("keep", "recompute", "offload"):
        assert of(large, replace(SHORT, activations=mode)).choose().activations == mode
    fixed = of(large, replace(SHORT, micro_batch_tokens=300)).choose()
    assert (fixed.tokens, fixed.activations, fixed.notices) == (300, "keep", ())
    again = of(small, replace(SHORT, micro_batch_tokens=4096)).choose()
    assert (again.tokens, again.activations) == (4096, "recompute")


def test_less_is_alive_where_blocks_are_computed_again_and_least_where_their_inputs_are_elsewhere():
    device = Device.named("h200")
    modes = ("keep", "recompute", "offload")
    sums = [of(device).takes(4096, mode) for mode in modes]
    assert sums[0] > 3 * sums[1] and sums[1] - sums[2] == pytest.approx(30 * 4096 * 4096 * 2, rel=0.1)


def test_graphs_where_the_host_is_slower_and_there_is_room_beside_them():
    """Small micro-batches of small models; what an update takes is then there twice, or once beside the sampler's."""
    layer = replace(LAYER, hidden=896, inner=4864, heads=14, kv_heads=2, head_dim=64)
    half = replace(
        EIGHT, base=988_065_792, linear=357_826_560, adapter=8_798_208, vocab=151936, hidden=896, layers=24, layer=layer,
        cache=2 * 24 * 128, head_dim=64,
    )  # fmt: skip
    config = replace(SHORT, micro_batch_tokens=2048)
    h100, small = Device.named("h100-80"), Device.named("5GiB")
    assert of(h100, config, half).choose().graphs
    assert not of(small, config, half).choose().graphs and not of(small, config, half).choose().too_much
    assert not of(CPU, config, half).choose().graphs
    assert not of(h100, config).choose().graphs, "8B: the GPU is busy with it"
    # 53 launches a layer, not more: see "An update as a CUDA graph" in csrc_notes.md.
    for tokens, worth_it in ((2816, True), (3072, False)):
        assert of(h100, replace(config, micro_batch_tokens=tokens), half).choose().graphs is worth_it
    assert not of(h100, replace(config, activations="offload"), half).choose().graphs
    assert not of(h100, config, replace(half, layer=replace(layer, fused=False))).choose().graphs
    moving = [replace(config, ppo=replace(config.ppo, kl_estimator=kind, kl_target=6.0)) for kind in ("k1", "k2", "k3")]
    assert [of(h100, each, half).choose().graphs for each in moving] == [True, False, False], "the weight is in the loss"
    counted = of(h100, config, half)
    held, taken = counted.graphs(2048, "keep").bytes, counted.takes(2048, "keep")
    assert taken < held < 1.2 * taken


def test_an_architecture_without_blocks_keeps_what_it_needs():
    other = replace(EIGHT, layer=None, blocks=False)
    choice = of(Device.named("h200"), replace(SHORT, activations="recompute"), other).choose()
    assert choice.activations == "keep" and "no blocks" in choice.notices[0]
    assert of(Device.named("24GiB"), sizes=other).choose().activations == "keep"


@pytest.mark.parametrize(
    ("config", "gpu", "words"),
    [
        (SHORT, "12GiB", ["base, adapters and optimizer take 15.9 GiB", "--model"]),
        (replace(SHORT, sample=SampleConfig(slots=4096)), "24GiB", ["sampling takes", "--sample-slots"]),
        (replace(SHORT, max_prompt_tokens=8000), "19GiB", ["a micro-batch takes", "shorten prompts of up to 8,000 tokens"]),
        (replace(SHORT, micro_batch_tokens=100_000, ppo=PpoConfig(prompts=4000)), "24GiB", ["lower --micro-batch-tokens"]),
        (replace(SHORT, micro_batch_tokens=8192, activations="keep"), "24GiB", ["or give --activations recompute"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_and_what_to_change(config, gpu, words):
    choice = of(Device.named(gpu), config).choose()
    said = " ".join(choice.too_much)
    assert choice.tokens >= 1 and all(word in said for word in words), said
    assert not any("\n" in line for line in choice.too_much)


def test_fewer_slots_as_advised_do_fit():
    config = replace(SHORT, sample=SampleConfig(slots=4096))
    device = Device.named("24GiB")
    [line] = [line for line in of(device, config).choose().too_much if "--sample-slots" in line]
    slots = int(re.search(r"--sample-slots to ([\d,]+)", line)[1].replace(",", ""))
    assert 0 < slots < 4096 and not of(device, replace(SHORT, sample=SampleConfig(slots=slots))).choose().too_much
    assert of(device, replace(SHORT, sample=SampleConfig(slots=slots * 5 // 4))).choose().too_much


def test_a_group_larger_than_the_micro_batch_must_fit_too():
    """It gets a micro-batch of its own."""
    device = Device.named("20GiB")
    config = replace(SHORT, max_prompt_tokens=6000, sample=SampleConfig(slots=16))
    counted = of(device, config)
    choice = counted.choose()
    assert counted.group == 6000 + 4 * 3 > choice.tokens and "a micro-batch takes" in choice.too_much[0]


def test_gpus_by_name_and_by_size():
    assert Device.named("A100-80").memory == int(79.1 * GIB) and Device.named("A100-80").cuda
    assert Device.named("24GiB").memory == 24 * GIB and Device.named("1.5 gib").memory == 3 * GIB // 2
    assert Device.named("24GB").memory == 24 * 10**9
    for text in ("a100", "", "0GiB", "-1GiB", "24", "24 TiB", "1e3GiB"):
        with pytest.raises(UserError, match="--gpu: .* is not allowed; expected one of l4, .*, or a size such as 24GiB"):
            Device.named(text)


def test_training_takes_what_was_chosen(monkeypatch):
    assert make_model("llama").activations == "keep" and make_model("llama").micro_batch_tokens == 2048
    monkeypatch.setattr(budget, "memory_of_host", lambda: (200_000, None))
    model = make_model("llama")
    assert model.activations == "recompute" and model.micro_batch_tokens == 2048 and model.plan_notices
    assert make_model("llama", activations="keep").activations == "keep"
