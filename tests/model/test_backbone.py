"""Which path a model takes, and that what the trunk and head give are the model's own logits."""

import pytest
import torch
from engine import PACKED_KINDS, make_base, make_model, random_prompts
from tiny import KINDS, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
)

from fastppo.batch.token_tree import build_tree
from fastppo.errors import UserError
from fastppo.model.attention import NAME
from fastppo.model.backbone import Backbone

VOCAB = len(tiny_tokenizer())
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# Architectures with something of their own on the way from hidden state to logits, or inside attention.
SPECIAL = {
    "gemma2: caps on scores and logits, window in every second layer": (
        Gemma2Config(
            **SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        ),
        True,
    ),
    "cohere: scale on the logits": (CohereConfig(**SIZES, logit_scale=0.25), True),
    "cohere2: window": (Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=6), True),
    "granite: four multipliers": (
        GraniteConfig(
            **SIZES, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0
        ),
        True,
    ),
    "gpt-oss: sinks, which the packed path does not know": (
        GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, sliding_window=6),
        False,
    ),
    "bloom: its own attention": (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), False),
}  # fmt: skip


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_path_of_each_kind(kind):
    model = make_base(kind).model
    before = model.config._attn_implementation
    backbone = Backbone(model)
    assert backbone.packed == (kind in PACKED_KINDS)
    assert model.config._attn_implementation == (NAME if backbone.packed else before)


@pytest.mark.parametrize("name", SPECIAL)
def test_logits_of_special_architectures(name):
    config, packed = SPECIAL[name]
    model = random_model(config)
    sequences = random_prompts(0, 6)
    wanted = [model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]
    backbone = Backbone(model)
    assert backbone.packed == packed
    tree = build_tree(sequences)
    logits = backbone.head.logits(backbone.hidden(tree))
    for path, expected in zip(tree.paths, wanted, strict=True):
        torch.testing.assert_close(logits[path[path >= 0]], expected, rtol=1e-4, atol=1e-4)


def test_what_the_packed_attention_refuses_is_the_reason_for_padding(monkeypatch):
    backbone = Backbone(random_model(SPECIAL["gpt-oss: sinks, which the packed path does not know"][0]))
    assert not backbone.packed and "attention sinks are not supported" in backbone.padded_because

    model = make_base("llama").model
    model.config.attention_dropout = 0.25
    assert Backbone(model).packed  # evaluation has no dropout
    model = make_base("llama").model
    for layer in model.base_model.layers:  # an architecture that drops out all the same: no two passes are alike
        layer.self_attn.train()
        layer.self_attn.attention_dropout = 0.25
    with pytest.raises(UserError, match="not supported"):
        Backbone(model)


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_unknown_factor_on_the_logits_is_refused(kind, monkeypatch):
    """A model whose logits are not head(last hidden state) would train on wrong log-probs."""
    model = make_base(kind).model
    plain = type(model).forward

    def scaled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(UserError, match="this architecture is not supported"):
        Backbone(model)


def test_nan_in_the_weights_is_refused():
    model = make_base("llama").model
    model.get_output_embeddings().weight[5, 5] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Backbone(model)


def test_model_without_a_trunk_is_refused():
    config = Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=3)
    with pytest.raises(UserError, match="not supported"):
        Backbone(random_model(config))


def test_the_packed_attention_needs_its_context():
    backbone = Backbone(make_base("llama").model)
    with pytest.raises(RuntimeError, match="fastppo_context"):
        backbone.model(torch.tensor([[3, 4]]), use_cache=False)


def test_padded_path_runs_only_what_no_other_sequence_continues():
    """Equal sequences and prefixes of others cost nothing; every row of the tree still gets its state."""
    model = make_model("mpt")
    rows = []
    hook = model.backbone.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    hidden = model.backbone.hidden(build_tree([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6], [5, 9]]))
    hook.remove()
    assert rows == [(2, 4)] and hidden.shape == (5, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base(kind):
    """bf16 hidden states through both paths stay near fp32, and near the model's own bf16 forward."""
    sequences = random_prompts(1, 5)
    tree = build_tree(sequences)
    exact, low = (Backbone(make_base(kind, dtype=dtype).model) for dtype in ("float32", "bfloat16"))
    hidden = low.hidden(tree)
    assert hidden.dtype == torch.bfloat16
    error = (low.head.logits(hidden).log_softmax(-1) - exact.head.logits(exact.hidden(tree)).log_softmax(-1)).abs().max()
    assert error < 0.25
