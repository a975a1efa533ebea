"""Checkpoints and adapters on disk, and the state that goes into them and comes back."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from small import leftovers

from fastppo import checkpoint
from fastppo.algorithms import optim
from fastppo.checkpoint import Checkpoint, load_latest, save_adapter, save_checkpoint
from fastppo.errors import UserError


def some(seed: int) -> Checkpoint:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(3, 4, generator=draw), "b": torch.randn(2, generator=draw)}
    moments = {"0/exp_avg": torch.randn(3, 4, generator=draw), "0/step": torch.tensor(float(seed))}
    return Checkpoint({"step": seed, "kl_coef": 0.1 + 1e-17, "best": None}, tensors, moments, {"a": tensors["a"] + 1})


def assert_equal(a: Checkpoint, b: Checkpoint) -> None:
    assert a.state == b.state
    for one, other in zip(a[1:], b[1:], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    assert load_latest(tmp_path) is None
    for number in range(1, 12):  # beyond ten, where names would sort as texts
        save_checkpoint(tmp_path, number, some(number))
        assert_equal(load_latest(tmp_path), some(number))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000010", "000011"]


def test_optimizer_without_moments(tmp_path):
    """A checkpoint at the start of a stage holds an empty optimizer."""
    save_checkpoint(tmp_path, 1, some(1)._replace(optimizer={}))
    assert load_latest(tmp_path).optimizer == {}


@pytest.mark.parametrize("failing", ["save_file", "json"])
def test_failed_write_keeps_the_one_before(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, 1, some(1))
    if failing == "save_file":
        calls = []

        def save_file(tensors, path):
            calls.append(path)
            path.write_bytes(b"part")
            if len(calls) == 2:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(tmp_path, 2, some(2))
    else:
        with pytest.raises(TypeError):
            save_checkpoint(tmp_path, 2, some(2)._replace(state={"no json": object()}))
    assert_equal(load_latest(tmp_path), some(1))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": {}}', '{"sha256": {}, "state": {}}', "null"])
def test_damaged_state_is_named(tmp_path, content):
    save_checkpoint(tmp_path, 1, some(1))
    save_checkpoint(tmp_path, 2, some(2))
    (tmp_path / "checkpoints" / "000002" / "state.json").write_text(content)
    with pytest.raises(UserError, match="000002: damaged .*; remove that folder to go on from the one before"):
        load_latest(tmp_path)


def test_empty_checkpoint_folder_is_named(tmp_path):
    (tmp_path / "checkpoints" / "000001").mkdir(parents=True)
    with pytest.raises(UserError, match="000001: damaged"):
        load_latest(tmp_path)


def test_adapter_is_replaced_whole_and_its_settings_have_one_order(tmp_path):
    settings = LoraConfig(r=2, target_modules={"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"})
    for value in (1.0, 2.0):
        save_adapter(tmp_path, {"x": torch.full((2,), value)}, settings)
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")["x"].tolist() == [2.0, 2.0]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert isinstance(settings.target_modules, set) and leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_optimizer_goes_on_to_the_same_bits(kind):
    def steps(parameters, optimizer, range_):
        for step in range_:
            optim.set_lr(optimizer, 0.1 / (1 + step))
            for i, parameter in enumerate(parameters):
                # The second parameter gets no gradient at first: it has no moments yet.
                parameter.grad = None if i and step < 3 else torch.sin(parameter.detach() * (step + 1))
            optimizer.step()

    def fresh():
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 7)), torch.nn.Parameter(torch.ones(2, 2))]
        return parameters, optim.make_optimizer(parameters, 0.0, 1e-5, kind)

    unbroken, optimizer = fresh()
    steps(unbroken, optimizer, range(6))
    for cut in (0, 2, 4):
        first, optimizer = fresh()
        steps(first, optimizer, range(cut))
        moments = optim.optimizer_state(optimizer)
        second, optimizer = fresh()
        for parameter, value in zip(second, first, strict=True):
            parameter.data.copy_(value.data)
        optim.load_optimizer_state(optimizer, moments)
        steps(first, optimizer, range(0))
        steps(second, optimizer, range(cut, 6))
        assert all(torch.equal(a, b) for a, b in zip(unbroken, second, strict=True)), cut
