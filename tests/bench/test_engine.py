"""`python -m bench.engine` and the random models: what is counted, what is kept, and what a second run does."""

import time
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import engine, models
from bench.engine import Sizes
from bench.record import Record
from fastppo.algorithms import ppo
from fastppo.batch.rollout import pack_rollout
from fastppo.batch.token_tree import build_tree
from fastppo.model import cuda_graphs
from fastppo.rollout.sampler import Sampling, generate

CPU = torch.device("cpu")
SIZES = Sizes(prompt=12, new=6, samples=2, budgets=(64, 32), batches=(3, 1), steps=2, repeats=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return engine.make_model("tiny", CPU, 64)


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that take no time, of 1 TFLOP/s and 10 GB/s."""
    found = {"GEMM": engine.Figure(1.0, "TFLOP/s"), "copy": engine.Figure(10.0, "GB/s")}
    monkeypatch.setattr(engine, "ceilings", lambda device, seconds: found)
    monkeypatch.setattr(engine, "make_torch_repeatable", lambda: None)  # which would hold for the tests after these


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def test_random_models_have_the_dimensions_that_they_are_named_for():
    billions = {}
    for name in models.NAMES:
        with torch.device("meta"):
            found = models.Qwen2ForCausalLM._from_config(models.config_of(name), dtype=torch.bfloat16)
        billions[name] = round(sum(p.numel() for p in found.parameters()) / 1e9, 3)
    # As the model cards have them: 0.49, 1.54 and 7.61 billion.
    assert billions == {"tiny": 0.001, "0.5b": 0.494, "1.5b": 1.544, "7b": 7.616}


def test_a_random_base_is_frozen_ready_to_use_and_depends_on_its_seed():
    state = torch.random.get_rng_state()
    one, same, other = (models.random_base("tiny", "cpu", torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [base.model.get_output_embeddings().weight for base in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not any(p.requires_grad for p in one.model.parameters()) and not one.model.training
    assert abs(float(weights[0].std()) - 0.05) < 0.001 and one.eos_ids == (one.tokenizer.eos_token_id,)
    half = models.random_base("tiny", "cpu", torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_tokenizer_reads_any_text_and_decodes_any_id():
    tokenizer = models.tokenizer()
    text = "Is it “grammatical”?\nyes, naïve"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([ids[0], 2047, 151935, ids[1]]) == "Is"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_flops_are_those_of_the_products_that_are_run(model):
    """Against torch's own count, which knows nothing of trees, LoRA or formulas."""
    rollout = engine.made_rollout(SIZES, 64, 2048)
    (mini,) = pack_rollout(rollout, minibatches=1, budget=64, padded=False, device=CPU, rng=engine.np.random.default_rng(0))
    ppo.estimate(model, [mini], rollout, [0.0] * len(rollout.samples), 0.0, model.config)
    counted = engine.update_flops(model, mini.parts)
    # oneDNN's products are not among those that torch's counter knows; without it no row is padded either.
    added_in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # nor does it know these
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False, custom_mapping=added_in_place) as seen:
        for part in mini.parts:
            ppo.micro_batch_loss(model, part, mini.n_actions, 0.0, model.config, False)[0].backward()
    model.value_head.zero_grad()
    # Nobody needs the gradient of the first layer's input, nor the last layer behind its attention in rows without an action.
    first, *_, last = model.backbone.trunk.layers
    attention, mlp = first.self_attn, last.mlp
    spared = 0
    for part in mini.parts:
        tokens, rows = part.tree.n_tokens, len(part.tree.head_rows)
        spared += 2 * tokens * sum(each.weight.numel() for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        behind = (last.self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        spared += 4 * (tokens - rows) * sum(each.weight.numel() for each in behind)
    products = counted["base"] + counted["adapters"] + counted["head"] - spared
    assert products * 0.97 < seen.get_total_flops() < products * 1.03


def test_pairs_of_queries_and_keys_are_counted_from_the_tree(model):
    rollout = engine.made_rollout(SIZES, 64, 2048)
    (mini,) = pack_rollout(rollout, minibatches=1, budget=64, padded=False, device=CPU, rng=engine.np.random.default_rng(0))
    prompts, answers, samples = len(rollout.prompts), SIZES.new - 1, SIZES.samples
    pairs = prompts * (12 * 13 // 2 + samples * sum(12 + i for i in range(1, answers + 1)))
    assert engine.update_flops(model, mini.parts)["attention"] == 12 * pairs * 4 * 128


def test_every_decoding_step_is_timed_once(model):
    prompts = engine.random_prompts(SIZES, 3, 2048)
    steps = engine.sampler_steps(model, prompts, 5)
    assert len(steps) == 5 and all(step > 0 for step in steps) and len(engine.decoder_steps(model, prompts, 4)) == 4
    rollout = generate(model, prompts, 1, Sampling(max_new_tokens=9), seed=0)
    assert all(len(sample.tokens) == 9 for sample in rollout.samples)  # no sequence ends early: the batch stays as large


def test_plain_layers_are_the_base_and_only_for_a_while(model):
    prompts = [[5, 6, 7, 8]]
    tokens = torch.tensor([prompts[0]])
    with torch.no_grad():
        for parameter in model.adapter_tensors("policy").values():
            parameter.add_(0.1)

    def logits():
        tree = build_tree(prompts)
        return model.backbone.head.logits(model.backbone.hidden(tree)).detach()

    adapted, names = logits(), [name for name, _ in model.base.model.named_parameters()]
    with engine.plain_layers(model):
        assert not any(isinstance(m, engine.BaseTunerLayer) for m in model.base.model.modules())
        plain = logits()
    assert [name for name, _ in model.base.model.named_parameters()] == names and torch.equal(logits(), adapted)
    reference = models.random_base("tiny", "cpu", torch.float32).model(tokens).logits[0]
    torch.testing.assert_close(plain, reference, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with torch.no_grad():
        for parameter in model.adapter_tensors("policy").values():
            parameter.sub_(0.1)


def test_without_the_adapter_less_is_read(model):
    with_it, without = (engine.decode_bytes(model, 4, 20, lora=lora) for lora in (True, False))
    base = sum(p.numel() for name, p in model.base.model.named_parameters() if "lora" not in name)
    assert with_it - without == 4 * sum(p.numel() for p in model.adapter_tensors("policy").values())
    cache = 4 * 20 * 4 * 2 * 2 * 32 * 4  # sequences, tokens, layers, keys and values, heads, width, bytes
    assert without == pytest.approx(4 * base + cache, rel=0.01)  # norms and biases are not counted


@pytest.mark.parametrize("kind, names", [("update", ["64 tokens", "32 tokens"]), ("decode", ["batch 3", "batch 1"])])
def test_what_is_measured_is_kept_and_a_second_run_goes_on(kind, names, quick, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    kinds = (f"measure_{kind}", getattr(engine, f"measure_{kind}"))
    ran = []

    def once(run, model, value, ceiling):
        ran.append(value)
        kinds[1](run, model, value, ceiling)
        run.deadline = 0.0 if len(ran) == 1 else run.deadline  # the time is up

    monkeypatch.setattr(engine, kinds[0], once)
    assert engine.measure(kind, "tiny", CPU, out, soon(), SIZES) == 3
    first = Record.load(out)
    assert not first.complete and first.data["measured"] == names[:1] and first.part == f"{kind}-tiny"
    assert engine.measure(kind, "tiny", CPU, out, soon(), SIZES) == 0
    record = Record.load(out)
    assert record.complete and record.data["measured"] == names and len(ran) == 2
    assert record.started == first.started and record.figures.items() > first.figures.items()
    wanted = {"MFU", "tokens/s", "ms per micro-batch", "MiB", "32 tokens: MFU"}
    if kind == "decode":
        each = ("tokens/s", "overhead", "share of bandwidth floor", "LoRA / merged")
        wanted = {f"batch {n}: {name}" for n in (1, 3) for name in each}
    assert wanted <= set(record.figures)
    assert all(figure.value > 0 for figure in record.figures.values() if figure.better)
    assert "FLOPs" in record.data["about"] and capsys.readouterr().out.count(f"{kind}-tiny, ") == 2


def test_the_share_is_of_the_measured_rate(quick, tmp_path):
    out = tmp_path / "out.json"
    engine.measure("update", "tiny", CPU, out, soon(), SIZES)
    record = Record.load(out)
    trees = record.data["trees"]["64"]
    seconds = trees["tokens"] / record.figures["tokens/s"].value
    assert record.figures["MFU"].value == pytest.approx(100 * sum(trees["flops"].values()) / seconds / 1e12)


@pytest.mark.parametrize("fails", [False, True])
def test_an_update_is_measured_with_graphs_too(quick, tmp_path, monkeypatch, fails):
    def make(self, step):
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        step()
        return lambda: None

    monkeypatch.setattr(engine.update_graphs, "usable", lambda _: True)
    monkeypatch.setattr(cuda_graphs.Maker, "make", make)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs") if fails else nullcontext():
        assert engine.measure("update", "tiny", CPU, tmp_path / "u.json", soon(), SIZES) == 0
    found = Record.load(tmp_path / "u.json")
    names = ("padded ms per step", "ms per step as CUDA graphs", "CUDA graphs / without", "ms of a step that makes them")
    assert all((name in found.figures) is not fails for name in names)
    assert ("the update could not be made CUDA graphs" in found.notes) is fails
    if not fails:
        assert found.figures["padded tokens"].value > found.data["trees"]["64"]["tokens"]
        assert found.figures["CUDA graphs / without"].value > 0


def test_where_the_first_does_not_fit_the_next_stands_for_it(quick, tmp_path, monkeypatch):
    right = engine.measure_update

    def full(run, model, budget, rate):
        if budget == 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        right(run, model, budget, rate)

    monkeypatch.setattr(engine, "measure_update", full)
    assert engine.measure("update", "tiny", CPU, tmp_path / "out.json", soon(), SIZES) == 0
    record = Record.load(tmp_path / "out.json")
    assert "MFU" in record.figures and list(record.data["trees"]) == ["32"] and not any(":" in x for x in record.figures)
    assert record.notes == ["64 tokens: out of memory (CUDA out of memory.)"]


def test_out_of_memory_is_a_result(quick, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB\nmore")

    monkeypatch.setattr(engine, "measure_update", full)
    assert engine.measure("update", "tiny", CPU, tmp_path / "one.json", soon(), SIZES) == 0
    record = Record.load(tmp_path / "one.json")
    note = "64 tokens: out of memory (CUDA out of memory. Tried to allocate 9.00 GiB)"
    assert record.complete and record.notes[0] == note and len(record.notes) == 2 and note in capsys.readouterr().out
    monkeypatch.setattr(engine, "make_model", full)
    assert engine.measure("decode", "tiny", CPU, tmp_path / "two.json", soon(), SIZES) == 0
    assert Record.load(tmp_path / "two.json").notes == ["out of memory: the model alone does not fit"]


def test_without_a_gpu_one_line_and_status_2(capsys):
    if not torch.cuda.is_available():
        assert engine.main(["update", "--model", "0.5b"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
