"""A patched PEFT model computes what peft computes, in every state that peft can put it in."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import (
    VOCAB,
    Toy,
    adapted,
    assert_same,
    causal_lm,
    layers_of,
    outputs_of,
    patched,
    patched_with_warning,
    patching,
    plain,
    run,
    toy,
    toy_4bit,
)
from tiny import KINDS, tiny_config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from fastppo_kernels import NF4Weight, adapter_mask, lora_gemm, patch_peft, unpatch_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def calls(monkeypatch):
    """What `lora_linear`, or its form for arguments seen before, was called with: the proof that the fast form ran."""
    seen = []

    def counting(x, weight, *args, **kwargs):
        seen.append(tuple(weight.shape))
        return lora_linear(x, weight, *args, **kwargs)

    def counting_group(x, projections, *args):
        seen.append(tuple(projections[0].weight.shape))
        return checked_group(x, projections, *args)

    lora_linear, checked_group = patching.lora_linear, patching.checked_group
    monkeypatch.setattr(patching, "lora_linear", counting)
    monkeypatch.setattr(patching, "checked_group", counting_group)
    return seen


# -- the same results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_outputs_and_gradients_are_pefts(kind, calls):
    model, ids = causal_lm(kind)
    wanted = run(model, ids)
    fast = patched(model)
    assert_same(run(fast, ids), wanted)
    assert len(calls) == len(layers_of(model)) > 0
    assert_same(run(unpatch_peft(fast), ids), wanted)
    assert len(calls) == len(layers_of(model))


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_shapes(leading, width_in, width_out, rank, bias):
    model = adapted(nn.Sequential(nn.Linear(width_in, width_out, bias=bias)), r=rank, target_modules=["0"])
    x = torch.randn(*leading, width_in, requires_grad=True)
    fast = patched(model)
    wanted, found = model(x), fast(x)
    grads = [torch.autograd.grad(y.square().sum(), [x, *(p for p in m.parameters() if p.requires_grad)])
             for y, m in ((wanted, model), (found, fast))]  # fmt: skip
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads[1], grads[0])


def test_a_trained_base_gets_its_gradients():
    model, x = toy()
    model.requires_grad_(True)
    wanted = run(model, x)
    assert any("base_layer.weight" in name for name in wanted[1]) and any("base_layer.bias" in name for name in wanted[1])
    assert_same(run(patched(model), x), wanted)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_pefts(half, autocast):
    """Adapters are in float32, as peft makes them; the yardstick of gradients is peft with them in half precision too."""
    model, x = toy(torch.float32 if autocast else half)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            parameter.data *= 0.4
    reference = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", half):
        yardstick = run(model, x)
    with torch.autocast("cpu", half, enabled=autocast):
        own, fast = run(model, x), run(patched(model), x)
    assert fast[0].dtype == own[0].dtype and all(fast[1][name].dtype == torch.float32 for name in own[1])

    def error(found, wanted):
        return float((found.double() - wanted).norm() / wanted.norm())

    assert error(fast[0], reference[0]) <= 1.2 * error(own[0], reference[0]) + 1e-6
    for name, grad in reference[1].items():
        assert error(fast[1][name], grad) <= 1.2 * error(yardstick[1][name], grad) + 1e-4, name


def test_float64():
    model, x = toy(torch.float64)
    model.double()
    assert_same(run(patched(model), x), run(model, x), atol=1e-12)


# -- 4-bit weights -------------------------------------------------------------------------------------------------------


def dense(model):
    """The same in float32, with the values that the 4 bits stand for."""
    twin = adapted(nn.Sequential(nn.Linear(128, 64)), target_modules=["0"])
    to, of = layers_of(twin)[0], layers_of(model)[0]
    to.base_layer.weight.data = NF4Weight.from_bitsandbytes(of.base_layer.weight).dequantize(torch.bfloat16).float()
    to.base_layer.bias.data = of.base_layer.bias.data.float()
    to.lora_A.load_state_dict(of.lora_A.state_dict())
    to.lora_B.load_state_dict(of.lora_B.state_dict())
    return twin


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_nf4_base(autocast, twice, monkeypatch):
    """Against float64, no worse than peft with bitsandbytes; the yardstick of gradients is peft's all in bfloat16."""
    model, x = toy_4bit(stored=torch.float32 if autocast else torch.bfloat16, compress_statistics=twice)
    seen = []
    monkeypatch.setattr(patching, "lora_gemm", lambda *args, **kwargs: seen.append(1) or lora_gemm(*args, **kwargs))
    fast = patched(model)
    assert type(layers_of(fast)[0]).__name__ == "FastLinear4bit"
    reference = run(dense(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = run(dense(model), x.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, found = run(model, x), run(fast, x)
    assert seen and found[0].dtype == own[0].dtype == x.dtype

    def error(found, wanted):
        return float((found.double() - wanted).norm() / wanted.norm())

    assert error(found[0], reference[0]) <= 1.2 * error(own[0], reference[0]) + 1e-6
    for name in own[1]:
        assert error(found[1][name], reference[1][name]) <= 1.2 * error(yardstick[1][name], reference[1][name]) + 1e-4


@pytest.mark.parametrize("twice", [False, True])
def test_an_nf4_weight_is_made_once_and_again_when_it_changes(twice, monkeypatch):
    model, x = toy_4bit(compress_statistics=twice)
    other, _ = toy_4bit(compress_statistics=twice)
    made, make = [], NF4Weight.from_bitsandbytes
    monkeypatch.setattr(NF4Weight, "from_bitsandbytes", lambda weight: made.append(1) or make(weight))
    fast = patched(model)
    made.clear()
    first = [fast(x) for _ in range(3)]
    assert len(made) == 0  # patch_peft has made it
    layer = layers_of(fast)[0]
    state = layer.base_layer.weight.quant_state
    state.absmax = state.absmax.clone()
    assert torch.equal(fast(x), first[0]) and len(made) == 1
    (state.state2 if twice else state).absmax.mul_(2)
    changed = fast(x)
    assert len(made) == 2 and not torch.allclose(changed, first[0])
    layer.base_layer.weight = layers_of(other)[0].base_layer.weight
    assert torch.equal(fast(x), first[0]) and len(made) == 3
    for each in (copy.deepcopy(fast), unpatch_peft(fast)):
        assert "_fastppo_nf4" not in vars(layers_of(each)[0])


def test_an_adapter_wider_than_its_nf4_base_is_pefts():
    model, x = toy_4bit(stored=torch.float32)
    torch.testing.assert_close(patched(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "fp4"}, "4-bit weight of type fp4: 1"),
        ({"compute": torch.float32}, "4-bit weight of torch.bfloat16, computed in torch.float32: 1"),
    ],
)
def test_other_4bit_bases_are_pefts(options, why):
    model, x = toy_4bit(**options)
    torch.testing.assert_close(patched_with_warning(model, why)(x), model(x), rtol=0, atol=0)


class ByLoraGemm:
    """What makes a 4-bit layer one that says of itself that it computes through `lora_gemm`."""

    computes_by_lora_gemm = True

    def forward(self, x):
        return lora_gemm(x, NF4Weight.from_bitsandbytes(self.weight), None, None, bias=self.bias)


def test_a_4bit_layer_with_a_forward_of_its_own_is_pefts_unless_it_is_by_lora_gemm(monkeypatch):
    model, x = toy_4bit()
    layer = layers_of(model)[0].base_layer
    layer.__class__ = type("Own", (type(layer),), {"forward": lambda self, x: x[..., :64] * 3})
    wanted = model(x)
    torch.testing.assert_close(patched_with_warning(model, "base layer Own")(x), wanted, rtol=0, atol=0)

    model, x = toy_4bit(compute=torch.float32)  # rounded to bfloat16 by bitsandbytes alone
    layer = layers_of(model)[0].base_layer
    layer.__class__ = type("Own", (ByLoraGemm, type(layer)), {})
    layer.bias.data = layer.bias.data.float()
    twin = dense(model)
    twin_layer = layers_of(twin)[0].base_layer
    twin_layer.weight.data = NF4Weight.from_bitsandbytes(layer.weight).dequantize(torch.float32)
    seen = []
    monkeypatch.setattr(patching, "lora_gemm", lambda *args, **kwargs: seen.append(1) or lora_gemm(*args, **kwargs))
    fast = patched(model)
    assert_same(run(fast, x.float()), run(twin, x.float()))
    assert seen
    torch.testing.assert_close(plain(fast, x.float()), plain(twin, x.float()))


# -- peft's own operations -----------------------------------------------------------------------------------------------


def test_nothing_but_the_class_changes():
    model, _ = causal_lm("qwen2")
    before, keys = [type(layer) for layer in layers_of(model)], list(model.state_dict())
    parameters = dict(model.named_parameters())
    assert patch_peft(model) is model and patch_peft(patch_peft(model)) is model
    assert all(isinstance(layer, PeftLinear) and type(layer).__name__ == "FastLinear" for layer in layers_of(model))
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert unpatch_peft(model) is model and unpatch_peft(model) is model
    assert [type(layer) for layer in layers_of(model)] == before
    assert not any("_fastppo_patch" in vars(layer) for layer in layers_of(model))


def test_saving_and_loading(tmp_path):
    model, ids = causal_lm("llama")
    model.save_pretrained(tmp_path / "plain")
    wanted = outputs_of(model, ids)
    patch_peft(model).save_pretrained(tmp_path / "fast")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    base = unpatch_peft(model).unload()
    loaded = patch_peft(PeftModel.from_pretrained(base, tmp_path / "fast"))
    torch.testing.assert_close(outputs_of(loaded, ids), wanted)
    loaded.load_adapter(tmp_path / "plain", "second")  # into the patched model
    loaded.set_adapter("second")
    torch.testing.assert_close(outputs_of(loaded, ids), wanted)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_are_patched(how, tmp_path, calls):
    model, x = toy()
    fast = patched(model)
    if how == "pickle":
        fast = pickle.loads(pickle.dumps(fast))
    elif how == "deepcopy":
        fast = copy.deepcopy(fast)
    else:
        torch.save(fast, tmp_path / "model.pt")
        fast = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(run(fast, x), run(model, x))
    assert len(calls) == 2
    with adapter_mask(fast, torch.zeros(2, 5)):
        torch.testing.assert_close(fast(x), plain(model, x))
    assert len({id(layer._fastppo_patch) for layer in layers_of(fast)}) == 1


def test_switching_adding_and_deleting_adapters(calls):
    model, x = toy(rank_pattern={"up": 3}, alpha_pattern={"down": 5}, use_rslora=True)
    fast = patched(model)
    for each in (model, fast):
        torch.manual_seed(5)
        each.add_adapter("second", LoraConfig(r=6, target_modules=["up"], init_lora_weights=False))
    assert_same(run(fast, x), run(model, x))
    for names in ("second", "default", ["default", "second"], ["second", "default"]):
        for each in (model, fast):
            each.base_model.set_adapter(names)
        calls.clear()
        assert_same(run(fast, x), run(model, x))
        assert len(calls) == (1 if names == "second" else 2)
    torch.testing.assert_close(plain(fast, x), plain(model, x))
    for each in (model, fast):
        each.delete_adapter("default")
        each.set_adapter("second")
    assert_same(run(fast, x), run(model, x))


def test_an_adapter_on_new_layers_needs_a_second_call():
    model, x = toy(target_modules=["up"])
    patch_peft(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.set_adapter("second")
    before = run(model, x)
    with pytest.raises(ValueError, match="not patched: Linear: 1"), adapter_mask(model, torch.ones(5)):
        pass
    assert_same(run(patch_peft(model), x), before)
    with adapter_mask(model, torch.ones(5)):
        assert_same(run(model, x), before)


def test_merging_and_unmerging(calls):
    model, x = toy()
    fast = patched(model)
    for each in (model, fast):
        each.merge_adapter()
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert not calls
    for each in (model, fast):
        each.unmerge_adapter()
    assert_same(run(fast, x), run(model, x))
    for each in (model, fast):
        each.merge_adapter()
    torch.testing.assert_close(plain(fast, x), plain(model, x))  # which unmerges
    merged = fast.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), model(x))


def test_adapter_names_in_a_batch():
    model, ids = causal_lm("mistral")
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        wanted, found = (outputs_of(each, ids, adapter_names=names) for each in (model, patched(model)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_modules_to_save():
    model, ids = causal_lm("llama", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    wanted = run(model, ids)
    assert any("modules_to_save" in name for name in wanted[1])
    assert_same(run(patched(model), ids), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = causal_lm("qwen2")
    wanted = run(model, ids)
    fast = patched(model).train()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(fast, ids), wanted)


def test_compile_in_one_graph_for_all_lengths():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model, _ = toy()
    compiled = torch.compile(patched(model), fullgraph=True, dynamic=True, backend=graphs)
    for length in (3, 8, 17):
        x = torch.randn(2, length, 24)
        out, grads = run(model, x)
        assert_same(run(compiled, x), (out, {f"_orig_mod.{name}": grad for name, grad in grads.items()}))
    assert graphs.frame_count == 1


def test_transformers_own_adapters(calls):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", VOCAB)).eval()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ids = torch.randint(VOCAB, (2, 6))
    wanted = run(model, ids)
    assert_same(run(patch_peft(model), ids), wanted)
    assert len(calls) == 4


def _new_parameter(module):
    module.weight = nn.Parameter(module.weight.detach() * 2)


CHANGES = {
    "base hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, output: output + 1),
    "base pre-hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "A hook": lambda layer: layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2),
    "dropout hook": lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output * 2),
    "backward hook": lambda layer: layer.base_layer.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,)),
    "forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: x.new_ones(*x.shape[:-1], 24)),
    "base weight": lambda layer: _new_parameter(layer.base_layer),
    "A": lambda layer: _new_parameter(layer.lora_A["default"]),
    "B": lambda layer: _new_parameter(layer.lora_B["default"]),
    "B in place": lambda layer: layer.lora_B["default"].weight.data.mul_(2),
    "bias": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(24))),
    "base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(40, 24, bias=False).requires_grad_(False)),
    "scale": lambda layer: layer.set_scale("default", 3.0),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "bias of B": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(24))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_called_notices_changes(change):
    model, x = toy()
    fast = patched(model)
    for each in (model, fast):
        before = run(each, x)[0]
        torch.manual_seed(5)
        CHANGES[change](each.base_model.model.down)
    found = []
    for each in (model, fast):
        torch.manual_seed(6)
        found.append(run(each, x))
    assert_same(found[1], found[0])
    if change != "merged" and change != "backward hook":
        assert not torch.allclose(found[1][0], before)


def test_a_layer_that_was_called_looks_at_its_input_again(calls):
    model, x = toy()
    fast = patched(model)
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="weight must have shape"):
        fast.base_model.model.down(x)
    with pytest.raises(ValueError, match="must have shape"):
        fast.base_model.model.down(torch.tensor(1.0))
    torch.testing.assert_close(fast.double()(x.double()), model.double()(x.double()))


# -- what stays with peft ------------------------------------------------------------------------------------------------


def test_dropout_is_pefts_in_training_mode_only(calls):
    model, x = toy(lora_dropout=0.5)
    fast = patched_with_warning(model, r"2 of 2 LoRA layers compute through peft \(lora_dropout > 0 \(in training mode\): 2\)")
    results = []
    for each in (model.train(), fast.train()):
        torch.manual_seed(3)
        results.append(run(each, x))
    assert_same(results[1], results[0])
    assert not calls
    assert_same(run(fast.eval(), x), run(model.eval(), x))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ({"use_dora": True}, "DoRA: 2"),
        ({"lora_bias": True}, "lora_bias: 2"),
        ({"alora_invocation_tokens": [1]}, "ALora: 2"),
    ],
)
def test_variants_are_pefts(lora, why, calls):
    model, x = toy(**lora)
    fast = patched_with_warning(model, why)
    assert_same(run(fast, x), run(model, x))
    assert not calls


def test_layers_of_other_kinds_are_pefts(calls):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv, self.head = nn.Embedding(11, 8), nn.Conv2d(1, 1, 1), nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.conv(self.embedding(ids)[:, None])[:, 0])

    torch.manual_seed(0)
    model, ids = adapted(Mixed(), target_modules=["embedding", "conv", "head"]), torch.randint(11, (2, 4))
    fast = patched_with_warning(model, r"2 of 3 .*layer Conv2d: 1, layer Embedding: 1")
    assert_same(run(fast, ids), run(model, ids))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="Conv2d: 1, Embedding: 1"), adapter_mask(fast, torch.ones(4)):
        pass


def test_a_base_that_is_more_than_a_linear_layer_is_pefts(calls):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = toy()
    model.base_model.model.up.base_layer.__class__ = Doubled
    fast = patched_with_warning(model, "1 of 2 .*base layer Doubled")
    assert_same(run(fast, x), run(model, x))
    assert calls == [(24, 40)]


def test_hooks_are_not_passed_over(calls):
    model, x = toy()
    fast = patched(model)
    handles = []
    for each in (model, fast):
        up, down = each.base_model.model.up, each.base_model.model.down
        handles.append(up.base_layer.register_forward_hook(lambda module, args, output: output + 1))
        handles.append(down.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,)))
    assert_same(run(fast, x), run(model, x))
    assert not calls
    for handle in handles:
        handle.remove()
    assert_same(run(fast, x), run(model, x))
    assert len(calls) == 2


def test_unknown_weights_are_pefts(calls):
    class Packed(torch.Tensor):
        pass

    model, x = toy()
    fast = copy.deepcopy(model)
    for each in (model, fast):
        layer = each.base_model.model.up.base_layer
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.warns(UserWarning, match=r"base weight Packed \(float32\): 1"):
        patch_peft(fast)
    torch.testing.assert_close(fast(x).as_subclass(torch.Tensor), model(x).as_subclass(torch.Tensor))
    assert calls == [(24, 40)]


def test_scales_in_tensors_are_pefts(calls):
    model, x = toy()
    fast = patched(model)
    prepare_model_for_compiled_hotswap(fast, target_rank=6)
    torch.testing.assert_close(fast(x), model(x))
    assert not calls


def test_wrong_dtypes_raise_what_peft_raises():
    model, x = toy()
    with pytest.raises(RuntimeError, match="dtype"):
        model(x.double())
    with pytest.raises(RuntimeError, match="dtype"):
        patched(model)(x.double())


def test_no_warning_where_there_is_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(toy()[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: "llama", "must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(2, 2), "must have LoRA layers made by peft, got none"),
        (
            lambda: get_peft_model(Toy(), IA3Config(target_modules=["up"], feedforward_modules=["up"])),
            "must have LoRA layers made by peft, got ia3.layer.Linear",
        ),
    ],
)
def test_wrong_models(model, message):
    for function in (patch_peft, unpatch_peft):
        with pytest.raises(ValueError, match=message):
            function(model())


def test_a_class_changed_by_others_is_not_unpatched():
    fast = patched(toy()[0])
    layer = fast.base_model.model.up
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match="changed since, to Sharded"):
        unpatch_peft(fast)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_dropout_is_called(kind):
    model, x = toy()
    seen = []
    for layer in layers_of(model):
        getattr(layer.lora_dropout["default"], kind)(lambda *_: seen.append(1))
    fast = patched_with_warning(model, r"2 of 2 .*lora_dropout with hooks or a forward of its own: 2")
    torch.testing.assert_close(fast(x), model(x))
    assert len(seen) == 4
