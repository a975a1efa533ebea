"""Adapters of a patched PEFT model, switched token by token."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft_models import causal_lm, outputs_of, patched, patched_with_warning, plain, run, toy, toy_4bit
from torch.utils.checkpoint import checkpoint

from fastppo_kernels import adapter_mask

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")


def test_masks_on_an_nf4_base():
    model, x = toy_4bit()
    model.add_adapter("second", LoraConfig(r=6, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    fast = patched(model)
    row = torch.tensor([True, False, True])[:, None]
    with torch.no_grad():
        on, off = fast(x), plain(fast, x)
        with adapter_mask(fast, row):
            assert torch.equal(fast(x), torch.where(row[..., None], on, off))
        with adapter_mask(fast, {"default": row, "second": ~row}):
            both = fast(x)
        for name, rows in (("default", row), ("second", ~row)):
            fast.base_model.set_adapter(name)
            torch.testing.assert_close(both[rows[:, 0]], fast(x)[rows[:, 0]], rtol=0.02, atol=0.02)


def test_policy_and_reference_rows_in_one_batch():
    model, ids = causal_lm("llama")
    ids = ids[:1].expand(2, -1)
    fast = patched(model)
    is_policy = torch.tensor([[True], [False]])
    with adapter_mask(fast, is_policy):
        found = run(fast, ids)
    with torch.no_grad():
        torch.testing.assert_close(found[0][0], outputs_of(model, ids)[0])
        torch.testing.assert_close(found[0][1], plain(model, ids)[1])
    out = outputs_of(model, ids)  # the gradients are those of the policy's row alone
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    model.zero_grad()
    (out * weights + out.square())[0].sum().backward()
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs_of(fast, ids), outputs_of(model, ids))  # and afterwards it is off again


def test_rows_of_a_mask_generate_each_in_their_own_way():
    model, ids = causal_lm("llama")
    ids = ids[:1].expand(2, -1)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    fast = patched(model)
    with adapter_mask(fast, torch.tensor([[True], [False]])):
        found = fast.generate(ids, **how)
    with model.disable_adapter():
        reference = model.generate(ids[:1], **how)
    torch.testing.assert_close(found, torch.cat([model.generate(ids[:1], **how), reference]))
    assert not torch.equal(found[0], found[1])


def test_masks_of_tokens_and_of_named_adapters():
    model, x = toy()
    model.add_adapter("value", LoraConfig(r=6, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "value"])
    fast = patched(model).requires_grad_(False)

    def only(*names):
        if not names:
            return plain(model, x)
        model.base_model.set_adapter(list(names))
        with torch.no_grad():
            return model(x)

    on, off = only("default", "value"), only()
    for value in (0.0, 1.0):  # 0-d: every token
        with adapter_mask(fast, torch.tensor(value)):
            torch.testing.assert_close(fast(x), on if value else off)
    token = torch.tensor([1.0, 0, 1, 0, 0])
    for mask in (token, token[None], token.bool(), token.expand(2, 5)):
        with adapter_mask(fast, mask):
            torch.testing.assert_close(fast(x), torch.where(token.bool()[:, None], on, off))
    row = torch.tensor([[True], [False]])
    with adapter_mask(fast, {"default": row, "value": ~row}):
        torch.testing.assert_close(fast(x), torch.where(row[..., None], only("default"), only("value")))
        with adapter_mask(fast, {"value": row}):
            torch.testing.assert_close(fast(x), torch.where(row[..., None], on, only("default")))
        with adapter_mask(fast, {}):
            torch.testing.assert_close(fast(x), on)
        torch.testing.assert_close(fast(x)[1], only("value")[1])
    with adapter_mask(fast, row[..., 0].repeat_interleave(5)), torch.no_grad():  # tokens flattened, as in packed batches
        torch.testing.assert_close(fast(x.flatten(0, 1)).view(x.shape), torch.where(row[..., None], on, off))


def test_a_broken_adapter_does_not_leak():
    model, x = toy()
    fast = patched(model)
    with torch.no_grad():
        fast.base_model.model.up.lora_B["default"].weight[3] = torch.nan
    with adapter_mask(fast, torch.tensor([[0.0], [1.0]])):
        out = fast(x)
    assert torch.equal(out[0], plain(model, x)[0]) and out[1].isnan().any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_remember_their_mask(reentrant):
    """Backward computes each layer again, after the context and after another forward with another mask."""
    model, ids = causal_lm("qwen2")
    fast = patched(model)
    masks = torch.tensor([[1.0], [0], [1]]), torch.tensor([[0.0], [1], [1]])

    def losses():
        for mask in masks:
            with adapter_mask(fast, mask):
                yield outputs_of(fast, ids).square().sum()

    def grads():
        fast.zero_grad()
        sum(losses()).backward()
        return {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}

    wanted = grads()
    fast.train().enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    function = [m._gradient_checkpointing_func for m in fast.modules() if "_gradient_checkpointing_func" in vars(m)]
    found = grads()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)
    assert function == [m._gradient_checkpointing_func for m in fast.modules() if "_gradient_checkpointing_func" in vars(m)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpointed_passes_without_a_mask_have_none_when_computed_again(reentrant, nested):
    """Backward runs inside a context that the first pass was made outside of."""
    model, ids = causal_lm("llama")
    fast = patched(model).train()
    first, second = torch.tensor([[1.0], [0], [1]]), torch.tensor([[0.0], [1], [-1]])

    def grads():
        fast.zero_grad()
        loss = outputs_of(fast, ids).square().sum()
        with adapter_mask(fast, first):
            loss = loss + outputs_of(fast, ids).sum()
            if nested:
                with adapter_mask(fast, second):
                    (loss + outputs_of(fast, ids).pow(3).sum()).backward()
            else:
                loss.backward()
        return {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}

    wanted = grads()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(grads(), wanted, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_ones_own_takes_its_mask_with_it_or_raises():
    model, x = toy()
    fast, mask = patched(model), torch.tensor([[1.0], [0.0]])

    def masked(x):
        with adapter_mask(fast, mask):
            return fast(x)

    def grads(forward):
        fast.zero_grad()
        forward(x.clone().requires_grad_()).square().sum().backward()
        return {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}

    wanted = grads(masked)
    for reentrant in (False, True):
        torch.testing.assert_close(grads(lambda x: checkpoint(masked, x, use_reentrant=reentrant)), wanted)  # noqa: B023
        with adapter_mask(fast, 1 - mask):
            torch.testing.assert_close(grads(lambda x: checkpoint(masked, x, use_reentrant=reentrant)), wanted)  # noqa: B023
            with pytest.raises(ValueError, match="whose own mask is not known"):
                grads(lambda x: checkpoint(fast, x, use_reentrant=reentrant))  # noqa: B023


def test_a_checkpoint_of_ones_own_around_checkpointed_layers_raises():
    model, ids = causal_lm("llama")
    fast = patched(model).train()
    fast.gradient_checkpointing_enable()
    embedded = fast.get_input_embeddings()(ids).requires_grad_()
    loss = checkpoint(lambda x: fast(inputs_embeds=x).logits, embedded, use_reentrant=True).sum()
    with pytest.raises(ValueError, match="whose own mask is not known"), adapter_mask(fast, torch.ones(9)):
        loss.backward()


def test_a_compiled_model_takes_masks():
    torch._dynamo.reset()
    model, x = toy()
    fast = patched(model)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        on, off = compiled(x), plain(model, x)
        for row in (torch.tensor([[True], [False]]), torch.tensor([[False], [True]])):
            with adapter_mask(fast, row):
                torch.testing.assert_close(compiled(x), torch.where(row[..., None], on, off))
        torch.testing.assert_close(compiled(x), on)


def test_a_copy_made_under_a_mask_is_free_of_it():
    model, x = toy()
    fast = patched(model)
    with adapter_mask(fast, torch.zeros(5)):
        copied = copy.deepcopy(fast)
        torch.testing.assert_close(fast(x), plain(model, x))
        torch.testing.assert_close(copied(x), model(x))


def test_wrong_masks():
    model, x = toy()
    fast = patched(model)
    for mask, message in [
        ([1, 0], "mask must be a bool or floating-point tensor, got list"),
        (torch.ones(5, dtype=torch.int64), "mask must be a bool or floating-point tensor, got torch.int64"),
        ({"default": None}, "mask 'default' must be a bool or floating-point tensor, got NoneType"),
        ({"policy": torch.ones(5)}, r"mask must name adapters of the model \(default\), got policy"),
    ]:
        with pytest.raises(ValueError, match=message), adapter_mask(fast, mask):
            pass
    with pytest.raises(ValueError, match=r"must broadcast .*\[2, 5\]\), got shape \[4\]"), adapter_mask(fast, torch.ones(4)):
        fast(x)
    with pytest.raises(ValueError, match=r"needs patch_peft\(model\) first"), adapter_mask(model, torch.ones(5)):
        pass
    torch.testing.assert_close(fast(x), model(x))  # an error leaves no mask behind


def test_a_mask_is_never_ignored():
    model, x = toy(lora_dropout=0.5)
    fast = patched_with_warning(model, "dropout").train()
    with pytest.raises(ValueError, match="computes through peft: lora_dropout > 0"), adapter_mask(fast, torch.ones(5)):
        fast(x)
    fast.eval().merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged"), adapter_mask(fast, torch.ones(5)):
        fast(x)
    fast.unmerge_adapter()
    with adapter_mask(fast, torch.ones(5)):
        torch.testing.assert_close(fast(x), model.eval()(x))
        torch.testing.assert_close(plain(fast, x), plain(model, x))
