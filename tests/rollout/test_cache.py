"""Keys of running sequences in lines and in pages: each finds its own, whatever came and went before."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine import make_model, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.batch.decoding import PAGE, in_pages, pages_of
from fastppo.model.attention import DecodeContext, in_any_order
from fastppo.rollout import cache as cache_module
from fastppo.rollout import decoder, sampler
from fastppo.rollout.cache import Lines, Pages
from fastppo.rollout.sampler import Sampling, generate
from fastppo_kernels import _dispatch

CPU = torch.device("cpu")


def assert_sound(cache: Pages, rows: int) -> None:
    """Every page is free or has as many users as sequences name it; the table on the device is the host's."""
    named = Counter(page for row in cache.host[:rows] for page in row.tolist() if page)
    assert cache.users.tolist() == [named[page] for page in range(len(cache.users))]
    assert sorted([*cache.free, *named]) == [*range(1, len(cache.users))]
    assert not cache.host[rows:].any() and np.array_equal(cache.table.numpy(), cache.host)
    for row in cache.host[:rows].tolist():
        own = [page for page in row if page]
        assert len(own) == len(set(own)) and row == own + [0] * (len(row) - len(own))


def found(cache: Lines | Pages, row: int, length: int) -> torch.Tensor:
    """[length, Hkv, D]: the keys of a row, as attention finds them."""
    keys, pages = cache.own[0][0], cache.pages(row + 1, length)
    line = keys[row] if pages is None else keys[pages[row]].transpose(0, 1).flatten(1, 2)
    return line[:, :length].transpose(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_coming_growing_and_going(data):
    samples = data.draw(st.integers(1, 4))
    slots = samples * data.draw(st.integers(1, 5)) + data.draw(st.integers(0, 2))
    longest, new = data.draw(st.integers(1, 3 * PAGE + 1)), data.draw(st.integers(1, 2 * PAGE + 1))
    caches = [kind(slots, samples, longest, new, CPU) for kind in (Lines, Pages)]
    running: list[list[float]] = []  # of each row the number that each of its keys holds
    ends: list[int] = []  # its length at most
    number = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        lengths = data.draw(st.lists(st.integers(1, longest), max_size=6))
        rooms = [cache.room(len(running), lengths) for cache in caches]
        assert rooms[1] <= rooms[0] <= len(lengths)
        if not running and lengths:
            assert rooms[1] > 0, "an empty pool holds any prompt"
        lengths = lengths[: rooms[1]]
        if lengths:
            total = sum(lengths)
            keys = (number + 1 + torch.arange(total, dtype=torch.float64)).view(-1, 1, 1).expand(-1, 2, 3)
            number += total
            ends_at = np.cumsum(lengths)
            paths = np.full((len(lengths), max(lengths)), -1)
            for path, end, length in zip(paths, ends_at, lengths, strict=True):
                path[:length] = np.arange(end - length, end)
            for cache in caches:
                cache.fill(len(running), [(keys, -keys)], paths)
            for path, length in zip(paths, lengths, strict=True):
                running += [keys[path[:length], 0, 0].tolist() for _ in range(samples)]
                ends += [length + new] * samples
        for _ in range(data.draw(st.integers(0, new))):
            growing = [row for row in range(len(running)) if len(running[row]) < ends[row]]
            if len(growing) < len(running) or not running:
                break
            number += len(running)
            newest = number - torch.arange(len(running), dtype=torch.float64)
            for row, key in enumerate(newest.tolist()):
                running[row].append(key)
            filled = torch.tensor([len(keys) for keys in running])
            for cache in caches:
                most = int(filled.max())
                context = DecodeContext([], cache.own, filled, most, pages=cache.pages(len(running), most))
                context.root = [(torch.zeros(0, 2, 3, dtype=torch.float64),) * 2]
                k = newest.view(-1, 1, 1).expand(-1, 2, 3)
                context.attend(0, torch.zeros(len(running), 2, 3, dtype=torch.float64), k, -k)
        for row, expected in enumerate(running):
            for cache in caches:
                held = torch.tensor(expected, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
                assert torch.equal(found(cache, row, len(expected)), held)
        assert_sound(caches[1], len(running))
        if running:
            staying = data.draw(st.sets(st.sampled_from(range(len(running)))))
            # As `PackedDecoder.keep` does it: those behind the new end move into places before it.
            n = len(staying)
            movers = iter(sorted(row for row in staying if row >= n))
            order = [row if row in staying else next(movers) for row in range(n)]
            for cache in caches:
                cache.keep(len(running), order, [len(keys) for keys in running])
            running, ends = [running[row] for row in order], [ends[row] for row in order]
            assert_sound(caches[1], len(running))
    caches[1].keep(len(running), [], [])
    assert len(caches[1].free) == len(caches[1].users) - 1


def test_samples_of_a_prompt_share_its_full_pages():
    cache = Pages(8, 4, 3 * PAGE, 2 * PAGE, CPU)
    lengths = [2 * PAGE + 3, PAGE]
    keys = torch.randn(sum(lengths), 2, 4)
    paths = np.full((2, lengths[0]), -1)
    paths[0], paths[1, :PAGE] = np.arange(lengths[0]), np.arange(lengths[0], sum(lengths))
    cache.fill(0, [(keys, keys)], paths)
    shared = cache.host[:4, :2]
    assert (shared == shared[:1]).all() and len(np.unique(cache.host[:4, 2])) == 4
    assert (cache.host[4:, 0] == cache.host[4, 0]).all() and len(np.unique(cache.host[4:, 1:3])) == 8
    # 2 + 4 x 3 pages, and 1 + 4 x 2: in lines it would be 4 x 5 + 4 x 3.
    assert len(np.unique(cache.host[cache.host > 0])) == 23
    for row, path in enumerate(np.repeat(paths, 4, 0)):
        path = path[path >= 0]
        assert torch.equal(found(cache, row, len(path)), keys[path])
    cache.keep(8, [0, 4], [])
    assert_sound(cache, 2)
    cache.keep(2, [], [])
    assert len(cache.free) == pages_of(8, 4, 3 * PAGE, 2 * PAGE) - 1


@pytest.mark.parametrize(("samples", "longest", "new"), [(8, 80, 256), (8, 83, 200), (1, 20, 4), (4, 3, 2), (3, 100, 1)])
def test_pages_are_enough_for_all_slots(samples, longest, new):
    """With prompts of any length: those of the longest, and those that leave the most of a page to each sample."""
    slots = 6 * samples
    cache = Pages(slots, samples, longest, new, CPU)
    for length in (longest, longest // PAGE * PAGE - 1, 1, min(longest, PAGE - 1)):
        if length > 0:
            assert cache.room(0, [length] * 9) == 6


def test_fewer_places_than_lines_where_samples_share_a_prompt():
    """Problems of 100 tokens, 20 of which all have, 8 answers of up to 256: 512 slots."""
    assert pages_of(512, 8, 80, 256) * PAGE < 0.82 * 512 * (80 + 256)


def test_a_straggler_keeps_its_prompts_pages_and_others_wait_for_room():
    """One sample each of many prompts goes on: their prompts' pages are not there for new prompts, which come later."""
    cache = Pages(12, 4, 10 * PAGE, 1, CPU)
    keys = torch.randn(10 * PAGE, 1, 1)
    paths = np.arange(10 * PAGE)[None]
    for prompt in range(3):
        cache.fill(4 * prompt, [(keys, keys)], paths)
    cache.keep(12, [0, 4, 8], [])
    assert_sound(cache, 3)
    assert cache.room(3, [10 * PAGE, 10 * PAGE]) == 0 and cache.room(3, [PAGE] * 3) == 1
    cache.keep(3, [0], [])
    assert cache.room(1, [10 * PAGE] * 3) == 2


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("samples", [1, 4])
def test_no_page_is_left_behind_by_the_sampler(samples, late, monkeypatch):
    """A thousand sequences through 32 slots, looked at whenever some have ended."""
    monkeypatch.setattr(sampler, "LAG", {"cpu": late})
    monkeypatch.setattr(decoder, "in_pages", lambda *_: True)
    made, real = [], sampler.make_decoder
    monkeypatch.setattr(sampler, "make_decoder", lambda *how: made.append(real(*how)) or made[-1])
    sound, keep = [], Pages.keep

    def kept(self, rows, order, used):
        keep(self, rows, order, used)
        assert_sound(self, len(order))
        sound.append(len(order))

    monkeypatch.setattr(Pages, "keep", kept)
    model = make_model("llama")
    model.base = replace(model.base, eos_ids=tuple(range(0, 320, 6)))  # answers of every length
    prompts = random_prompts(5, 1000 // samples, longest=40)
    generate(model, prompts, samples, Sampling(max_new_tokens=12, slots=32), seed=0)
    assert len(sound) > 50 and max(made[0].cache.users) == 0 and len(made[0].cache.free) == len(made[0].cache.users) - 1
    torch.testing.assert_close(made[0].cache.table, torch.zeros_like(made[0].cache.table))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "kernels", "triton", "expected"),
    [
        ("cuda", torch.bfloat16, 128, "", True, True),
        ("cuda", torch.float32, 8, "triton", True, True),
        ("cuda", torch.bfloat16, 128, "torch", True, False),
        ("cuda", torch.bfloat16, 128, "", False, False),
        ("cuda", torch.bfloat16, 100, "", True, False),
        ("cuda", torch.bfloat16, 264, "", True, False),
        ("cuda", torch.float64, 128, "", True, False),
        ("cpu", torch.float32, 128, "", True, False),
        ("cpu", torch.float32, 128, "triton", True, False),
    ],
)
def test_pages_where_a_kernel_reads_them_in_place(device, dtype, head_dim, kernels, triton, expected, monkeypatch):
    """Torch's form copies the pages of all sequences, in every layer and step."""
    monkeypatch.setenv("FASTPPO_KERNELS", kernels)
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", triton)
    assert in_pages(torch.device(device), dtype, head_dim) is expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_the_decoder_asks_of_the_heads_that_it_caches(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(decoder, "in_pages", lambda *of: asked.append(of) or True)
    made = decoder.PackedDecoder(make_model(kind).backbone, [[5, 6]], 2, 4, 5, 64)
    with torch.no_grad():
        made.admit([[5, 6]])
    keys = made.cache.own[0][0]
    assert isinstance(made.cache, Pages) and asked == [(keys.device, keys.dtype, keys.shape[3])]
    monkeypatch.setattr(decoder, "in_pages", lambda *_: False)
    assert isinstance(decoder.PackedDecoder(make_model(kind).backbone, [[5, 6]], 2, 4, 5, 64).cache, Lines)


@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_keys_are_written_in_any_order_and_all_else_as_before(device, warn_only):
    """Torch's deterministic form on a GPU would sort them; it is asked for again behind, also after an error."""
    try:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        with pytest.raises(ZeroDivisionError), in_any_order(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() == (device == "cpu")
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
    with in_any_order(torch.device(device)):
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


class Writes(TorchDispatchMode):
    """Of each write to places by number, whether torch was to be deterministic."""

    def __init__(self):
        super().__init__()
        self.deterministic: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.index_put_:
            self.deterministic.append(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


def test_pages_are_filled_without_sorting_their_places(monkeypatch):
    """Keys and values of each layer, on what the cache takes for a GPU."""
    monkeypatch.setattr(cache_module, "on_device", lambda numbers, device: torch.as_tensor(numbers, dtype=torch.int64))
    cache = Pages(4, 2, PAGE + 3, 2, CPU)
    cache.device = torch.device("cuda")
    keys = torch.randn(PAGE + 3, 2, 4)
    try:
        torch.use_deterministic_algorithms(True)
        with Writes() as writes:
            cache.fill(0, [(keys, keys)] * 3, np.arange(PAGE + 3)[None])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert writes.deterministic == [False] * 6
    assert torch.equal(found(cache, 1, PAGE + 3), keys)


def test_lines_move_without_sorting_their_places(monkeypatch):
    """As a GPU has them where no kernel reads pages."""
    monkeypatch.setattr(cache_module, "on_device", lambda numbers, device: torch.as_tensor(numbers, dtype=torch.int64))
    cache = Lines(4, 2, 3, 2, CPU)
    cache.device = torch.device("cuda")
    keys = torch.randn(6, 2, 4)
    cache.fill(0, [(keys, keys)] * 3, np.arange(6).reshape(2, 3))
    try:
        torch.use_deterministic_algorithms(True)
        with Writes() as writes:
            cache.keep(4, [3, 1], [3] * 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert writes.deterministic == [False] * 6
    assert torch.equal(found(cache, 0, 3), keys[3:]) and torch.equal(found(cache, 1, 3), keys[:3])


def test_attention_in_pages_of_the_sampler_is_that_in_lines():
    """The newest key is written and seen, by sequences whose prompts share pages and end anywhere in one."""
    generator = torch.Generator().manual_seed(0)
    lengths, samples, new = [2 * PAGE, PAGE + 3, 5], 2, 9
    kept = [tuple(torch.randn(2, sum(lengths), 2, 4, generator=generator)) for _ in range(2)]
    root = [tuple(torch.randn(2, 6, 2, 4, generator=generator)) for _ in range(2)]
    paths = np.full((3, 2 * PAGE), -1)
    for path, start, length in zip(paths, (0, lengths[0], sum(lengths[:2])), lengths, strict=True):
        path[:length] = np.arange(start, start + length)
    caches = [kind(7, samples, 2 * PAGE, new, CPU) for kind in (Lines, Pages)]
    for cache in caches:
        cache.fill(0, kept, paths)
    filled = torch.tensor([n for n in lengths for _ in range(samples)])
    for _ in range(new):
        filled = filled + 1
        q, k, v = (torch.randn(6, heads, 4, generator=generator) for heads in (4, 2, 2))
        outs = []
        for cache in caches:
            context = DecodeContext(root, cache.own, filled, int(filled.max()), pages=cache.pages(6, int(filled.max())))
            outs.append(torch.stack([context.attend(layer, q, k, v, window=20) for layer in range(2)]))
        torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)
