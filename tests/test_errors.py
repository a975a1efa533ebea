"""Mistakes and accidents: one clear line and exit code 2; nothing is left where nothing was begun, and nothing lost."""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import call, kill_at, leftovers, lines, outcome
from tiny import tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from fastppo import checkpoint


def refused(argv: list[str], tmp_path: Path, *expected: str, hook=None, args=()) -> str:
    """The command gives one line that holds the texts, and leaves nothing behind."""
    cwd = tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    before = sorted(cwd.rglob("*"))
    code, _, err = call(argv, tmp_path / "streams", hook, *args, cwd=cwd)
    assert code == 2, err
    assert err.startswith("fastppo: error: ") and err.count("\n") == 1 and "Traceback" not in err
    for text in expected:
        assert text in err
    assert sorted(cwd.rglob("*")) == before
    assert len(err) < 600
    return err


# -- data --------------------------------------------------------------------------------------------------------------

ROWS = "src\t1\t\tThe cat sees a dog.\nsrc\t0\t\tThe cat sees a dog no.\n" * 10


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (ROWS + "src\t1\tThe cat.\n", "train.tsv:21: "),
        (ROWS + "src\t2\t\tThe cat.\n", "train.tsv:21: label '2'"),
        (ROWS + "src\t\t\tThe cat.\n", "train.tsv:21: label"),
        (ROWS + "src\t1\t\t \n", "train.tsv:21: sentence is empty"),
        (ROWS + "src\t1\t\t" + "The cat sees a dog. " * 100 + "\n", "data/train.tsv:21: its prompt has"),
        ("", "train.tsv: empty"),
        (None, "no train split"),
    ],
    ids=["columns", "label", "no label", "no sentence", "long prompt", "empty", "missing"],
)
def test_data(world, tmp_path, train, expected):
    data = shutil.copytree(world.data, tmp_path / "data")
    if train is None:
        (data / "train.tsv").unlink()
    else:
        (data / "train.tsv").write_text(train)
    refused(world.argv(Path("run"), data=data), tmp_path, expected)


def test_data_folder_that_is_missing_or_empty_or_a_name_of_nothing(world, tmp_path):
    refused(world.argv(Path("run"), data=tmp_path / "none"), tmp_path, "none' is missing")
    (tmp_path / "empty").mkdir()
    refused(world.argv(Path("run"), data=tmp_path / "empty"), tmp_path, "no train split")
    refused(world.argv(Path("run"), data="nobody/nothing"), tmp_path, "data 'nobody/nothing'")


def test_prompt_longer_than_the_setting_allows_names_its_row(world, tmp_path):
    expected = "expected at most 20 (--max-prompt-tokens; this model allows up to 509)"
    refused(world.argv(Path("run"), max_prompt_tokens=20), tmp_path, "tsv:", expected)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "colla"}, "colla"),
        ({"lora__targets": "q_proj,nothing_proj"}, "nothing_proj"),
        ({"lora__targets": "nothing_proj"}, "--lora-targets: 'nothing_proj'"),
        ({"lora__targets": "lm_head"}, "the head stays frozen"),
        ({"ppo__minibatches": 9}, "expected at most --ppo-prompts (8)"),
        ({"value__warmup": 4}, "--value-warmup: 4"),
        ({"ppo__clip": 1}, "--ppo-clip: '1'"),
        ({"device": "cuda:99"}, "--device: 'cuda:99' is not here"),
        ({"sample__max_new_tokens": 600}, "--sample-max-new-tokens: 600 leaves no room for a prompt"),
    ],
)
def test_settings(world, tmp_path, changes, expected):
    refused(world.argv(Path("run"), **changes), tmp_path, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_gpu(world, tmp_path):
    refused(world.argv(Path("run"), device="cuda"), tmp_path, "--device: 'cuda' is not here; torch sees 0 GPUs")


def without_bitsandbytes() -> None:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


def test_4_bits_without_bitsandbytes(world, tmp_path):
    expected = "--dtype: nf4 is not possible here: bitsandbytes is not installed; it needs: pip install 'bitsandbytes>=0.50'"
    refused(world.argv(Path("run"), dtype="nf4"), tmp_path, expected, hook=without_bitsandbytes)


def test_run_folder_that_exists(world, tmp_path):
    kept = tmp_path / "cwd" / "run"
    kept.mkdir(parents=True)
    (kept / "notes.txt").write_text("mine")
    refused(world.argv(Path("run")), tmp_path, "--out: run exists and is not empty")
    assert (kept / "notes.txt").read_text() == "mine"


def test_run_folder_in_a_file(world, tmp_path):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "file").touch()
    refused(world.argv(Path("file")), tmp_path, "file")
    refused(world.argv(Path("file/run")), tmp_path, "file/run")


# -- models ------------------------------------------------------------------------------------------------------------


def no_weights(model):
    (model / "model.safetensors").unlink()


def no_config(model):
    (model / "config.json").unlink()


def missing(model):
    shutil.rmtree(model)


def file(model):
    shutil.rmtree(model)
    model.write_text("")


def cut(model):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


def garbage(model):
    (model / "model.safetensors").write_bytes(b"\x00" * 1000)


def other_shape(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def more_layers(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))


def bad_config(model):
    (model / "config.json").write_text("{")


def unknown_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "martian"}))


def not_a_number(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


def no_eos(model):
    no_tokenizer(model)
    tiny_tokenizer(eos=False).save_pretrained(model)


def bad_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")


def small_embedding(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 320}


def encoder(model):
    no_config(model)
    no_weights(model)
    BertModel(BertConfig(**SIZES)).save_pretrained(model)


def masked_lm(model):
    no_config(model)
    no_weights(model)
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SIZES))
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    bert.save_pretrained(model)


def encoder_decoder(model):
    no_config(model)
    no_weights(model)
    T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(model)


BREAKS = {
    no_weights: "cannot be loaded",
    no_config: "the folder has no config.json",
    missing: "no such folder",
    file: "is a file; expected a folder",
    cut: "cannot be loaded",
    garbage: "cannot be loaded",
    other_shape: "has shape [32, 48], expected [32, 64]",
    more_layers: "the weights lack",
    bad_config: "cannot be loaded",
    unknown_type: "cannot be loaded",
    not_a_number: "its logits are not finite numbers",
    no_tokenizer: "its tokenizer cannot be loaded",
    no_eos: "its tokenizer has no end-of-sequence token",
    bad_tokenizer: "its tokenizer cannot be loaded",
    small_embedding: "they do not belong together",
    encoder: "is an encoder (bert); expected a decoder",
    masked_lm: "is an encoder (bert); expected a decoder",
    encoder_decoder: "is an encoder and decoder (t5); expected a decoder",
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_model(world, tmp_path, damage):
    model = shutil.copytree(world.model, tmp_path / "the model")
    damage(model)
    err = refused(world.argv(Path("run"), model=model), tmp_path, BREAKS[damage])
    assert "the model'" in err and "UnboundLocalError" not in err


def test_hub_name_that_cannot_be_had(world, tmp_path):
    refused(world.argv(Path("run"), model="nobody/nothing"), tmp_path, "model 'nobody/nothing': cannot be loaded")


# -- runs that go wrong ------------------------------------------------------------------------------------------------


def poison(module: str, function: str) -> None:
    """In the new process: an update leaves one weight of the adapter that is no number."""
    owner = importlib.import_module(module)
    original = getattr(owner, function)

    def poisoned(model, *args, **kwargs):
        result = original(model, *args, **kwargs)
        model.trainable()[0].data.flatten()[0] = float("nan")
        return result

    setattr(owner, function, poisoned)


POISONED = [(("fastppo.algorithms.ppo", "update"), "ppo"), (("fastppo.trainer", "sft_step"), "sft")]


@pytest.mark.parametrize("place, flag", POISONED)
def test_divergence_stops_with_one_line_and_saves_nothing_broken(world, tmp_path, place, flag):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run, checkpoint_every=1), tmp_path, poison, *place)
    assert code == 2 and err.count("\n") == 1 and "no longer finite" in err and f"a lower --{flag}-lr" in err
    assert leftovers(run) == []
    latest = checkpoint.load_latest(run)
    assert latest.state["stage"] == flag and latest.state["step"] == 0
    assert all(tensor.isfinite().all() for tensor in [*latest.model.values(), *latest.best.values()])


def test_gap_over_the_limit_stops_with_one_line(world, tmp_path):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run, sample__gap_limit=1e-12), tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "differ by" in err and "--sample-gap-limit 1e-12" in err
    assert [row["stage"] for row in lines(run / "metrics.jsonl")] == ["SFT"] * 6


def deaf_sampler() -> None:
    """In the new process: the sampler goes on with the adapters of the start, as if no update had reached it."""
    from fastppo import trainer
    from fastppo.model.actor_critic import POLICY

    original, first = trainer.generate, {}

    def generate(model, *args, **kwargs):
        policy = model.adapter_tensors(POLICY)
        newest = {name: tensor.detach().clone() for name, tensor in policy.items()}
        for name, tensor in (first or newest).items():
            policy[name].data.copy_(tensor)
        first.update(first or newest)
        rollout = original(model, *args, **kwargs)
        for name, tensor in newest.items():
            policy[name].data.copy_(tensor)
        return rollout

    trainer.generate = generate


def test_update_that_never_reaches_the_sampler_is_found(world, tmp_path):
    code, _, err = call(world.argv(tmp_path / "run"), tmp_path, deaf_sampler)
    assert code == 2 and "the sampler's and the trainer's log-probs differ" in err
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6 + 1  # found at the second iteration


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    world.train(run)
    return run


def full_at(count: int) -> None:
    """In the new process: from the ``count``-th time on, the disk has no room when something is synced to it."""
    original, calls = os.fsync, 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = fsync


def finish(world, run, folder, code, err):
    """After the disk was full: one line; then the run goes on, or begins if it had not begun."""
    assert code == 2, err
    assert err.startswith("fastppo: error: cannot write ") and err.count("\n") == 1
    begun = (run / "config.yaml").exists()
    going_on = f"; everything saved before is intact; free some space, then go on with: fastppo train --resume {run}\n"
    assert err.endswith("No space left on device" + (going_on if begun else "; free some space\n"))
    code, _, err = call(["train", "--resume", str(run)] if begun else world.argv(run), folder)
    assert (code, err) == (0, "")
    return begun


@pytest.mark.parametrize("count", [1, 2, 4, 7, 33, 50, 66])
def test_disk_full_when_synced(world, tmp_path, unbroken, count):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run), tmp_path, full_at, count)
    assert finish(world, run, tmp_path, code, err) == (count > 1)
    assert outcome(run) == outcome(unbroken) and leftovers(run) == []


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, timeout=10
        )
    except OSError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True, timeout=10)


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\1" * size):
                    pass
            except OSError:
                pass


def fill_at(disk: Path, module: str, name: str, count: int) -> None:
    """In the new process: at the ``count``-th call of a function the disk is filled to the last byte."""
    original = os.kill
    os.kill = lambda *_: fill(disk)
    kill_at(module, name, count)
    assert original is not os.kill


@pytest.mark.parametrize(
    "place",
    [
        ("fastppo.files", "lock_run", 1),
        ("fastppo.config", "save", 1),
        ("fastppo.trainer", "sft_step", 1),
        ("fastppo.trainer", "sft_step", 4),
        ("fastppo.trainer", "generate", 2),
        ("fastppo.checkpoint", "save_checkpoint", 6),
        ("fastppo.checkpoint", "save_file", 21),
        ("fastppo.checkpoint", "save_adapter", 2),
        ("fastppo.files", "write_json", 1),
        ("fastppo.files", "write_json_lines", 2),
        ("fastppo.files", "write_json", 2),
    ],
    ids=lambda place: f"{place[1]}-{place[2]}",
)
def test_disk_really_full(world, small_disk, tmp_path, unbroken, place):
    run = small_disk / "run"
    code, _, err = call(world.argv(run), tmp_path, fill_at, small_disk, *place)
    (small_disk / "ballast").unlink()
    begun = finish(world, run, tmp_path, code, err)
    assert begun == (place[1] not in ("lock_run", "save"))
    assert outcome(run) == outcome(unbroken) and leftovers(run) == []
