"""`fastppo plan`: the table, the JSON object, the exit codes, and that no weight is looked at."""

import json
import sys

import pytest
from small import World
from tiny import save_tiny_model
from transformers import BertConfig, DistilBertConfig, T5Config, ViTConfig

from fastppo import cli


def planned(capsys, world: World, *argv: str) -> tuple[int, str]:
    status = cli.main(["plan", "--data", str(world.data), *argv])
    said = capsys.readouterr()
    assert said.err == ""
    return status, said.out


def test_the_table_names_every_part_and_the_micro_batch(world: World, capsys):
    status, out = planned(capsys, world, "--model", str(world.model), "--gpu", "a100-80")
    assert status == 0
    for word in ("base", "policy", "reference", "critic", "gradients", "optimizer", "activations", "logits chunk", "KV cache",
                 "CUDA", "total", "bfloat16", "on a100-80 with 79.1 GiB", "micro-batch: 8,192 tokens", "it fits"):  # fmt: skip
        assert word in out, word


def test_the_json_object_has_the_same(world: World, capsys):
    status, out = planned(capsys, world, "--model", str(world.model), "--gpu", "24GiB", "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] is True and found["notices"] == []
    assert found["device"] == {"name": "a GPU of 24GiB", "kind": "cuda", "memory": 24 << 30}
    assert (found["micro_batch_tokens"], found["activations"], found["dtype"]) == (8192, "keep", "bfloat16")
    sums = {when: sum(part["bytes"] for part in found["parts"] if part["when"] == when)
            for when in ("always", "graphs", "device", "update", "sampling")}  # fmt: skip
    all_the_time = sums["always"] + sums["graphs"] + sums["device"]
    assert found["total"] == all_the_time + max(sums["update"], sums["sampling"]) and sums["graphs"] >= sums["update"] > 0
    assert all(part["bytes"] >= 0 and part["how"] for part in found["parts"])


def test_without_a_name_it_is_the_device_of_training(world: World, capsys):
    found = json.loads(planned(capsys, world, "--model", str(world.model), "--device", "cpu", "--json")[1])
    assert (found["device"]["kind"], found["micro_batch_tokens"], found["dtype"]) == ("cpu", 2048, "float32")
    built_in = json.loads(planned(capsys, world, "--device", "cpu", "--json")[1])
    assert built_in["model"] == "the built-in model" and built_in["parts"][0]["bytes"] > found["parts"][0]["bytes"]


def test_settings_come_from_flags_and_files(world: World, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"model: {world.model}\nmicro_batch_tokens: 300\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--lora-rank", "3", "--gpu", "l4", "--json"]
    found = json.loads(planned(capsys, world, *argv)[1])
    assert found["micro_batch_tokens"] == 300
    policy = next(part for part in found["parts"] if part["name"] == "policy")
    assert "of rank 3" in policy["how"]


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_the_configuration_alone_is_enough(kind, world: World, tmp_path, capsys):
    """Then prompts are not known."""
    folder = save_tiny_model(kind, tmp_path / kind)
    whole = json.loads(planned(capsys, world, "--model", str(folder), "--gpu", "h200", "--json")[1])
    assert 9 < whole["prompts"]["mean"] <= whole["prompts"]["longest"] < 200 and 0 < whole["prompts"]["shared"] < 200
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    alone = json.loads(planned(capsys, world, "--model", str(folder), "--gpu", "h200", "--json")[1])
    longest = 508 if kind == "llama" else 1024  # what the model's positions leave, where it says how many it has
    assert alone["prompts"] == {"longest": longest, "shared": 0, "mean": None}
    assert "prompts are not known (" in alone["notices"][0] and alone["total"] > whole["total"]
    fixed = [[part for part in found["parts"] if part["when"] == "always"] for found in (whole, alone)]
    assert fixed[0] == fixed[1] and fixed[0][0]["bytes"] > 0
    assert ("roughly" in str(alone)) is (kind == "mpt")


def test_what_does_not_fit_ends_with_1_and_says_what_to_change(world: World, capsys):
    status, out = planned(capsys, world, "--model", str(world.model), "--gpu", "1.1GiB", "--sample-slots", "400000")
    assert status == 1 and "it does not fit" in out and "--sample-slots to" in out


def test_a_gpu_that_cuda_alone_fills(world: World, capsys):
    status, out = planned(capsys, world, "--model", str(world.model), "--gpu", "1GiB")
    assert status == 1 and "of 0.0 KiB that a GPU of 1GiB has for tensors" in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--gpu", "a100"], "--gpu: 'a100' is not allowed; expected one of l4, "),
        (["--gpu", "l4", "--device", "cpu"], "--gpu and --device cpu: not both"),
        (["--model", "/no/such/model"], "model '/no/such/model': no such folder"),
        (["--data", "/no/such/data"], "data '/no/such/data' is missing, there is no such file or folder"),
        (["--lora-targets", "q_prj"], "--lora-targets: 'q_prj'"),
        (["--ppo-lr", "-1"], "--ppo-lr: '-1' is not allowed"),
        (["--ppo-lrr", "1"], "plan: unknown flag --ppo-lrr; did you mean --ppo-lr"),
        (["--resume", "x"], "plan: unknown flag --resume"),
        (["--activations", "drop"], "--activations: 'drop' is not allowed; expected one of auto, keep, recompute, offload"),
    ],
)
def test_mistakes_are_one_line_and_2(argv, expected, capsys):
    assert cli.main(["plan", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"fastppo: error: {expected}") and said.err.count("\n") == 1


def test_a_damaged_configuration_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["plan", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"fastppo: error: model {str(tmp_path)!r}: its configuration cannot be used: ")


@pytest.mark.parametrize(
    ("made", "is_what"),
    [
        (BertConfig(), "an encoder (bert)"),
        (DistilBertConfig(), "an encoder (distilbert)"),
        (T5Config(), "an encoder and decoder (t5)"),
        (ViTConfig(), "no language model (vit)"),
    ],
    ids=lambda made: getattr(made, "model_type", ""),
)
def test_what_is_no_decoder_is_one_line(made, is_what, tmp_path, capsys):
    made.save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path), "--gpu", "l4"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "", f"fastppo: error: model {str(tmp_path)!r}: is {is_what}; expected a decoder, such as Llama or Qwen\n"
    )  # fmt: skip


def test_an_encoder_that_is_made_a_decoder_is_one(tmp_path, capsys):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True).save_pretrained(tmp_path)
    assert cli.main(["plan", "--model", str(tmp_path), "--gpu", "l4"]) == 0


def test_data_that_is_not_here_is_not_fetched(world: World, capsys):
    argv = ["--model", str(world.model), "--gpu", "l4", "--json", "--data", "nyu-mll/glue:cola"]
    found = json.loads(planned(capsys, world, *argv)[1])
    assert found["prompts"]["mean"] is None and "'nyu-mll/glue:cola' is not on this disk" in found["notices"][0]
    assert found["data_read"] is False and found["fits"] is True


def test_the_first_line_says_whether_the_data_was_read(world: World, capsys):
    argv = ["plan", "--model", str(world.model), "--gpu", "l4", "--data"]
    for data, read in ((str(world.data), True), ("nosuch", False)):
        assert cli.main([*argv, data]) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.endswith("; the data was not read") != read and last.startswith("it fits")
        assert last.endswith("it fits, with the longest prompts that the settings allow") != read
        assert cli.main([*argv, data, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["data_read"] is read


def test_a_base_in_4_bits_needs_no_library_to_be_counted(world: World, capsys, monkeypatch):
    argv = ["--model", str(world.model), "--gpu", "l4", "--json"]
    plain = json.loads(planned(capsys, world, *argv)[1])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = json.loads(planned(capsys, world, *argv, "--dtype", "nf4")[1])
    assert found["dtype"] == "nf4, computed in bfloat16" and found["parts"][0]["bytes"] < plain["parts"][0]["bytes"]
