"""Whole runs in one process: what a run folder holds, and that every setting of the loop does what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small import adapter, leftovers, lines, outcome, ppo_steps, write_rows
from tiny import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo import checkpoint, config, trainer
from fastppo.model.backbone import Backbone
from fastppo.tasks import Example
from fastppo.tasks.cola import COLA

STAGE_FIELDS = {"mcc", "mcc_low", "mcc_high", "accuracy", "malformed", "n", "labels"}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    summary, shown = world.train(run)
    return run, summary, shown


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_run_folder(whole, world):
    run, _, _ = whole
    written = {"config.yaml", "setup.json", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"}
    assert {path.name for path in run.iterdir()} == written | {"answers", "checkpoints", "adapter", ".lock"}
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert leftovers(run) == []
    assert config.load_config({}, run / "config.yaml") == config.load_config(world.settings())
    saved = checkpoint.load_latest(run)
    assert saved.state["stage"] == "done" and len(list((run / "checkpoints").iterdir())) == checkpoint.KEEP


def test_summary(whole):
    run, summary, _ = whole
    written = json.loads((run / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert written["task"] == "cola" and written["model"].endswith("model") and written["seed"] == 0
    assert {key: written["data"][key] for key in ("origin", "train", "dev")} == {"origin": "folder", "train": 60, "dev": 20}
    assert list(written["stages"]) == ["zero_shot", "sft", "ppo"]
    for row in written["stages"].values():
        assert STAGE_FIELDS <= row.keys()
        assert -1 <= row["mcc_low"] <= row["mcc"] <= row["mcc_high"] <= 1
        assert 0 <= row["accuracy"] <= 1 - row["malformed"] and row["n"] == 20
    # 60 rows, 6 of them held out; SFT saw 24, and four iterations of 8 prompts saw some of these again.
    assert [row["labels"] for row in written["stages"].values()][:2] == [0, 24]
    assert 32 <= written["stages"]["ppo"]["labels"] <= 54
    assert written["samples"] == 4 * 8 * 3 and written["samples_per_s"] > 0
    assert {"sft", "sample", "score", "estimate", "update", "evaluate"} == written["seconds"].keys()
    assert 0 < written["tokens_tree"] < 0.25 * written["tokens_padded"]
    assert written["tokens_ratio"] == written["tokens_tree"] / written["tokens_padded"]
    assert 0 < written["sampler_gap_max"] < 1e-4
    assert {"fastppo", "python", "torch", "transformers", "peft"} <= written["versions"].keys()
    assert (written["device"], written["dtype"], written["packed"]) == ("cpu", "float32", True)


def test_records_are_one_object_a_step(whole):
    run, summary, _ = whole
    rows = lines(run / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("SFT", n + 1) for n in range(6)] + [
        ("PPO", n + 1) for n in range(4)
    ]
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    ppo = [row for row in rows if row["stage"] == "PPO"]
    assert ["valid_reward" in row for row in ppo] == [False, True, False, True]
    assert max(row["sampler_gap"] for row in ppo) == summary["sampler_gap_max"]
    assert sum(row["tokens_tree"] for row in ppo) == summary["tokens_tree"]
    rewards = {(row["step"], row["reward"]) for row in lines(run / "samples.jsonl")}
    assert {step for step, _ in rewards} == {1, 2, 3, 4} and {reward for _, reward in rewards} <= {1.0, -1.0, -2.0}
    for row in lines(run / "samples.jsonl"):
        assert {"fields", "label", "answer", "finish", "step", "reward"} == row.keys() and {"sentence"} == row["fields"].keys()


def test_samples_have_the_reward_that_their_answer_earns(whole):
    for row in lines(whole[0] / "samples.jsonl"):
        said = {"yes": 1, "no": 0}.get(row["answer"].strip().removesuffix(".").lower())
        assert row["reward"] == (-2.0 if said is None else 1.0 if said == row["label"] else -1.0)


def test_answers_to_the_dev_examples_have_the_scores_of_the_summary(whole, world):
    run, summary, _ = whole
    gold = [int(row.split("\t")[1]) for row in (world.data / "dev.tsv").read_text().splitlines()]
    for stage, row in summary["stages"].items():
        answers = lines(run / "answers" / f"{stage}.jsonl")
        assert [answer["label"] for answer in answers] == gold
        assert [answer["origin"] for answer in answers] == [f"dev.tsv:{n}" for n in range(1, 21)]
        said = [{"yes": 1, "no": 0}.get(answer["answer"].strip().removesuffix(".").lower()) for answer in answers]
        assert [answer["predicted"] for answer in answers] == said
        examples = [Example({}, label, "") for label in gold]
        assert COLA.score(examples, said) == {name: row[name] for name in ("mcc", "accuracy", "malformed", "n")}
    assert len({(run / "answers" / f"{stage}.jsonl").read_text() for stage in summary["stages"]}) > 1


def test_setup_is_part_of_the_summary(whole):
    run, summary, _ = whole
    setup = json.loads((run / "setup.json").read_text())
    assert setup.items() <= summary.items() and setup["labels"] == ["unacceptable", "acceptable"]
    assert {"task", "model", "data", "seed", "device", "device_name", "dtype", "versions"} <= setup.keys()


class Made(TorchDispatchMode):
    """Entries of what operators return."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(each.alias_info is not None for each in func._schema.returns):
            self.entries += [each.numel() for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        return out


def test_the_fingerprint_copies_no_whole_weight():
    """In bordered buffers weights are views with gaps; their numbers are those that they had before."""
    buffer = torch.randn(1000, 40, dtype=torch.bfloat16)
    for weight in (buffer[:, 8:], buffer[:, 8:9], buffer, buffer[0], torch.tensor(3.0), torch.randn(2, 3, 5), buffer[:0]):
        expected = weight.flatten()[:64].float().tolist()
        with Made() as made:
            assert trainer._first_numbers(torch.nn.Parameter(weight, requires_grad=False)) == expected
        assert max(made.entries, default=0) <= 64 * 32


def test_reward_by_class(world, tmp_path):
    run = tmp_path / "run"
    world.train(run, ppo__samples=1, ppo__prompts=4)  # so few that all samples are in samples.jsonl
    sampled = lines(run / "samples.jsonl")
    assert len(sampled) == 16 and {sample["label"] for sample in sampled} == {0, 1}
    for row in ppo_steps(run):
        mine = [sample for sample in sampled if sample["step"] == row["step"]]
        for label in {sample["label"] for sample in mine}:
            rewards = [sample["reward"] for sample in mine if sample["label"] == label]
            assert row[f"reward_class_{label}"] == pytest.approx(sum(rewards) / len(rewards))


def test_what_is_shown(whole):
    _, _, shown = whole
    assert "60 train rows (24 for SFT, 54 for PPO, 6 held out to choose the checkpoint), 20 dev rows" in shown
    for text in ("zero-shot", "after SFT", "after PPO", "SFT 6/6", "PPO 4/4", "tokens computed", "wrote "):
        assert text in shown
    assert "built-in" not in shown and "padded, with" not in shown


# -- the first step ----------------------------------------------------------------------------------------------------


def assert_starts_at_its_reference(run):
    first = ppo_steps(run)[0]
    assert first["kl"] == 0.0 and first["first_log_ratio"] == 0.0
    assert ppo_steps(run)[-1]["kl"] != 0.0


def test_first_kl_is_zero_and_first_ratio_is_one(whole):
    assert_starts_at_its_reference(whole[0])
    assert all(row["first_log_ratio"] == 0.0 for row in ppo_steps(whole[0]))


@pytest.mark.parametrize("kind", ["gpt_neox", "mistral", "qwen2"])
def test_first_step_on_other_architectures(world, tmp_path, kind):
    model = save_tiny_model(kind, tmp_path / "model")
    summary, _ = world.train(tmp_path / "run", model=model, sft__epochs=1, ppo__iterations=2)
    assert_starts_at_its_reference(tmp_path / "run")
    assert summary["packed"] and summary["sampler_gap_max"] < 1e-4


def test_with_old_logprobs_of_the_sampler_the_first_ratio_is_within_the_gap(world, tmp_path):
    world.train(tmp_path / "run", ppo__old_logprobs="sampler")
    for row in ppo_steps(tmp_path / "run"):
        assert row["sampler_gap"] > 0
        assert row["first_log_ratio"] <= row["sampler_gap"] < 1e-4
    assert ppo_steps(tmp_path / "run")[0]["kl"] == 0.0


def test_base_as_the_reference(world, tmp_path):
    world.train(tmp_path / "sft", ppo__reference="base", ppo__iterations=1)
    assert ppo_steps(tmp_path / "sft")[0]["kl"] > 0.1  # SFT has moved the policy
    world.train(tmp_path / "none", ppo__reference="base", ppo__iterations=1, sft__examples=0)
    assert ppo_steps(tmp_path / "none")[0]["kl"] == 0.0


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bits_and_another_seed_others(whole, world, tmp_path):
    world.train(tmp_path / "same")
    assert outcome(tmp_path / "same") == outcome(whole[0])
    world.train(tmp_path / "other", seed=1)
    assert outcome(tmp_path / "other")["adapter"] != outcome(whole[0])["adapter"]
    assert lines(tmp_path / "other" / "samples.jsonl") != lines(whole[0] / "samples.jsonl")


# -- settings of the loop ----------------------------------------------------------------------------------------------


def test_without_sft(world, tmp_path):
    summary, shown = world.train(tmp_path / "run", sft__examples=0)
    assert list(summary["stages"]) == ["zero_shot", "ppo"] and "SFT" not in shown
    assert {row["stage"] for row in lines(tmp_path / "run" / "metrics.jsonl")} == {"PPO"}
    assert_starts_at_its_reference(tmp_path / "run")


def test_without_ppo(world, tmp_path, whole):
    summary, shown = world.train(tmp_path / "run", ppo__iterations=0)
    assert list(summary["stages"]) == ["zero_shot", "sft"] and "PPO" not in shown
    assert "60 train rows (24 for SFT, 6 held out), 20 dev rows" in shown
    assert summary["stages"]["sft"] == whole[1]["stages"]["sft"]
    assert summary["tokens_ratio"] is None and summary["samples_per_s"] is None
    assert any(tensor.any() for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name)


def test_without_any_training(world, tmp_path):
    summary, _ = world.train(tmp_path / "run", ppo__iterations=0, sft__examples=0)
    assert list(summary["stages"]) == ["zero_shot"]
    assert not any(tensor.any() for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name)


VARIANTS = [
    {"value__trunk": "own"},
    {"value__trunk": "detached"},
    {"ppo__kl_estimator": "k2"},
    {"ppo__kl_estimator": "k3"},
    {"ppo__kl_coef": 0},
    {"ppo__minibatches": 8, "ppo__epochs": 1},
    {"ppo__minibatches": 1, "ppo__whiten": False, "ppo__entropy_coef": 0.01},
    {"ppo__schedule": "cosine", "ppo__gamma": 0.9, "ppo__lam": 1.0},
    {"ppo__prompts": 70},  # more than there are: some come twice
    {"ppo__samples": 1},
    {"sample__top_k": 20, "sample__top_p": 0.9, "sample__temperature": 0.7},
    {"sample__stop": "no", "sample__max_new_tokens": 1},
    {"sample__slots": 1},
    {"lora__rslora": True, "lora__targets": "q_proj,v_proj"},
    {"train_examples": 5, "ppo__prompts": 4},
    {"sft__examples": 1000},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()))
def test_variants_run(world, tmp_path, changes):
    run = tmp_path / "run"
    summary, _ = world.train(run, **{"ppo__iterations": 2, "sft__epochs": 1, **changes})
    rows = ppo_steps(run)
    assert len(rows) == 2 and rows[0]["first_log_ratio"] == 0.0
    assert ("kl" not in rows[0]) if changes.get("ppo__kl_coef") == 0 else (rows[0]["kl"] == 0.0)
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))
    assert summary["sampler_gap_max"] < 1e-4
    assert list(summary["stages"]) == ["zero_shot", "sft", "ppo"] and leftovers(run) == []


@pytest.mark.parametrize("own", [False, True], ids=["shared-trunk", "own-adapter"])
def test_warm_up_trains_the_critic_and_leaves_the_policy_as_it_was(world, tmp_path, own):
    run = tmp_path / "run"
    world.train(run, value__warmup=2, value__trunk="own" if own else "shared", ppo__iterations=4)
    rows = ppo_steps(run)
    # After two iterations of warm-up the third still samples from the start; only the fourth has moved.
    assert [row["kl"] == 0.0 for row in rows] == [True, True, True, False]
    assert ["policy_loss" in row for row in rows] == [False, False, True, True]
    assert rows[1]["value_loss"] != rows[0]["value_loss"]


def test_kl_target_moves_the_coefficient(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(trainer.ppo, "KL_HORIZON", 24)
    world.train(run, ppo__kl_target=1e-9, ppo__kl_coef=0.5, ppo__iterations=3)
    first, second, third = (row["kl_coef"] for row in ppo_steps(run))
    assert first == 0.5
    assert second == pytest.approx(0.5 * 0.8)  # KL 0: down by the largest step, 20 % per horizon of 24 samples
    assert third == pytest.approx(0.4 * 1.2)  # KL far above the target: up


def test_target_kl_ends_an_iteration_early(world, tmp_path):
    world.train(tmp_path / "free", ppo__epochs=4, ppo__lr=2e-2, ppo__iterations=2)
    assert [row["steps"] for row in ppo_steps(tmp_path / "free")] == [8, 8]
    world.train(tmp_path / "held", ppo__epochs=4, ppo__lr=2e-2, ppo__iterations=2, ppo__target_kl=1e-6)
    assert ppo_steps(tmp_path / "held")[0]["steps"] == 2  # the first step is at the start itself, the second is not


def test_a_small_token_budget_changes_only_the_rounding(whole, world, tmp_path):
    world.train(tmp_path / "run", micro_batch_tokens=1)
    cut, uncut = ppo_steps(tmp_path / "run"), ppo_steps(whole[0])
    assert_starts_at_its_reference(tmp_path / "run")
    assert cut[0]["tokens_tree"] > uncut[0]["tokens_tree"]
    for name in ("reward", "entropy", "policy_loss", "value_loss", "grad_norm"):
        assert cut[0][name] == pytest.approx(uncut[0][name], rel=1e-3, abs=1e-4), name


def test_padded_path_gives_the_same_run(whole, world, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "_choose_path", lambda self: False)
    summary, shown = world.train(tmp_path / "run")
    assert not summary["packed"] and shown.count("running padded") == 1 and "14,868, all padded" in shown
    padded, packed = ppo_steps(tmp_path / "run"), ppo_steps(whole[0])
    assert_starts_at_its_reference(tmp_path / "run")
    for name in ("reward", "accuracy", "entropy", "policy_loss", "value_loss", "grad_norm", "tokens_tree"):
        assert padded[0][name] == pytest.approx(packed[0][name], rel=1e-3, abs=1e-4), name


def test_mpt_runs_padded_and_says_so_once(world, tmp_path):
    model = save_tiny_model("mpt", tmp_path / "model")
    run = tmp_path / "run"
    summary, shown = world.train(run, model=model)
    assert shown.count("running padded") == 1 and "MptForCausalLM" in shown
    assert not summary["packed"] and summary["sampler_gap_max"] < 1e-4
    assert_starts_at_its_reference(run)


def test_bfloat16_base_with_float32_adapters(world, tmp_path):
    run = tmp_path / "run"
    summary, _ = world.train(run, dtype="bfloat16")
    assert summary["dtype"] == "bfloat16" and summary["sampler_gap_max"] < 0.3
    assert {tensor.dtype for tensor in adapter(run).values()} == {torch.float32}
    assert_starts_at_its_reference(run)


# -- the best checkpoint -----------------------------------------------------------------------------------------------


def scripted(monkeypatch, rewards):
    """Validations (of 6 examples; dev has 20) give these rewards, and MCCs that say the opposite."""
    seen = []
    original = trainer.evaluate

    def evaluate(model, data, *check):
        (result,) = original(model, data, *check)
        if len(data) == 20:
            return [result]
        seen.append({name: p.detach().clone() for name, p in model.adapter_tensors("policy").items()})
        reward = rewards[len(seen) - 1]
        return [replace(result, scores={**result.scores, "mcc": -reward}, reward=reward)]

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize(
    ("rewards", "best"),
    [([0.0, 0.5, 0.9, 0.9, 0.1], 2), ([0.3, -1.0, 0.2, 0.3, 0.1], 0), ([0.0, 0.1, 0.2, 0.3, 0.4], 4)],
)
def test_the_adapter_of_the_best_validation_reward_is_kept(world, tmp_path, monkeypatch, rewards, best):
    run = tmp_path / "run"
    seen = scripted(monkeypatch, rewards)
    summary, _ = world.train(run, eval_every=1)
    assert summary["best_step"] == best and len(seen) == 5
    written = adapter(run)
    for step, policy in enumerate(seen):
        equal = all(torch.equal(written[name], tensor) for name, tensor in policy.items())
        assert equal == (step == best), step
    assert [row["valid_reward"] for row in ppo_steps(run)] == rewards[1:]


def test_with_the_reward_flipped_the_wrong_answers_are_kept(world, tmp_path):
    straight, _ = world.train(tmp_path / "a", ppo__iterations=12, ppo__lr=2e-2, sft__epochs=8, seed=2)
    flipped, _ = world.train(
        tmp_path / "b", ppo__iterations=12, ppo__lr=2e-2, sft__epochs=8, seed=2, reward__correct=-1, reward__wrong=1
    )
    assert straight["stages"]["sft"] == flipped["stages"]["sft"]
    assert straight["stages"]["ppo"]["accuracy"] > flipped["stages"]["ppo"]["accuracy"]
    last = ppo_steps(tmp_path / "b")[-1]
    right, malformed = last["valid_accuracy"], (1 - last["valid_reward"] - 2 * last["valid_accuracy"]) / 3
    assert -1e-9 < malformed <= 1 - right + 1e-9  # the reward is (wrong) - (right) - 2 (malformed)


def test_without_validation_the_newest_is_kept(world, tmp_path):
    run = tmp_path / "run"
    summary, _ = world.train(run, valid_examples=0)
    assert summary["best_step"] == 4 and not any("valid_reward" in row for row in ppo_steps(run))
    newest = checkpoint.load_latest(run).model
    assert all(torch.equal(newest[f"policy/{name}"], tensor) for name, tensor in adapter(run).items())


def test_a_last_iteration_between_validations_is_validated_too(world, tmp_path):
    world.train(tmp_path / "run", eval_every=3)
    assert ["valid_reward" in row for row in ppo_steps(tmp_path / "run")] == [False, False, True, True]


def test_a_single_file_is_split_and_said(world, tmp_path):
    write_rows(tmp_path / "all.tsv", 40, seed=3)
    summary, shown = world.train(tmp_path / "run", data=tmp_path / "all.tsv")
    assert (summary["data"]["origin"], summary["data"]["train"], summary["data"]["dev"]) == ("file", 36, 4)
    assert "all.tsv is one file: 4 of its 40 rows" in shown
