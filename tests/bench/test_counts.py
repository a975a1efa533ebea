"""`python -m bench.counts`: known answers of the counter, and what a layer costs by formulas of its own."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="what is counted are its kernels")

from bench import counts  # noqa: E402
from bench.counting import ATTENTION, COPIES, FROZEN, KINDS, OTHER, TRAINED, Counter, Counts, Saved, Tally  # noqa: E402
from bench.counts import FLOOR, HALF, META, OURS, PEFT, Case, meta  # noqa: E402

# 60 and 15 are no multiples of what kernels like, and 128, 352, 64 no multiples of each other.
CASE = Case("tiny", 60, 15, 8)
HIDDEN, INNER, QUERIES, KEYS, HEADS, LAYERS = 128, 352, 128, 64, 4, 4
SHAPES = [(QUERIES, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, QUERIES), *[(INNER, HIDDEN)] * 2, (HIDDEN, INNER)]
WEIGHTS = sum(n * k for n, k in SHAPES)
ADAPTERS = sum(8 * (n + k) for n, k in SHAPES)
ZEROS = 2 * 2 * 60 * 2 * KEYS * 8  # multiplied in the adapters of k and v, which lie side by side, forward and for dS
PAIRS = 4 * 15 * 16 // 2


@pytest.fixture(scope="module")
def layers():
    return counts.layers(CASE)


@pytest.fixture(scope="module")
def steps(layers):
    return counts.steps(CASE, layers)


def counted(run, *tensors, device="meta", **how):
    counter = Counter(device=device, **how)
    with counter:
        run(*tensors)
    return counter.counts


# -- the counter ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.view(-1), lambda x: x.t()[1:, ::2].unsqueeze(0).expand(5, -1, -1), lambda x: x.detach(),
        lambda x: x.split(2, 1), lambda x: x.contiguous(), lambda x: torch.empty_like(x), lambda x: x.new_empty(3, 3),
        lambda x: x.reshape(2, -1), lambda x: x.new_zeros(0).exp(), lambda x: x.to(torch.float32),
    ],
)  # fmt: skip
def test_views_and_allocations_are_no_launches(run):
    assert counted(run, meta(4, 6, dtype=torch.float32)).of() == Tally()


@pytest.mark.parametrize(
    "run, kind, moved",
    [
        (lambda x: x.exp(), OTHER, 96 + 96),
        (lambda x: x + x, OTHER, 96 + 96),  # the same tensor is read once
        (lambda x: x + x.t().contiguous().t(), None, (96 + 96) + (2 * 96 + 96)),
        (lambda x: x.mul_(2.0), OTHER, 96 + 96),
        (lambda x: x.zero_(), OTHER, 96),
        (lambda x: x.copy_(meta(6, dtype=torch.bfloat16)), COPIES, 12 + 96),
        (lambda x: torch.mul(x, 2.0, out=meta(4, 6, dtype=torch.float32)), OTHER, 96 + 96),
        (lambda x: x * meta(4, 1, dtype=torch.float32).expand(4, 6), OTHER, 96 + 16 + 96),
        (lambda x: x.sum(), OTHER, 96 + 4),
        (lambda x: torch.zeros_like(x), OTHER, 96),
        (lambda x: x.bfloat16(), COPIES, 96 + 48),
        (lambda x: torch.cat([x, x[:2]]), COPIES, 96 + 48 + 144),
        (lambda x: x.t().contiguous(), COPIES, 96 + 96),
        (lambda x: x.index_select(0, meta(3, dtype=torch.int64)), COPIES, 24 + 2 * 72),
        (lambda x: torch._foreach_mul_([x, x[0]], 2.0), OTHER, 2 * (96 + 24)),
        (lambda x: torch.ones(3, device="cpu").exp(), OTHER, 0),  # another device
    ],
)  # fmt: skip
def test_bytes_are_those_read_and_written(run, kind, moved):
    found = counted(run, meta(4, 6, dtype=torch.float32))
    assert found.of().bytes == moved and found.of().flops == 0
    if kind is not None:
        assert found.of() == found.of(kind) and found.of().launches == (moved > 0)


def test_products_are_told_apart_by_their_weights():
    x, weight, other = meta(5, 6), nn.Parameter(meta(7, 6)), meta(7, 6)
    found = counted(lambda: (x @ weight.t(), torch.addmm(meta(7), x, other.t())), frozen=[weight])
    assert found.of(FROZEN) == Tally(1, 2 * 5 * 6 * 7, 2 * (5 * 6 + 6 * 7 + 5 * 7))
    assert found.of(TRAINED) == Tally(1, 2 * 5 * 6 * 7, 2 * (7 + 5 * 6 + 6 * 7 + 5 * 7))


def test_what_is_computed_is_not_changed_by_being_counted():
    x = torch.randn(5, 6)
    counter = Counter([x], device="cpu")
    with counter:
        y = (x @ x.t()).relu()
    assert torch.equal(y, (x @ x.t()).relu()) and counter.counts.of(FROZEN).flops == 2 * 5 * 5 * 6
    assert counter.counts.of().launches == 2


def test_backward_is_counted_too():
    x, weight = meta(5, 6, grad=True), meta(7, 6)
    with Counter([weight]) as counter:
        (x @ weight.t()).sum().backward()
    assert counter.counts.of(FROZEN).flops == 2 * (2 * 5 * 6 * 7)


@pytest.mark.parametrize(
    "run, kept",
    [
        (lambda x: x.exp(), 120),  # its result
        (lambda x: x + 1, 0),
        (lambda x: x.exp().exp(), 240),
        (lambda x: x.exp().sin().cos(), 240),  # the first by two of them
        (lambda x: x.exp().view(-1)[:3].square(), 120),  # a part keeps the whole alive
        (lambda x: x * 2.0, 0),
        (lambda x: x.square(), 0),  # a parameter
    ],
)
def test_saved_bytes_are_counted_once_a_storage(run, kept):
    x = nn.Parameter(meta(5, 6, dtype=torch.float32))
    saved = Saved([x])
    with saved:
        run(x)
    assert saved.bytes == kept


def test_counts_add_up():
    one, other = Counts(saved=3), Counts(saved=5)
    one.add(OTHER, "exp", Tally(1, 0, 10))
    other.add(OTHER, "exp", Tally(1, 0, 10))
    other.add(FROZEN, "mm", Tally(2, 7, 20))
    total = one.plus(other, 3)
    assert total.saved == 18 and total.of() == Tally(10, 21, 100) and total.of(OTHER) == Tally(4, 0, 40)
    assert one.of() == Tally(1, 0, 10)


# -- a layer -------------------------------------------------------------------------------------------------------------


def test_products_with_the_frozen_weights_are_four_flops_a_weight_and_token(layers):
    for name, found in layers.items():
        assert found.of(FROZEN).flops == 4 * WEIGHTS * 60, name
        # Ours: k with v; one product for the gradient of an input.
        assert found.of(FROZEN).launches == (6 + 4 if name == OURS else 14), name


def test_products_with_the_adapters_are_six(layers):
    for name, found in layers.items():
        assert found.of(TRAINED).flops == 6 * ADAPTERS * 60 + (ZEROS if name == OURS else 0), name


def test_attention_is_two_products_forward_and_five_backward(layers):
    for name in (FLOOR, OURS, HALF, PEFT):
        assert layers[name].of(ATTENTION).flops == 14 * PAIRS * QUERIES, name
        assert layers[name].of(ATTENTION).launches == 2, name
    whole = 12 * 4 * 15 * 15 * QUERIES  # transformers' own: all scores, kept for backward
    assert layers[counts.EAGER].of(ATTENTION).flops == whole


def test_our_layer_keeps_what_its_docstring_says(layers):
    """x, y, gate, up; queries, keys, values, attention's result and denominators; S; nothing else."""
    numbers = 2 * HIDDEN + 2 * INNER + 2 * QUERIES + 2 * KEYS + 7 * 8
    assert layers[OURS].saved == 60 * (2 * numbers + 4 * HEADS) == layers[FLOOR].saved
    assert layers[OURS].saved < 0.6 * layers[HALF].saved < 0.6 * layers[PEFT].saved


def test_our_kernels_are_launched_as_often_as_the_layer_has_them(layers):
    ops = {name.removeprefix("fastppo_kernels."): tally.launches for (_, name), tally in layers[OURS].ops.items()}
    # In backward both norms and silu(gate) up are made again beside their gradients.
    wanted = {"rms_norm_lora": 2, "rms_norm_residual_backward": 2, "rope": 1, "rope_into": 1}
    wanted |= {"swiglu_lora": 1, "swiglu_backward_lora": 1}
    assert not {"rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "add"} & ops.keys()
    assert not {"sum_rows", "index_select"} & ops.keys()  # no prefix is shared
    assert {name: ops[name] for name in wanted} == wanted


def test_our_layer_copies_no_more_than_it_did(layers):
    """Values are copied out of k's and v's product, and three activations into buffers: the attention's result, the gradient
    of the result, that of the values. The other copies are small: S, dA of a group."""
    copies = {name: tally for (kind, name), tally in layers[OURS].ops.items() if kind == COPIES}
    most = {"copy_": 3, "clone": 3, "cat": 2, "_to_copy": 5}
    assert copies.keys() <= most.keys() and all(tally.launches <= most[name] for name, tally in copies.items())
    assert copies["copy_"].bytes == 2 * 60 * 2 * (QUERIES + HIDDEN + KEYS)
    assert layers[OURS].of().launches <= 60


def test_bytes_of_our_norm_and_swiglu(layers):
    """Each input once, each result once; a denominator for each row."""
    ops = {name.removeprefix("fastppo_kernels."): tally.bytes for (_, name), tally in layers[OURS].ops.items()}
    assert ops["rms_norm_lora"] == 2 * (60 * (2 * HIDDEN * 2 + 4) + 2 * HIDDEN)
    assert ops["rms_norm_residual_backward"] == 2 * (60 * 5 * HIDDEN * 2 + 2 * HIDDEN)
    assert ops["swiglu_lora"] == 60 * 3 * INNER * 2 and ops["swiglu_backward_lora"] == 60 * 6 * INNER * 2


def test_nothing_is_below_the_floor_and_we_are_below_peft(layers):
    def costs(found):
        moved, zeros = found.of(TRAINED, COPIES, OTHER).bytes, ZEROS if found is layers[OURS] else 0
        flops = (found.of(kind).flops - (zeros if kind == TRAINED else 0) for kind in KINDS)
        return *flops, moved, found.of().launches, found.saved

    for name, found in layers.items():
        assert all(ours >= least for ours, least in zip(costs(found), costs(layers[FLOOR]), strict=True)), name
    for name in (HALF, PEFT, counts.EAGER):
        assert all(ours <= theirs for ours, theirs in zip(costs(layers[OURS]), costs(layers[name]), strict=True)), name


def test_costs_grow_with_the_tokens_and_launches_do_not(layers):
    more = counts.fastppo_layer(Case("tiny", 120, 15, 8))
    assert more.of().launches == layers[OURS].of().launches and more.saved == 2 * layers[OURS].saved
    assert more.of(FROZEN, TRAINED, ATTENTION).flops == 2 * layers[OURS].of().flops


# -- a step --------------------------------------------------------------------------------------------------------------


def test_a_step_is_its_layers_and_the_head(steps):
    head = 4 * 60 * 2048 * HIDDEN
    for name in (FLOOR, OURS):
        assert steps[name].of(FROZEN).flops == LAYERS * 4 * WEIGHTS * 60 + head, name
    for name in (HALF, PEFT):
        assert steps[name].of(FROZEN).flops == LAYERS * 4 * WEIGHTS * 60 + head, name


def test_the_logits_are_read_twice_and_written_once_by_us(steps):
    """By the kernel of the loss, which writes the gradient over them."""
    assert steps[OURS].ops[OTHER, "ppo"] == Tally(1, 0, 3 * 60 * 2048 * 2)
    logits = 60 * 2048 * 4
    assert steps[HALF].of(OTHER).bytes > steps[OURS].of(OTHER).bytes + 6 * logits


def test_the_buffers_are_refreshed_once_a_step():
    found = counts.refreshed(CASE)
    assert found.of() == found.of(COPIES) == Tally(14, 0, (4 + 2) * ADAPTERS)


def test_the_optimizer_is_counted(layers):
    found = counts.optimizer_step(CASE)
    # At least what its definition reads and writes: parameter, gradient and both moments.
    assert found.of().bytes >= 4 * 8 * ADAPTERS * LAYERS and found.of().flops == 0
    assert 2 < found.of().launches < 40


# -- the command ---------------------------------------------------------------------------------------------------------

SMALL = ["--model", "tiny", "--tokens", "60", "--length", "15", "--rank", "8"]


def test_the_tables(capsys, layers):
    assert counts.main([*SMALL, "--ops"]) == 0
    out = capsys.readouterr().out
    assert "One layer, forward and backward: tiny, 60 tokens in sequences of 15, rank 8, bf16" in out
    assert "One update step, 4 layers" in out and "fastppo_kernels.swiglu_backward" in out
    row = next(line for line in out.splitlines() if line.startswith("| fastppo "))
    assert f" {layers[OURS].of().launches:.0f} " in row


def test_json(capsys, layers):
    assert counts.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("model", "tokens", "length", "rank")} == {
        "model": "tiny", "tokens": 60, "length": 15, "rank": 8
    }  # fmt: skip
    assert list(found["layer"]) == list(layers) and list(found["step"]) == [FLOOR, OURS, HALF, PEFT]
    ours = found["layer"][OURS]
    assert ours["saved_bytes"] == layers[OURS].saved and ours["kinds"][FROZEN]["flops"] == 4 * WEIGHTS * 60
    assert sum(op["launches"] for op in ours["ops"]) == ours["launches"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--tokens", "100", "--length", "30"], "--tokens must be a multiple of --length, got 100 and 30"),
        (["--model", "8b"], "invalid choice: '8b'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        counts.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_nothing_is_left_pretended(layers):
    assert not torch.empty(1, device=META).is_cuda
    assert torch.is_autocast_enabled("cpu") is False
