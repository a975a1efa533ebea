"""Whole runs on a base in 4 bits: they start at their reference, resume to the bit, are evaluated and exported."""

import shutil
import signal

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import call, kill_at, outcome, ppo_steps, quiet_console
from tiny import save_tiny_model

from fastppo.batch.token_tree import build_tree
from fastppo.config import load_config
from fastppo.errors import UserError
from fastppo.evaluate import evaluate_run, load_adapter
from fastppo.export import export_run
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.load import load_base
from fastppo.trainer import train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bases in 4 bits need bitsandbytes")

TEXT = "The cat sees the dogs. yes no"


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    return run, *world.train(run, dtype="nf4")


def assert_starts_at_its_reference(run, summary):
    first = ppo_steps(run)[0]
    assert first["kl"] == summary["first_kl"] == 0.0 and ppo_steps(run)[-1]["kl"] != 0.0
    assert all(row["first_log_ratio"] == 0.0 for row in ppo_steps(run))
    assert 0 < summary["sampler_gap_max"] < 1e-4


def test_a_run(finished):
    run, summary, shown = finished
    assert_starts_at_its_reference(run, summary)
    assert summary["dtype"] == "nf4, computed in float32" and summary["packed"]
    assert summary["versions"]["bitsandbytes"] == bitsandbytes.__version__
    assert "with the same results" not in shown  # nothing was left to another path


def test_long_answers_on_other_kinds_and_from_the_bare_base(world, tmp_path):
    """The sampler makes no copies of such weights, as it does of plain ones for answers of 8 tokens and more."""
    summary, _ = world.train(tmp_path / "long", dtype="nf4", sample__max_new_tokens=12, ppo__iterations=2)
    assert_starts_at_its_reference(tmp_path / "long", summary)
    for kind in ("gpt_neox", "mpt"):
        run = tmp_path / kind
        model = save_tiny_model(kind, tmp_path / f"model {kind}")
        summary, _ = world.train(run, dtype="nf4", model=model, sft__examples=0, ppo__reference="base", ppo__iterations=2)
        assert_starts_at_its_reference(run, summary)


def test_the_built_in_model(tmp_path):
    settings = {
        "dtype": "nf4", "device": "cpu", "sft.examples": "16", "sft.epochs": "1", "ppo.iterations": "2", "ppo.prompts": "8",
        "train_examples": "60", "valid_examples": "6",
    }  # fmt: skip
    summary = train(load_config(settings), tmp_path / "run", quiet_console())
    assert_starts_at_its_reference(tmp_path / "run", summary)


def test_killed_and_resumed(world, tmp_path):
    argv = world.argv(tmp_path / "a", dtype="nf4")
    assert call(argv, tmp_path)[0] == 0
    run = tmp_path / "b"
    killed = call(world.argv(run, dtype="nf4"), tmp_path, kill_at, "fastppo.algorithms.ppo", "update", 3)
    assert killed[0] == -signal.SIGKILL
    code, _, err = call(["train", "--resume", str(run)], tmp_path)
    assert (code, err) == (0, "") and outcome(run) == outcome(tmp_path / "a")


def test_a_base_of_the_same_codes_and_other_scales_is_another_base(world, tmp_path):
    model, run = shutil.copytree(world.model, tmp_path / "model"), tmp_path / "run"
    killed = call(world.argv(run, dtype="nf4", model=model), tmp_path, kill_at, "fastppo.algorithms.ppo", "update", 1)
    assert killed[0] == -signal.SIGKILL
    tensors = load_file(model / "model.safetensors")
    save_file({n: 2 * t if "_proj" in n else t for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    code, _, err = call(["train", "--resume", str(run)], tmp_path)
    assert code == 2 and "base model" in err and "changed since the run began" in err


def test_evaluation_is_that_of_the_summary(finished):
    run, summary, _ = finished
    row = evaluate_run(run, None, "dev", None, quiet_console())
    assert row == {key: value for key, value in summary["stages"]["ppo"].items() if key != "labels"}


# -- export --------------------------------------------------------------------------------------------------------------


def trained(world, folder, kind, **settings):
    """A finished run, token ids, and the trainer's logits for them."""
    model = save_tiny_model(kind, folder / "model", width=128)  # rows end with blocks: others bitsandbytes gets wrong on a CPU
    world.train(folder / "run", dtype="nf4", model=model, ppo__iterations=2, **settings)
    config = load_config({}, folder / "run" / "config.yaml")
    policy = ActorCritic(load_base(config), config)
    load_adapter(policy, folder / "run" / "adapter")
    ids = policy.base.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        tree = build_tree([ids], device="cpu")
        logits = policy.backbone.head.logits(policy.backbone.hidden(tree))
        with policy._adapter(None):
            base = policy.backbone.head.logits(policy.backbone.hidden(tree))
    assert (logits - base).abs().max() > 0.01
    return ids, logits


def assert_same(model, ids, expected):
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].float()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def load_as_shown(console):
    """What the printed call gives."""
    call = console.file.getvalue().split("load it with ")[1]
    return eval(call, {"peft": peft, "transformers": transformers, "torch": torch})


def test_the_adapter_loads_in_plain_peft(world, tmp_path):
    ids, logits = trained(world, tmp_path, "llama")
    console = quiet_console()
    export_run(tmp_path / "run", tmp_path / "to", False, console)
    model = load_as_shown(console)
    assert console.file.getvalue().count("\n") == 1  # all rows end with blocks
    layers = [module for module in model.modules() if type(module) is bitsandbytes.nn.Linear4bit]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # else it multiplies in bfloat16 where the CPU can
    assert_same(model, ids, logits)


def test_rows_that_bitsandbytes_gets_wrong_on_a_cpu_are_named(finished, tmp_path):
    """The base's, of 32 and 48 entries."""
    run = finished[0]
    console = quiet_console()
    export_run(run, tmp_path / "adapter", False, console)
    wrong = "rows of 32, 48 entries, no multiples of 64"
    said = f"on a GPU: on a CPU bitsandbytes gets {wrong}, wrong, or export with --merged"
    assert console.file.getvalue().splitlines()[1:] == [said]
    console = quiet_console()
    export_run(run, tmp_path / "merged", True, console)
    assert console.file.getvalue().count("\n") == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_model_has_plain_weights_and_the_trainers_outputs(world, tmp_path, kind):
    ids, logits = trained(world, tmp_path, kind)
    console = quiet_console()
    export_run(tmp_path / "run", tmp_path / "to", True, console)
    model = load_as_shown(console)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "peft_config")
    assert_same(model, ids, logits)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_merged_model_of_a_base_without_plain_weights_is_refused(world, tmp_path):
    quantisation = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantisation, "device_map": {"": "cpu"}}
    base = transformers.AutoModelForCausalLM.from_pretrained(world.model, **options)
    shutil.copytree(world.model, tmp_path / "model", ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    base.save_pretrained(tmp_path / "model")
    summary, _ = world.train(tmp_path / "run", model=tmp_path / "model", ppo__iterations=0)
    assert summary["dtype"] == "nf4, computed in float32"
    with pytest.raises(UserError, match="is stored in 4 bits and has no plain weights; export without --merged"):
        export_run(tmp_path / "run", tmp_path / "to", True, quiet_console())
    assert not (tmp_path / "to").exists()
    console = quiet_console()
    export_run(tmp_path / "run", tmp_path / "to", False, console)
    assert console.file.getvalue().endswith("no multiples of 64, wrong\n")  # no other way
