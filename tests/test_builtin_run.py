"""The default run on the built-in corpus really learns from rewards; real CoLA is read whole and packed well."""

import pytest
from small import quiet_console

from fastppo.config import load_config
from fastppo.trainer import train

SHORT = {"ppo.iterations": "20", "eval_every": "20", "checkpoint_every": "100"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ppo_learns_from_rewards_alone(tmp_path):
    stages = train(load_config(SHORT), tmp_path / "run", quiet_console())["stages"]
    assert abs(stages["zero_shot"]["mcc"]) < 0.1 and stages["zero_shot"]["labels"] == 0
    assert stages["sft"]["malformed"] < 0.02 and stages["ppo"]["malformed"] < 0.02
    assert stages["ppo"]["mcc"] >= stages["sft"]["mcc"] + 0.15
    assert stages["ppo"]["mcc_low"] > stages["sft"]["mcc_high"]


def test_with_the_rewards_sign_flipped_it_falls_below_its_start(tmp_path):
    flipped = {"reward.correct": "-1", "reward.wrong": "1"}
    stages = train(load_config(SHORT | flipped), tmp_path / "run", quiet_console())["stages"]
    assert stages["ppo"]["mcc_high"] < stages["sft"]["mcc_low"]


def test_real_cola_is_read_whole_and_packed_to_less_than_a_quarter(tmp_path, shared_data):
    settings = {"data": str(shared_data / "cola"), "sft.epochs": "1", "sft.examples": "32", "ppo.iterations": "2"}
    console = quiet_console()
    summary = train(load_config(settings | {"valid_examples": "32"}), tmp_path / "run", console)
    assert (summary["data"]["train"], summary["data"]["dev"], summary["data"]["origin"]) == (8551, 1043, "folder")
    assert 0 < summary["tokens_tree"] / summary["tokens_padded"] == summary["tokens_ratio"] <= 0.25
    assert f"({summary['tokens_ratio']:.3f})" in console.file.getvalue()
    assert summary["sampler_gap_max"] < 1e-4 and summary["first_kl"] == 0.0 and summary["first_log_ratio"] == 0.0
