"""Memory that runs out: the same step again with half the micro-batch, the same adapter at the end, one line of notice."""

import weakref
from dataclasses import replace

import pytest
import torch
from engine import PACKED_KINDS, make_model, random_prompts
from small import adapter, lines, outcome, quiet_console
from tiny import KINDS

from fastppo import checkpoint, cli, trainer
from fastppo.algorithms import ppo
from fastppo.algorithms.optim import make_optimizer
from fastppo.batch.rollout import MicroBatch, MiniBatch, pack
from fastppo.errors import UserError, is_out_of_memory
from fastppo.model.actor_critic import ActorCritic
from fastppo.model.out_of_memory import shrink_micro_batch, with_less_memory
from fastppo.rollout.decoder import PackedDecoder
from fastppo.rollout.sampler import Sampling, generate

BUDGET = 4096  # tokens: all in one micro-batch
LIMIT = 190  # of the memory that is made up: little more than one sequence


def run_out(tokens: int) -> None:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} MiB.")


def limit_trees(patch: pytest.MonkeyPatch, name: str, most: int) -> None:
    """A method of ``ActorCritic`` that has no room for a tree of more tokens."""
    real = getattr(ActorCritic, name)

    def limited(self, tree, **options):
        if tree.n_tokens > most:
            run_out(tree.n_tokens)
        return real(self, tree, **options)

    patch.setattr(ActorCritic, name, limited)


def limit_backward(patch: pytest.MonkeyPatch, most: int) -> None:
    """Half of a larger micro-batch's gradient is there when its memory runs out."""
    real = ppo.micro_batch_loss

    def limited(model, part, *arguments):
        loss, metrics = real(model, part, *arguments)
        if part.tree.n_tokens > most:

            def fail(_):
                handle.remove()
                run_out(part.tree.n_tokens)

            final = model.backbone.llama.layers[0].self_attn.q_proj.lora_A["policy"].weight
            handle = final.register_post_accumulate_grad_hook(fail)
        return loss, metrics

    patch.setattr(ppo, "micro_batch_loss", limited)


def limit_slots(patch: pytest.MonkeyPatch, most: int) -> None:
    real = PackedDecoder.step

    def limited(self, rows):
        if self.slots > most:
            run_out(self.slots)
        return real(self, rows)

    patch.setattr(PackedDecoder, "step", limited)


def limit_prefill(patch: pytest.MonkeyPatch, most: int) -> None:
    real = PackedDecoder._prefill

    def limited(self, sequences, past=0):
        if len(sequences) > most:
            run_out(len(sequences))
        return real(self, sequences, past)

    patch.setattr(PackedDecoder, "_prefill", limited)


PHASES = {
    "fine-tuning": lambda patch: limit_trees(patch, "policy_logprob", LIMIT),
    "estimating advantages": lambda patch: limit_trees(patch, "reference_logprob", LIMIT),
    "updating": lambda patch: limit_backward(patch, LIMIT),
    "sampling": lambda patch: limit_slots(patch, 7),
    "sampling, prefill": lambda patch: limit_prefill(patch, 3),
}


@pytest.fixture(scope="module")
def unlimited(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("unlimited") / "run"
    _, shown = world.train(run, micro_batch_tokens=BUDGET)
    assert "out of memory" not in shown
    return run


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_goes_on_to_the_same_adapter(world, unlimited, tmp_path, monkeypatch, phase):
    run = tmp_path / "run"
    PHASES[phase](monkeypatch)
    _, shown = world.train(run, micro_batch_tokens=BUDGET)
    text, sampling = " ".join(shown.split()), phase.startswith("sampling")
    assert f"out of memory while {phase.split(',')[0]}: done again, and the run goes on, with" in text
    assert ("sequences at a time instead of" in text) == sampling and ("micro-batches of" in text) != sampling
    # From what was too much, not from what was allowed: each halving is one that counts.
    assert text.count("out of memory") <= 3
    state = checkpoint.load_latest(run).state
    assert (state["most_slots"] is not None, state["most_tokens"] is not None) == (sampling, not sampling)
    for row, expected in zip(lines(run / "samples.jsonl"), lines(unlimited / "samples.jsonl"), strict=True):
        assert row["answer"] == expected["answer"]
    found, expected = adapter(run), adapter(unlimited)
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < 1e-3, name


def test_a_resumed_run_keeps_the_smaller_micro_batch(world, tmp_path, monkeypatch):
    limit_backward(monkeypatch, LIMIT)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    world.train(whole, micro_batch_tokens=BUDGET)

    class Stopped(Exception):
        pass

    def stop(self, *arguments):
        if self.state.step == 3:  # checkpoints are made after 2 and 4
            raise Stopped
        return real(self, *arguments)

    real = trainer.Trainer._record_samples
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_record_samples", stop)
        with pytest.raises(Stopped):
            world.train(broken, micro_batch_tokens=BUDGET)
    trainer.resume(broken, {}, quiet_console())
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_same_with_less_memory(kind, monkeypatch):
    model = make_model(kind, sample__max_new_tokens=6, micro_batch_tokens=BUDGET)
    prompts = random_prompts(0, 9, root=4)
    sampling = Sampling.of(model.config)
    expected = generate(model, prompts, 2, sampling, seed=3)
    model.most_slots = 2
    found = generate(model, prompts, 2, sampling, seed=3)
    assert [s.tokens for s in found.samples] == [s.tokens for s in expected.samples]
    if kind in PACKED_KINDS:
        model.most_slots = None
        limit_slots(monkeypatch, 3)
        generate(model, prompts, 2, sampling, seed=3)
        assert model.most_slots == 2  # of 18: 9, 4, 2, and no less than a prompt's samples
        limit_slots(monkeypatch, 1)
        with pytest.raises(UserError, match="out of memory while sampling, even one sample at a time"):
            generate(model, prompts, 2, sampling, seed=3)


def test_what_was_handed_on_is_not_handed_on_again(monkeypatch):
    """Memory runs out in the middle of sampling, when some answers have gone to the reward function."""
    model = make_model("llama", micro_batch_tokens=BUDGET)
    model.base = replace(model.base, eos_ids=tuple(range(0, 320, 6)))  # answers of every length
    prompts, sampling = random_prompts(0, 30, root=4), Sampling(max_new_tokens=8, slots=16)
    expected, handed = generate(model, prompts, 2, sampling, seed=3), []
    real, steps = PackedDecoder.step, []

    def limited(self, rows):
        steps.append(self.slots)
        if len(steps) == 9:
            run_out(self.slots)
        return real(self, rows)

    monkeypatch.setattr(PackedDecoder, "step", limited)
    found = generate(model, prompts, 2, sampling, seed=3, finished=lambda *sample: handed.append(sample))
    assert set(steps) == {16, 8}
    assert sorted(index for index, _ in handed) == list(range(60))
    assert all(found.samples[index] is sample for index, sample in handed)
    assert [s.tokens for s in found.samples] == [s.tokens for s in expected.samples]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [1, 9, 20, 10**6])
def test_cut(padded, budget):
    prompts = random_prompts(1, 5, root=3)
    answers = [(p, [10 * p + k + 1] * (1 + (p + k) % 4)) for p in range(5) for k in range(3)]
    [part] = pack(prompts, answers, budget=10**6, padded=padded, device="cpu")
    total = part.tree.n_actions
    part.known = {"old_logprob": torch.arange(total) / 7, "advantages": torch.arange(total) * 2.0}
    part.states = (torch.zeros(1), torch.zeros(1))
    pieces = part.cut(budget, padded=padded)
    assert [i for piece in pieces for i in piece.samples] == part.samples
    for name, known in part.known.items():
        assert torch.equal(torch.cat([piece.known[name] for piece in pieces]), known)
    assert torch.equal(torch.cat([piece.tree.action_targets for piece in pieces]), part.tree.action_targets)
    for piece in pieces:
        assert (piece.states is None) == (len(pieces) > 1)
        size = piece.tree.padded_tokens if padded else piece.tree.n_tokens
        assert size <= budget or len(piece.samples) == 1
        for i, path in zip(piece.samples, piece.tree.paths, strict=True):
            prompt, answer = answers[i]
            assert piece.tree.token_ids[path[path >= 0]].tolist() == prompts[prompt] + answer[:-1]
    assert (len(pieces) == 1) == (budget == 10**6)


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    for text in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "could not create a primitive"):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("expected scalar type Float")) and not is_out_of_memory(UserError("out of memory"))


def test_nothing_smaller_is_left():
    model = make_model("llama")
    mini = MiniBatch(pack(random_prompts(0, 4), [(i, [7, 8]) for i in range(4)], budget=BUDGET, padded=False, device="cpu"))
    seen: list[str] = []
    model.notify = seen.append

    def attempt():
        mini.parts = [piece for part in mini.parts for piece in part.cut(model.micro_batch_tokens, padded=False)]
        run_out(model.micro_batch_tokens)

    with pytest.raises(UserError, match=r"^out of memory while trying, even one sample at a time \(CUDA out of memory\."):
        with_less_memory(model, "trying", attempt, lambda: shrink_micro_batch(model, [mini]))
    assert len(mini.parts) == 4 and len(seen) == 1  # cut in two, each of which no longer fits in half of what all took


def test_other_errors_pass():
    model = make_model("llama")
    with pytest.raises(ZeroDivisionError):
        with_less_memory(model, "trying", lambda: 1 // 0, lambda: "less")


def test_what_filled_the_memory_is_let_go_before_the_next_attempt():
    model, alive, left = make_model("llama"), [], [3, 2, 1]

    class Large:
        pass

    def attempt():
        assert all(reference() is None for reference in alive)
        large = Large()
        alive[:] = [weakref.ref(large)]
        if left.pop() < 3:
            run_out(1)
        return MicroBatch

    model.notify = lambda text: None
    assert with_less_memory(model, "trying", attempt, lambda: "less") is MicroBatch


def test_out_of_memory_elsewhere_is_one_line(world, tmp_path, monkeypatch, capsys):
    """Where there is nothing to make smaller: when the model is loaded, for example."""
    monkeypatch.setattr(trainer, "load_base", lambda config: run_out(9000))
    assert cli.main(world.argv(tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fastppo: error: out of memory (CUDA out of memory. Tried to allocate 9000 MiB.)")


def test_the_optimizer_takes_its_memory_before_the_first_step():
    """A step that fails for want of it could not be done again."""
    model = make_model("llama")
    optimizer = make_optimizer(model.trainable(), 1e-3, 1e-8)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in model.trainable())


def test_a_run_whose_memory_ran_out_once_resumes_to_the_same_bits(world, tmp_path, monkeypatch):
    """It need not run out again: other processes come and go."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps, real, record = [], ActorCritic.states, trainer.Trainer._record_samples

    def once(self, tree):
        if steps == [0, 1, 2] and tree.n_tokens > LIMIT:
            steps.append("ran out")
            run_out(tree.n_tokens)
        return real(self, tree)

    def count(self, *arguments):
        steps.append(self.state.step)
        return record(self, *arguments)

    monkeypatch.setattr(ActorCritic, "states", once)
    monkeypatch.setattr(trainer.Trainer, "_record_samples", count)
    world.train(whole, micro_batch_tokens=BUDGET, checkpoint_every=100, ppo__iterations=5)
    assert "ran out" in steps
    steps[:] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_end_step", _stopping(trainer.Trainer._end_step, at=4))
        with pytest.raises(KeyboardInterrupt):
            world.train(broken, micro_batch_tokens=BUDGET, checkpoint_every=100, ppo__iterations=5)
    assert "ran out" in steps
    trainer.resume(broken, {}, quiet_console())
    assert outcome(broken) == outcome(whole)


def _stopping(real, at):
    """`_end_step` that is killed behind step ``at`` of PPO."""

    def end_step(self, *arguments, **options):
        real(self, *arguments, **options)
        if self.state.stage == "ppo" and self.state.step == at:
            raise KeyboardInterrupt

    return end_step
