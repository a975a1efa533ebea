"""A base in 4 bits computes what the same base does with the values that its 4 bits stand for."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine import make_base, make_config, make_model, random_prompts, relative, spread_adapter, tiny_folder
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from fastppo.batch.token_tree import build_tree
from fastppo.config import load_config
from fastppo.errors import UserError
from fastppo.model import nf4
from fastppo.model.actor_critic import CRITIC, POLICY, ActorCritic
from fastppo.model.backbone import Backbone
from fastppo.model.load import load_base
from fastppo_kernels import NF4Weight

pytest.importorskip("bitsandbytes", reason="bases in 4 bits need bitsandbytes")

# Our own trunk; biases and a tied head; transformers' modules on packed tokens; padded; weights that are stored transposed.
# All are 32 wide: two rows share a block of 64 weights.
KINDS = ("llama", "qwen2", "gpt_neox", "mpt", "gpt2")
HALF_A_GAP = 0.152  # of the two codes that lie furthest apart, -1 and -0.696


def make_tree():
    prompts = random_prompts(0, 5, root=4)
    return build_tree([p + [10 + i, 20, 1] for p in prompts for i in range(2)], [len(p) for p in prompts for _ in range(2)])


def dense_twin(kind, quantised):
    """The base with plain weights of the quantised one's values."""
    dense = make_base(kind)
    nf4.copy_dequantised(quantised.model, dense.model)
    return dense


def twins(kind, **settings):
    """Actor-critics in 4 bits and in the values that they stand for, with the same random adapters and value head."""
    config, quantised = make_config(kind, dtype="nf4", **settings), make_base(kind, dtype="nf4")
    pair = [ActorCritic(base, config) for base in (quantised, dense_twin(kind, quantised))]
    for model in pair:
        for seed, adapter in enumerate(model.peft.peft_config):
            spread_adapter(model, adapter, 0.1, seed=seed)
        torch.manual_seed(1)
        nn.init.normal_(model.value_head.weight)
    return pair


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_in_4_bits_and_nothing_else_changes(kind):
    model, plain = make_base(kind, dtype="nf4").model, make_base(kind).model
    head = plain.get_output_embeddings()
    linear = {name for name, m in plain.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    found = dict(nf4.layers(model))
    assert found.keys() == linear and linear
    for name, layer in found.items():
        original = plain.get_submodule(name)
        weight = original.weight.t() if isinstance(original, Conv1D) else original.weight
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == (weight.numel() + 1) // 2
        values = NF4Weight.from_bitsandbytes(layer.weight).dequantize(torch.float32)
        of, error = (F.pad(t.flatten(), (0, -weight.numel() % 64)).view(-1, 64) for t in (weight, values - weight))
        assert (error.abs() <= HALF_A_GAP * of.abs().amax(1, keepdim=True)).all(), name
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in linear:
            assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_the_dequantised_weights(kind):
    tree = make_tree()
    quantised, dense = twins(kind)
    assert quantised.backbone.packed == dense.backbone.packed
    assert (quantised.backbone.llama is None) == (dense.backbone.llama is None) == (kind not in ("llama", "qwen2"))
    ours, wanted = (model.forward(tree, temperature=0.7) for model in (quantised, dense))
    for name in wanted._fields:
        assert relative(getattr(ours, name).detach(), getattr(wanted, name).detach()) < 1e-5, name
    for scores in (ours, wanted):
        (scores.logprob.square().sum() + scores.entropy.sum() + scores.values.sum()).backward()
    own = quantised.adapter_tensors(POLICY)
    for name, parameter in dense.adapter_tensors(POLICY).items():
        assert parameter.grad.norm() > 0 and relative(own[name].grad, parameter.grad) < 1e-5, name
    assert relative(quantised.value_head.weight.grad, dense.value_head.weight.grad) < 1e-5
    assert all(p.grad is None for name, p in quantised.peft.named_parameters() if "lora_" not in name)


def test_critic_with_its_own_adapter():
    tree = make_tree()
    pair = twins("llama", value__trunk="own")
    found = []
    for model in pair:
        values = model.forward(tree, temperature=1.0).values
        values.square().sum().backward()
        found.append((values.detach(), [p.grad for p in model.adapter_tensors(CRITIC).values()]))
        assert all(p.grad is None for p in model.adapter_tensors(POLICY).values())
    (ours, our_grads), (wanted, grads) = found
    assert relative(ours, wanted) < 1e-5
    assert all(relative(a, b) < 1e-5 for a, b in zip(our_grads, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_a_policy_that_learned_nothing_is_the_bare_base_to_the_bit(kind, targets):
    """Also where only some layers are adapted, and the rest are bare."""
    name = {"llama": "v_proj", "qwen2": "v_proj", "gpt_neox": "query_key_value", "mpt": "up_proj", "gpt2": "c_attn"}[kind]
    some = {"lora__targets": name} if targets == "some" else {}
    model = make_model(kind, spread=0, dtype="nf4", ppo__reference="base", **some)
    tree = make_tree()
    with torch.enable_grad():
        policy = model.policy_logprob(tree, temperature=1.0)[0]
    assert policy.requires_grad and torch.equal(model.reference_logprob(tree, temperature=1.0), policy.detach())


# -- models that are stored in 4 bits ------------------------------------------------------------------------------------


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def store(folder, dtype=torch.float32, **options):
    quantisation = BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **options)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama"), quantization_config=quantisation, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("dtype", ["auto", "nf4"])
@pytest.mark.parametrize(
    ("stored", "storage"),
    [(torch.float32, torch.uint8), (torch.bfloat16, torch.uint8), (torch.bfloat16, torch.bfloat16)],
)
def test_stored_in_nf4(tmp_path, dtype, stored, storage, recwarn):
    """As others store it: doubly quantised, the values rounded to another dtype, the codes as numbers of another."""
    more = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
    store(tmp_path, stored, **NF4, **more)
    config = load_config({"device": "cpu", "lora.rank": "4", "model": str(tmp_path), "dtype": dtype})
    recwarn.clear()
    quantised = load_base(config)
    pair = [ActorCritic(base, config) for base in (quantised, dense_twin("llama", quantised))]
    assert not recwarn.list  # `patch_peft` leaves no layer to peft
    plain = ("norm", "embed", "lm_head")  # stored in that dtype, too
    pair[1].base.model.load_state_dict(
        {name: p for name, p in pair[0].base.model.state_dict().items() if any(part in name for part in plain)},
        strict=False,
    )
    for model in pair:
        spread_adapter(model, POLICY, 0.1)
    assert pair[0].backbone.head.weight.dtype == torch.float32
    ours, wanted = (model.policy_logprob(make_tree(), temperature=1.0)[0].detach() for model in pair)
    assert relative(ours, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "stored in 4 bits of type fp4"),
        ({"load_in_8bit": True}, "no layer of it was put in 4 bits"),
        (NF4 | {"llm_int8_skip_modules": []}, "its language-model head is stored in 4 bits"),
    ],
)
def test_stored_otherwise_is_refused(tmp_path, options, expected):
    store(tmp_path, **options)
    with pytest.raises(UserError, match=expected):
        load_base(load_config({"device": "cpu", "model": str(tmp_path), "dtype": "nf4"}))


# -- bitsandbytes --------------------------------------------------------------------------------------------------------


def test_usable_here():
    assert nf4.obstacle(torch.device("cpu")) is None


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert nf4.obstacle(torch.device("cpu")) == "bitsandbytes is not installed"


def test_no_library_for_this_cuda(monkeypatch):
    extension = importlib.import_module("bitsandbytes.cextension")
    for library, expected in (
        (SimpleNamespace(compiled_with_cuda=True), None),
        (SimpleNamespace(compiled_with_cuda=False), "bitsandbytes has no library for this CUDA: it loaded the one for CPUs"),
        (SimpleNamespace(error_msg="CUDA 9?"), "bitsandbytes has no library for this CUDA: CUDA 9?"),
    ):
        monkeypatch.setattr(extension, "lib", library)
        assert nf4.obstacle(torch.device("cuda")) == expected


def test_one_that_is_broken_is_one_line(monkeypatch):
    def broken(device):
        raise OSError("undefined symbol: x\nsecond line")

    monkeypatch.setattr(nf4, "obstacle", broken)
    with pytest.raises(UserError) as caught:
        make_base("llama", dtype="nf4")
    assert str(caught.value).startswith("--dtype: nf4 is not possible here: undefined symbol: x second line; it needs: ")


def test_one_whose_kernel_for_cpus_is_wrong_is_not_asked(monkeypatch):
    """Its product may pack the weight anew, and then gives no gradient."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *args, **kwargs: pytest.fail("bitsandbytes multiplied"))
    model = make_model("llama", dtype="nf4", lora__targets="v_proj")
    model.forward(make_tree(), temperature=1.0).logprob.sum().backward()
    assert Backbone(make_base("gpt_neox", dtype="nf4").model).packed
