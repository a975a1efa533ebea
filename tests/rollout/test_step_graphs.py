"""Decoding by replay, with a stand-in for CUDA's graphs: the step's operators as torch.fx recorded them once."""

import gc
import importlib
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine import make_model, random_prompts, sharpen
from torch.fx.experimental.proxy_tensor import make_fx

from fastppo.batch.decoding import GRAPHS_FROM
from fastppo.model import cuda_graphs
from fastppo.rollout import decoder, sampler, step_graphs
from fastppo.rollout.sampler import Sampling, generate
from fastppo_kernels import _attention_torch


def record(step):
    """Like a graph: whatever Python decided while it was recorded stays so, and all lies where it lay then."""
    return make_fx(step)()  # which runs it once


class Seen:
    """Rows of the same tokens again and again, whose hidden states can be looked at."""

    def __init__(self, model, slots):
        self.tokens = torch.arange(1, slots + 1)
        self.hidden = torch.zeros(slots, model.backbone.head.weight.shape[1])
        self.state = (self.hidden,)

    def draw(self, hidden_RH):
        self.hidden[: len(hidden_RH)] = hidden_RH


@pytest.fixture
def made(monkeypatch):
    """Graphs are made for every step; their number and the buckets asked for."""
    asked: list[tuple[int, int]] = []
    real = step_graphs.StepGraphs.step

    def step(self, run, rows, longest, state):
        real(self, run, rows, longest, state)
        asked.append((rows, longest))
        made[id(self)] = len(self.made)

    made: dict[int, int] = {}
    monkeypatch.setattr(step_graphs.StepGraphs, "step", step)
    monkeypatch.setattr(decoder, "usable", lambda *_: True)
    monkeypatch.setattr(cuda_graphs.Maker, "make", lambda self, step: record(step))
    monkeypatch.setattr(step_graphs, "MAKE_AT", 1)
    monkeypatch.setattr(step_graphs, "KEYS", 8)
    monkeypatch.setattr(_attention_torch, "_check_decode", lambda *_: None)  # on a CPU it looks at the lengths
    drawing = importlib.import_module("fastppo_kernels.sample")
    monkeypatch.setattr(drawing, "_call_sample", drawing._sample_op)  # as a whole: on a CPU it looks at numbers
    return made, asked


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize(("kind", "slots", "samples"), [("llama", 6, 3), ("qwen2", 5, 1), ("mistral", 64, 1)])
def test_the_same_samples_as_without(kind, slots, samples, pages, made, monkeypatch):
    """Sequences end at different times (so rows move and buckets shrink), and others take their places."""
    monkeypatch.setattr(decoder, "in_pages", lambda *_: pages)
    monkeypatch.setattr(sampler, "LAG", {"cpu": int(pages)})
    model = sharpen(make_model(kind, sample__max_new_tokens=20))
    model.base = replace(model.base, eos_ids=tuple(range(40)))
    prompts = random_prompts(3, 11, root=4)
    sampling = Sampling(max_new_tokens=20, slots=slots)
    found = generate(model, prompts, samples, sampling, seed=7)
    assert made[1], "steps were replayed"
    assert len({len(s.tokens) for s in found.samples}) > 3
    [graphs] = made[0].values()
    assert 1 < graphs < len(made[1])
    monkeypatch.setattr(decoder, "usable", lambda *_: False)
    expected = generate(model, prompts, samples, sampling, seed=7)
    assert [s.tokens for s in found.samples] == [s.tokens for s in expected.samples]
    for ours, theirs in zip(found.samples, expected.samples, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_what_the_adapter_learned_is_seen_by_the_next_replay(made):
    """Graphs read the parameters where they lie."""
    model = make_model("llama", sample__max_new_tokens=40)
    prompts = random_prompts(3, 4, root=4)
    made_here = decoder.make_decoder(model.backbone, prompts, 1, 4, 40, 10**6)
    made_here.folded = None
    made_here.admit(prompts)
    rows = Seen(model, 4)
    with torch.no_grad():
        made_here.step(rows)
        made_here.step(rows)
        before = rows.hidden.clone()
        for parameter in model.trainable():
            parameter.mul_(3)
        made_here.lengths -= 1
        made_here.host_lengths = [n - 1 for n in made_here.host_lengths]
        made_here.step(rows)
        assert len(made[1]) == 3 and not torch.allclose(rows.hidden, before)


def test_a_graph_that_cannot_be_made_is_done_without(made, monkeypatch):
    def refuse(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(cuda_graphs.Maker, "make", refuse)
    model = make_model("llama", sample__max_new_tokens=6)
    prompts = random_prompts(0, 3)
    said = "decoding goes on without CUDA graphs: operation not permitted when stream is capturing"
    with pytest.warns(RuntimeWarning, match=f"^{said}$"):
        found = generate(model, prompts, 1, Sampling(max_new_tokens=6), seed=1)
    assert not model.backbone.graphs
    monkeypatch.setattr(decoder, "usable", lambda *_: False)
    assert found == generate(model, prompts, 1, Sampling(max_new_tokens=6), seed=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")])
def test_no_memory_for_a_graph_ends_graphs_for_this_batch_only(made, monkeypatch, error):
    """They are a luxury: training's micro-batches, and the sampler's slots, are not what must pay for them."""
    tries, model, prompts = [], make_model("llama"), random_prompts(0, 3)

    def run_out(self, step):
        tries.append(step)
        if len(tries) == 2:
            raise error
        return record(step)

    monkeypatch.setattr(cuda_graphs.Maker, "make", run_out)
    found = generate(model, prompts, 1, Sampling(max_new_tokens=20), seed=1)
    assert len(tries) == 2 and model.backbone.graphs and model.most_slots is None
    again = generate(model, prompts, 1, Sampling(max_new_tokens=20), seed=1)
    assert len(tries) > 3 and [s.tokens for s in again.samples] == [s.tokens for s in found.samples]


def test_a_bucket_that_is_left_at_once_gets_no_graph(made, monkeypatch):
    monkeypatch.setattr(step_graphs, "MAKE_AT", 3)
    made_of = []
    monkeypatch.setattr(cuda_graphs.Maker, "make", lambda self, step: made_of.append(step) or record(step))
    model = make_model("llama")
    monkeypatch.setattr(step_graphs, "KEYS", 10**6)
    generate(model, random_prompts(0, 3), 1, Sampling(max_new_tokens=3), seed=1)
    assert not made_of  # the first of three tokens needs no step
    generate(model, random_prompts(0, 3), 1, Sampling(max_new_tokens=4), seed=1)
    assert len(made_of) == 1


def test_a_decoder_is_let_go_at_once(made):
    """Its cache may be most of the memory; no cycle may keep it until the garbage collector comes."""
    model = make_model("llama", sample__max_new_tokens=6)
    prompts = random_prompts(0, 3)
    gc.disable()
    try:
        here = decoder.make_decoder(model.backbone, prompts, 1, 4, 6, 10**6)
        here.admit(prompts)
        with torch.no_grad():
            here.step(Seen(model, 4))
        gone = weakref.ref(here)
        del here
        assert gone() is None
    finally:
        gc.enable()


NO_MEMORY, FORBIDDEN = torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("not permitted when stream is capturing")


@pytest.mark.parametrize("error", [NO_MEMORY, FORBIDDEN, KeyboardInterrupt()], ids=["memory", "forbidden", "interrupted"])
@pytest.mark.parametrize("ended", [False, True])
def test_a_broken_capture_leaves_nothing_of_itself(ended, error, monkeypatch):
    """With a stand-in for torch's allocator: its pool is let go here where the end of the capture has not done so. What broke
    it is known all the same: lack of memory ends graphs for this batch alone, and an interrupt is not taken for less."""
    events, here = [], SimpleNamespace(wait_stream=lambda stream: None, device_index=3)
    aside = SimpleNamespace(wait_stream=lambda stream: None)

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        try:
            yield
        finally:  # `capture_end`
            if not ended:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def end(device, pool):
        events.append(("end", device, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    cuda = {
        "current_stream": lambda: here, "graph_pool_handle": lambda: "a pool", "Stream": lambda: aside, "CUDAGraph": object,
        "stream": lambda stream: nullcontext(), "graph": capture, "set_stream": lambda stream: events.append(stream),
    }  # fmt: skip
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *which: events.append(("release", *which)), raising=False)
    runs = []

    def run(rows, longest):
        runs.append(rows)
        if len(runs) == 2:
            raise error

    monkeypatch.setattr(step_graphs, "MAKE_AT", 1)
    backbone = SimpleNamespace(graphs=True)
    graphs = step_graphs.StepGraphs(4, 8, backbone)
    gone_on = pytest.warns(RuntimeWarning, match=f"without CUDA graphs: {error}$") if error is FORBIDDEN else nullcontext()
    with gone_on, pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
        graphs.step(run, 3, 1, ())
    assert graphs.full is (error is NO_MEMORY) and backbone.graphs is (error is not FORBIDDEN)
    assert events == [here, ("end", 3, "a pool")] + [("release", 3, "a pool")] * (not ended) and graphs.maker.pool is None


def test_row_buckets():
    buckets = [step_graphs.row_bucket(rows) for rows in range(1, 200)]
    assert sorted(set(buckets)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for rows, bucket in enumerate(buckets, 1):
        assert bucket == min(b for b in buckets if b >= rows)


def test_when_graphs_are_made(monkeypatch):
    """Only for steps that are known to ask the host nothing, on a GPU, and where there are enough of them."""
    model = make_model("llama")
    assert not step_graphs.usable(model.backbone, 10**6), "no GPU"
    weight = type("Cuda", (), {"is_cuda": True})()
    trunk = model.backbone.llama.trunk
    on_gpu = type("B", (), {"llama": model.backbone.llama, "graphs": True, "head": type("H", (), {"weight": weight})()})
    assert trunk.rotary_emb.rope_type == "default"
    assert step_graphs.usable(on_gpu, GRAPHS_FROM) and not step_graphs.usable(on_gpu, GRAPHS_FROM - 1)
    monkeypatch.setenv("FASTPPO_CUDA_GRAPHS", "0")
    assert not step_graphs.usable(on_gpu, 10**6)
    monkeypatch.delenv("FASTPPO_CUDA_GRAPHS")
    on_gpu.graphs = False
    assert not step_graphs.usable(on_gpu, 10**6)
    on_gpu.graphs, on_gpu.llama = True, None
    assert not step_graphs.usable(on_gpu, 10**6)
