"""The counted peak of a layer through bordered buffers, beside what is alive on meta tensors that are taken for a GPU's."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton", reason="what is counted are its kernels")

from bench import counts  # noqa: E402
from bench.counting import Counter, as_on_cuda, storage_of  # noqa: E402
from fastppo import memory  # noqa: E402
from fastppo.memory import Batch, Layer, Machine  # noqa: E402
from fastppo.model.llama_trunk import LlamaTrunk  # noqa: E402
from fastppo_kernels import AttentionMemory  # noqa: E402
from fastppo_kernels.attention_memory import Walk  # noqa: E402

MACHINE = Machine(cuda=True, itemsize=2)


class Alive(Counter):
    """Bytes of the tensors made within that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    @property
    def now(self):
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        return sum(size for _, size in self.alive.values())

    def _see(self, func, args, kwargs, out):
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta and not func.is_view:
                given = {storage_of(y) for y in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(y, torch.Tensor)}
                if storage_of(x) not in given:
                    self.alive[storage_of(x)] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        self.most = max(self.most, self.now)


def layer_of(case):
    config, ranks = case.config, dict.fromkeys("qkvo", case.rank) | dict.fromkeys(("gate", "up", "down"), case.rank)
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    return Layer(config.hidden_size, config.intermediate_size, heads, config.num_key_value_heads, head_dim, ranks)


@pytest.mark.parametrize("case", [counts.Case("7b", 8192, 512, 16), counts.Case("tiny", 4096, 512, 8)], ids=["7b", "tiny"])
def test_a_layer_s_peak_is_counted_within_a_tenth(case):
    layer, alive = layer_of(case), Alive()
    # Gradients of keys and values, of which nothing is gathered. FlashAttention's own sums are not seen on meta tensors.
    attention = AttentionMemory(0, 0, 0, 2 * case.tokens * layer.keys * MACHINE.itemsize)
    walk = Walk()
    trunk = memory._trunk(walk, layer, MACHINE, Batch(case.tokens, case.tokens, case.tokens, attention), False)
    call = counts.fastppo_call(case)
    with as_on_cuda(alive), alive:
        z = call.run()
        kept = trunk.forward(True)
        forward, counted = alive.most, walk.most
        assert alive.now - z.numel() * 2 == kept and abs(counted - forward) < 0.1 * forward, (counted, forward)
        grad = torch.empty_like(z)
        before, alive.most = alive.now, 0
        walk.most = walk.now = 0
        found = torch.autograd.grad(z, call.leaves, grad)
        trunk.backward(True)
    measured = alive.most - before
    assert abs(walk.most - measured) < 0.1 * measured, (walk.most, measured)
    assert len(found) == 15


def test_what_borders_take_is_counted_to_the_byte():
    case = counts.Case("7b", 16, 16, 12)
    model = counts.peft_model(case, torch.float32, "sdpa")
    weights = {name: x.numel() * 2 for name, x in model.named_parameters() if "proj.base_layer.weight" in name}
    trunk = LlamaTrunk(model.model)
    trunk.border()
    (buffers,) = trunk.buffers.values()
    held = sum(buffer.weight.numel() * 2 for buffer in buffers)
    assert len(weights) == 7 and held - sum(weights.values()) == memory.borders(layer_of(case), MACHINE)


@pytest.mark.parametrize(
    ("machine", "fused", "expected"),
    [(MACHINE, True, True), (MACHINE, False, False), (Machine(True, 4), True, False), (Machine(False, 2), True, False)],
)
def test_where_there_are_borders(machine, fused, expected):
    assert machine.borders(Layer(8, 8, 1, 1, 8, {}, fused=fused)) is expected
