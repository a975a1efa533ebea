"""``fastppo export``: what it writes loads in plain transformers and peft with the trainer's own outputs."""

import os
import shutil
import stat

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from small import call, quiet_console
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import cli
from fastppo.batch.token_tree import build_tree
from fastppo.config import load_config
from fastppo.evaluate import load_adapter
from fastppo.export import export_run
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import load_base
from fastppo.trainer import train

TEXT = "The cat sees the dogs. yes no"


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt_neox", "mpt"])
def trained(request, world, tmp_path_factory):
    """A finished run, its model folder, token ids and the trainer's logits for them."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(request.param, folder / "model")
    trunk = "own" if request.param == "llama" else "shared"
    world.train(folder / "run", model=model, ppo__iterations=2, value__trunk=trunk, lora__rslora=True)
    config = load_config({}, folder / "run" / "config.yaml")
    policy = ActorCritic(load_base(config), config)
    load_adapter(policy, folder / "run" / "adapter")
    ids = policy.base.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        logits = policy.backbone.head.logits(policy.backbone.hidden(build_tree([ids], device="cpu")))
        with policy._adapter(None):
            base = policy.backbone.head.logits(policy.backbone.hidden(build_tree([ids], device="cpu")))
    assert (logits - base).abs().max() > 0.01
    return folder, ids, logits


def assert_same(model, ids, expected):
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].float()
    # Peft adds rows where the tokenizer has more tokens than the base (the class that Qwen2's loads as adds one).
    logits = logits[:, : expected.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_run_folder_adapter_loads_as_it_is(trained):
    folder, ids, logits = trained
    assert_same(AutoPeftModelForCausalLM.from_pretrained(folder / "run" / "adapter"), ids, logits)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert_same(PeftModel.from_pretrained(base, folder / "run" / "adapter"), ids, logits)


def test_exported_adapter(trained, tmp_path):
    folder, ids, logits = trained
    export_run(folder / "run", tmp_path / "to", False, quiet_console())
    assert_same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "to"), ids, logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "to")(TEXT)["input_ids"] == ids


def test_merged_model_stands_alone(trained, tmp_path):
    folder, ids, logits = trained
    export_run(folder / "run", tmp_path / "to", True, quiet_console())
    assert not list((tmp_path / "to").glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert not hasattr(model, "peft_config")
    assert_same(model, ids, logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "to")(TEXT)["input_ids"] == ids


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("export") / "run"
    world.train(run, ppo__iterations=0)
    return run


def test_existing_folder_is_refused_and_stays(run, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert cli.main(["export", str(run), "--to", str(tmp_path)]) == 2
    assert f"--to: {tmp_path} exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_into_an_empty_current_folder(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.main(["export", str(run), "--to", "."]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


@pytest.mark.parametrize("merged", [False, True])
def test_to_a_new_folder_in_a_new_folder(run, tmp_path, merged):
    code, out, err = call(["export", str(run), "--to", str(tmp_path / "a" / "b"), *["--merged"] * merged], tmp_path)
    assert (code, err) == (0, "")
    assert ("AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM") + ".from_pretrained(" in out
    assert (tmp_path / "a" / "b" / "model.safetensors").is_file() == merged
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_exported_files_can_be_read_by_others(run, tmp_path):
    mask = os.umask(0o022)
    try:
        export_run(run, tmp_path / "to", False, quiet_console())
    finally:
        os.umask(mask)
    for path in (tmp_path / "to").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path.name


def test_merged_bfloat16(world, tmp_path):
    world.train(tmp_path / "run", dtype="bfloat16", ppo__iterations=0)
    export_run(tmp_path / "run", tmp_path / "to", True, quiet_console())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_base_that_moved(run, world, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / "run")
    text = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(text.replace(str(world.model), str(tmp_path / "gone")))
    assert cli.main(["export", str(broken), "--to", str(tmp_path / "to")]) == 2
    assert "no such folder" in capsys.readouterr().err and not (tmp_path / "to").exists()


def test_built_in_model_exports_with_the_trainers_outputs(tmp_path):
    """Its weights are stored in bf16 and trained in fp32: what it is loaded in must be what it was trained in."""
    settings = {"sft.examples": "16", "sft.epochs": "1", "ppo.iterations": "1", "ppo.prompts": "4", "train_examples": "60"}
    train(load_config({**settings, "sft.lr": "0.01", "valid_examples": "6"}), tmp_path / "run", quiet_console())
    config = load_config({}, tmp_path / "run" / "config.yaml")
    policy = ActorCritic(load_base(config), config)
    load_adapter(policy, tmp_path / "run" / "adapter")
    ids = policy.base.tokenizer("The cat sees itself. Acceptable:")["input_ids"]
    with torch.no_grad():
        logits = policy.backbone.head.logits(policy.backbone.hidden(build_tree([ids], device="cpu")))
    console = quiet_console()
    export_run(tmp_path / "run", tmp_path / "to", False, console)
    assert "dtype=torch.float32" in console.file.getvalue()
    assert_same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "to"), ids, logits)
