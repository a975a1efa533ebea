"""The whole-loop comparison: the workloads, that both engines do the same work, what is recorded when something is missing."""

import gc
import json
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import peers, report
from bench.loop import __main__ as command
from bench.loop import compare, workloads
from bench.loop.compare import FEWEST, WARM_UP, learned
from bench.loop.ours import FastppoLoop
from bench.loop.workloads import WORKLOADS, Workload, engine_config, good_tokens, prompts_of
from bench.models import config_of, random_model
from bench.record import Record
from fastppo import trainer
from fastppo.batch.rollout import Rollout, Sample
from fastppo.batch.token_tree import common_prefix

CPU, FP32 = torch.device("cpu"), torch.float32
VOCAB = config_of("tiny").vocab_size
SMALL = Workload(
    "cola", "made up", template=6, own=(2, 4), response=3, judged=3, prompts=4, samples=2, iterations=5, kl_coef=0.05
)
needs_trl = pytest.mark.skipif(peers.missing("TRL") is not None, reason=str(peers.missing("TRL")))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "cola", SMALL)


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """Both engines and the comparison collect garbage, which is slow among all that the tests before these have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- the workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cola", "few-shot", "gsm8k"])
def test_prompts(name, monkeypatch):
    monkeypatch.undo()
    workload = WORKLOADS[name]
    prompts = prompts_of(workload, VOCAB, 3)
    assert [len(iteration) for iteration in prompts] == [workload.prompts] * 3
    every = [prompt for iteration in prompts for prompt in iteration]
    lengths = [len(prompt) - workload.template for prompt in every]
    low, high = workload.own
    assert low <= min(lengths) and max(lengths) <= high and max(lengths) - min(lengths) > 0.8 * (high - low)
    assert common_prefix(every) == workload.template
    assert all(0 <= token < VOCAB for prompt in every for token in prompt)
    assert workload.batch == workload.prompts * workload.samples == 64


def test_prompts_come_again_and_no_two_iterations_are_alike():
    prompts = prompts_of(SMALL, VOCAB, 4)
    assert prompts == prompts_of(SMALL, VOCAB, 4)
    assert prompts[:2] == prompts_of(SMALL, VOCAB, 2)  # those of a short run are those of a long one
    assert len({json.dumps(prompt) for iteration in prompts for prompt in iteration}) == 4 * SMALL.prompts
    assert prompts != prompts_of(SMALL, VOCAB, 4, seed=1)


def test_the_toy_rule_rewards_about_half_of_the_tokens():
    model = random_model("tiny", CPU, FP32)
    good = good_tokens(model)
    assert good.shape == (VOCAB,) and good.dtype == torch.float32 and set(good.tolist()) == {0.0, 1.0}
    assert abs(good.mean() - 0.5) < 0.05
    direction = torch.zeros(128)
    direction[0] = 3.0  # what an adapter can do: move the hidden states
    logits = model.get_output_embeddings().weight.detach() @ direction
    assert logits[good == 1].min() > 0 >= logits[good == 0].max()


def test_our_settings_are_trls():
    config = engine_config(SMALL, 7, "cpu", FP32, {"value.trunk": "own"})
    assert (config.ppo.prompts, config.ppo.samples, config.ppo.iterations) == (4, 2, 7)
    assert (config.ppo.epochs, config.ppo.minibatches, config.ppo.lr) == (workloads.EPOCHS, 1, workloads.LR)
    assert (config.sample.max_new_tokens, config.sample.temperature, config.sample.top_k) == (3, 1.0, 0)
    assert (config.ppo.kl_coef, config.ppo.reference, config.ppo.schedule) == (SMALL.kl_coef, "base", "linear")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (workloads.RANK, workloads.ALPHA, "all-linear")
    assert config.value.trunk == "own"


# -- one iteration of each engine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours():
    return FastppoLoop("tiny", SMALL, 5, CPU, FP32)


def test_our_iteration(ours):
    prompts = prompts_of(SMALL, VOCAB, 2)
    seconds = [ours.iterate(prompts[0]), ours.iterate(prompts[1], timed=True)]
    assert all(s > 0 for s in seconds) and ours.step == len(ours.curve) == 2
    assert list(ours.phases) == list(trainer.PPO_PHASES) and sum(ours.phases.values()) <= seconds[1]
    lengths = [len(prompt) for prompt in prompts[1] for _ in range(SMALL.samples)]
    assert ours.padded_tokens == SMALL.batch * (max(lengths) + SMALL.response)
    longest = SMALL.template + sum(len(prompt) - SMALL.template for prompt in prompts[1]) + SMALL.batch * (SMALL.response - 1)
    assert longest - SMALL.batch <= ours.tree_tokens <= longest


def test_every_answer_is_as_long_as_asked(ours, monkeypatch):
    answers, real = [], ours.rewards
    monkeypatch.setattr(ours, "rewards", lambda rollout: answers.extend(rollout.samples) or real(rollout))
    ours.iterate(prompts_of(SMALL, VOCAB, 1)[0])
    assert [len(sample.tokens) for sample in answers] == [SMALL.response] * SMALL.batch
    share = sum(float(ours.good[sample.tokens].mean()) for sample in answers) / SMALL.batch
    assert ours.curve[-1] == pytest.approx(share)


@needs_trl
def test_both_rewards_are_the_same(ours):
    """TRL's through its own `get_reward`, on prompts that are padded at the left."""
    from trl.experimental.ppo.ppo_trainer import get_reward

    from bench.loop.trl import _left_padded, _Reward

    torch.manual_seed(1)
    prompts = prompts_of(replace(SMALL, own=(1, 6)), VOCAB, 1)[0]
    answers = torch.randint(VOCAB, (len(prompts), SMALL.response))
    answers[0] = ours.good.nonzero()[: SMALL.response, 0]
    answers[1] = (1 - ours.good).nonzero()[: SMALL.response, 0]
    pad = VOCAB
    queries = _left_padded(prompts, pad)["input_ids"]
    assert (queries == pad).any()
    rewards = get_reward(_Reward(ours.good, SMALL.response), torch.cat([queries, answers], 1), pad, queries.shape[1])[1]
    samples = [Sample(i, row, [0.0] * len(row), "length", "") for i, row in enumerate(answers.tolist())]
    assert rewards.tolist() == pytest.approx(ours.rewards(Rollout(prompts, samples)))
    assert rewards[:2].tolist() == [1.0, 0.0] and len(set(rewards.tolist())) > 1


@needs_trl
def test_both_engines_start_from_the_same_weights_and_see_the_same_prompts(monkeypatch):
    from trl.experimental.ppo import ppo_trainer

    from bench.loop.trl import TrlLoop

    prompts = prompts_of(SMALL, VOCAB, 2)
    trl, ours = TrlLoop("tiny", SMALL, prompts, CPU, FP32, SMALL.batch), FastppoLoop("tiny", SMALL, 2, CPU, FP32)
    base = {name.replace(".base_layer", ""): p for name, p in ours.model.base.model.named_parameters() if "lora_" not in name}
    theirs = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trl.trainer.policy_model.named_parameters()
        if "lora_" not in name
    }
    assert base.keys() == theirs.keys() and all(torch.equal(base[name], theirs[name]) for name in base)
    critic = dict(trl.trainer.value_model.named_parameters())
    assert all(torch.equal(critic[name], p) for name, p in base.items() if name.startswith("model."))
    assert not critic["score.weight"].any() and all(p.requires_grad for p in critic.values())
    adapters = [sum(p.requires_grad for p in model.parameters()) for model in (trl.trainer.policy_model, ours.model.peft)]
    assert adapters[0] == adapters[1] > 0

    generate, answers, seen = ppo_trainer.batch_generation, [], []

    def spy(model, queries, *args):
        found = generate(model, queries, *args)
        seen.append([[token for token in row if token != VOCAB] for row in queries.tolist()])
        answers.append(found[0][:, queries.shape[1] :])
        return found

    monkeypatch.setattr(ppo_trainer, "batch_generation", spy)
    called = []
    trl.run(lambda i: called.append((i, torch.is_grad_enabled())) or i == 0)
    assert seen == [[prompt for prompt in iteration for _ in range(SMALL.samples)] for iteration in prompts]
    assert called == [(0, True), (1, True)] and len(trl.seconds) == 2
    assert trl.curve == pytest.approx([float(ours.good[tokens].mean()) for tokens in answers])
    assert all(tokens.shape == (SMALL.batch, SMALL.response) for tokens in answers)
    wanted = {"generation", "reference", "value", "reward", "update: forward", "update: backward", "update: optimizer"}
    assert wanted <= set(trl.phases) and 0 < sum(trl.phases.values()) <= trl.seconds[1]
    assert ppo_trainer.batch_generation is spy and ppo_trainer.gc.__name__ == "gc"  # its clocks are gone


# -- what counts as learned ----------------------------------------------------------------------------------------------

NOISE = [0.01 * ((7 * i) % 5 - 2) for i in range(40)]


@pytest.mark.parametrize(
    ("curve", "rose"),
    [
        ([0.5 + 0.005 * i for i in range(40)], True),
        ([0.5 + 0.005 * i + 2 * NOISE[i] for i in range(40)], True),
        ([0.5 - 0.005 * i for i in range(40)], False),
        ([0.5] * 40, False),
        ([0.5 + x for x in NOISE], False),
        ([0.5] * 20 + [0.51] * 20, False),  # significant, and nothing
        ([0.5 + 0.03 * (i >= 20) + 20 * NOISE[i] for i in range(40)], False),  # more, and not significant
        ([0.5] * 20 + [0.6] * 20, True),
        ([0.5, 0.5, 0.9, 0.9], True),
        ([0.5, 0.9, 0.9], False),
        ([], False),
    ],
)
def test_learned(curve, rose):
    assert learned(curve) is rose


# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """The command with these arguments: (status, record, what it printed). Its child processes are made up, or run in here."""
    out = tmp_path / "cpu" / "loop-cola-tiny.json"
    out.parent.mkdir()
    asked, printed = [], []

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.loop", *arguments])
        status = command.main()
        printed.append(capfd.readouterr().out)
        return status

    def child(argv, **how):
        assert argv[:3] == [sys.executable, "-m", "bench.loop"] and how["timeout"] >= 60
        asked.append(argv[argv.index("--memory") + 1])
        if not whole.in_here:
            return SimpleNamespace(stdout=json.dumps({"tensors_MiB": 10.0 * len(asked), "process_MiB": 300.0}))
        printed.append(capfd.readouterr().out)
        main(*argv[3:])
        return SimpleNamespace(stdout=printed.pop())

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=child, TimeoutExpired=subprocess.TimeoutExpired))

    def whole(*arguments):
        asked.clear()
        printed.clear()
        status = main("--workload", "cola", "--device", "cpu", "--out", str(out), *arguments)
        return status, Record.load(out), "".join(printed)

    whole.out, whole.asked, whole.in_here = out, asked, False
    return whole


def page_of(path, tmp_path):
    assert report.main(["--results", str(path.parent.parent), "--out", str(tmp_path / "RESULTS.md")]) == 0
    return (tmp_path / "RESULTS.md").read_text()


@needs_trl
def test_the_whole_comparison(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "learned", lambda curve: True)
    run.in_here = True
    status, record, printed = run("--iterations", "5")
    assert status == 0 and record.complete and record.part == "loop-cola-tiny" and record.notes == []
    wanted = {"ratio", "trl samples/s", "fastppo samples/s", "trl MiB", "fastppo MiB", "memory ratio"}
    assert record.figures.keys() == wanted and run.asked == ["fastppo", "trl"]
    figures = record.figures
    assert len(figures["ratio"].raw) == len(figures["trl samples/s"].raw) == 5 - WARM_UP - 1 == FEWEST
    for ratio, ours, theirs in zip(*(figures[n].raw for n in ("ratio", "fastppo samples/s", "trl samples/s")), strict=True):
        assert ratio == pytest.approx(ours / theirs)
    assert figures["memory ratio"].value == pytest.approx(figures["fastppo MiB"].value / figures["trl MiB"].value)
    weights = sum(p.numel() for p in random_model("tiny", CPU, FP32).parameters()) * 4 / 2**20
    assert figures["fastppo MiB"].value > weights and figures["trl MiB"].value > 2 * weights  # TRL has a second model
    assert record.settings["iterations"] == 5 and record.data["trl_micro_batch"] in (2, SMALL.batch)
    for engine in ("fastppo", "trl"):
        assert len(record.data["curves"][engine]) == 5 and all(0 <= x <= 1 for x in record.data["curves"][engine])
        assert sum(record.data["phases"][engine].values()) > 0 and record.data["process_MiB"][engine] > 100
    assert record.data["tokens"]["responses"] == SMALL.batch * SMALL.response
    assert record.data["tokens"]["tree"] < record.data["tokens"]["padded"]
    assert 0 <= record.data["trl_gc_share"] < 1 and record.data["trl_other"] > 0
    assert printed.count("iteration ") == 5 and "ratio: " in printed and str(run.out) in printed
    page = page_of(run.out, tmp_path)
    assert f"{figures['ratio'].value:.2f}"[:3] in page and "3 pairs" in page
    (goal,) = [line for line in page.splitlines() if "CoLA-like loop, samples/s" in line and "at least 10 x" in line]
    assert "void" not in goal and "loop-cola-tiny" in goal
    record.data["learned"] = {"fastppo": True, "trl": False}
    record.save(run.out)
    assert "void: TRL did not learn the rule" in page_of(run.out, tmp_path)


def test_without_trl_there_are_our_figures_and_how_to_install_it(run, tmp_path, monkeypatch):
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(peers, "importlib", nothing)
    status, record, printed = run("--iterations", "5")
    assert status == 0 and record.complete
    assert record.notes == ["TRL is not installed: pip install -c constraints.txt -e .[peers]"] and record.notes[0] in printed
    assert record.figures.keys() == {"fastppo samples/s", "fastppo MiB"} and run.asked == ["fastppo"]
    assert record.data["curves"].keys() == record.data["learned"].keys() == record.data["phases"].keys() == {"fastppo"}
    page = page_of(run.out, tmp_path)
    assert "TRL is not installed" in page and "not measured" in page


def stand_in(monkeypatch, fits=lambda micro_batch, others: True, runs_out_after=None, seconds=0.5):
    """A TRL that takes no time, and memory as told: (micro-batch, whether our loop is there as well) -> whether it fits."""
    module = pytest.importorskip("bench.loop.trl")
    monkeypatch.setattr(compare.peers, "missing", lambda peer: None)
    monkeypatch.setattr(workloads, "EPOCHS", 1)
    made, ours = [], weakref.WeakSet()
    real = compare.FastppoLoop

    class Ours(real):
        def __init__(self, *args):
            super().__init__(*args)
            ours.add(self)

    class Stand:
        def __init__(self, model, workload, prompts, device, dtype, micro_batch):
            made.append(micro_batch)
            if not fits(micro_batch, bool(ours)):  # ours is let go of before TRL tries again
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.prompts, self.seconds, self.curve, self.phases = prompts, [], [], {}
            self.time = seconds(micro_batch) if callable(seconds) else seconds

        def run(self, between):
            for i in range(len(self.prompts)):
                if ours and i == runs_out_after:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                self.seconds.append(self.time)
                self.curve.append(0.5)
                if between(i):
                    self.phases = {"generation": 0.9 * self.time, "gc.collect": 0.05 * self.time}

        def all(self):
            self.run(lambda i: False)
            return self

    monkeypatch.setattr(module, "TrlLoop", Stand)
    monkeypatch.setattr(compare, "FastppoLoop", Ours)
    return made


ONE_BY_ONE = "both engines together found no memory: measured one after the other, not alternating"


@pytest.mark.parametrize("late", [False, True])
def test_what_does_not_fit_together_is_measured_one_after_the_other(run, monkeypatch, late):
    made = stand_in(monkeypatch, lambda micro, together: late or not together, 2 if late else None)
    _, record, printed = run("--iterations", "6")
    assert made == [8, 2, 8, 8] and record.notes == [ONE_BY_ONE] and ONE_BY_ONE in printed
    assert record.data["trl_micro_batch"] == SMALL.batch
    assert len(record.figures["ratio"].raw) == 4 == len(record.figures["fastppo samples/s"].raw)
    assert {engine: len(curve) for engine, curve in record.data["curves"].items()} == {"fastppo": 6, "trl": 6}
    assert record.data["trl_gc_share"] == pytest.approx(0.05)


@pytest.mark.parametrize("largest", [2, 1])
def test_trl_gets_smaller_micro_batches_until_it_fits(run, monkeypatch, largest):
    made = stand_in(monkeypatch, lambda micro, together: micro <= largest)
    _, record, _ = run("--iterations", "5")
    assert made == ([8, 2, 2] if largest == 2 else [8, 2, 1, 1])
    assert record.data["trl_micro_batch"] == largest and record.notes == []
    assert record.figures["ratio"].value > 0


def test_trl_gets_the_micro_batch_that_is_fastest_for_it(run, monkeypatch):
    made = stand_in(monkeypatch, seconds=lambda micro: 0.2 if micro == 2 else 0.5)
    _, record, printed = run("--iterations", "5")
    assert made == [8, 2, 2] and record.data["trl_micro_batch"] == 2
    assert record.data["trl_seconds_by_micro_batch"] == {"8": 0.5, "2": 0.2} and "8: 0.50, 2: 0.20" in printed


def test_trl_that_fits_nowhere_is_a_note(run, monkeypatch, tmp_path):
    made = stand_in(monkeypatch, lambda micro, together: False)
    status, record, _ = run("--iterations", "5")
    assert made == [8, 2, 1] and status == 0 and record.complete
    assert record.notes == ["TRL: out of memory, even with one sample at a time"]
    assert record.figures.keys() == {"fastppo samples/s", "fastppo MiB"} and run.asked == ["fastppo"]
    assert "out of memory, even with one sample" in page_of(run.out, tmp_path)


def test_without_time_it_says_so_and_gives_no_ratio(run, monkeypatch):
    stand_in(monkeypatch)
    _, record, _ = run("--iterations", "6", "--minutes", "0.0001")
    assert "stopped after 1 of 6 iterations: no more time" in record.notes
    assert "only 0 counted iterations: no ratio" in record.notes
    assert "ratio" not in record.figures and "trl samples/s" not in record.figures


def test_time_that_runs_out_later_leaves_the_pairs_that_are_done(run, monkeypatch):
    stand_in(monkeypatch)
    clock, real = [0], compare._line
    monkeypatch.setattr(compare, "_line", lambda i, *rest: clock.append(i) or real(i, *rest))
    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6 * (clock[-1] >= 4)))
    _, record, _ = run("--iterations", "9")
    assert "stopped after 5 of 9 iterations: no more time" in record.notes
    assert len(record.figures["ratio"].raw) == 4 and "trl_gc_share" not in record.data


def test_a_memory_process_that_dies_or_takes_too_long_is_a_note(run, monkeypatch):
    stand_in(monkeypatch)
    answers = iter([SimpleNamespace(stdout="Killed\n", returncode=137), SimpleNamespace(stdout="", returncode=1)])
    monkeypatch.setattr(compare.subprocess, "run", lambda *args, **how: next(answers))
    status, record, _ = run("--iterations", "5")
    lines = [f"peak memory of {engine}: not measured (no time, or out of memory)" for engine in ("fastppo", "trl")]
    assert status == 3 and not record.complete and record.notes == lines
    assert "memory ratio" not in record.figures and "ratio" in record.figures

    def slow(*args, **how):
        raise subprocess.TimeoutExpired("x", how["timeout"])

    monkeypatch.setattr(compare.subprocess, "run", slow)
    assert run("--iterations", "5")[1].notes == lines


def test_a_ratio_that_fell_is_named(run, monkeypatch):
    stand_in(monkeypatch, seconds=0.5)
    run("--iterations", "5")
    stand_in(monkeypatch, seconds=0.001)
    _, record, printed = run("--iterations", "5")
    assert "ratio" in record.losses() and "WORSE than stored: ratio by" in printed


def test_what_is_stored_and_whole_is_replaced_by_nothing_less(run, monkeypatch, tmp_path):
    stand_in(monkeypatch)
    _, first, _ = run("--iterations", "5")
    assert first.complete
    _, kept, printed = run("--iterations", "6")  # other settings, other figures
    place = tmp_path / "cpu" / "loop-cola-tiny.unfinished"
    assert kept == first and "WORSE" not in printed and str(place) in printed
    assert Record.load(place).settings["iterations"] == 6 and Record.load(place).reference == {}
    _, again, _ = run("--iterations", "5")
    assert again.started >= first.started and again.reference.keys() >= {"ratio"}

    def stop(record, place, *_):
        record.figures.clear()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure", stop)
    status, kept, printed = run("--iterations", "5")
    assert status == 130 and kept == again and printed == ""
    assert Record.load(place).figures == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iterations", "4"], "--iterations: 4; expected 5 or more"),
        (["--device", "cuda"], "--device cuda: there is no CUDA GPU"),
        (["--model", "70b"], "invalid choice: '70b'"),
        (["--workload", "chess"], "invalid choice: 'chess'"),
        (["--threads", "0"], "--threads: 0; expected 1 or more"),
        (["--minutes", "nan"], "--minutes: nan; expected a number above 0"),
        (["--minutes", "0"], "--minutes: 0.0; expected a number above 0"),
        (["--out", __file__ + "/x.json"], "x.json; expected a file, in a folder"),
        (["--out", str(Path(__file__).parent)], "expected a file, in a folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.loop", "--workload", "cola", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
