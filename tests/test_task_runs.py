"""Whole runs of tasks with other answers than CoLA's: numbers, groups, tags, diagnostic sets."""

import json
import random
from dataclasses import replace

import pytest
from engine import make_model, random_prompts
from small import call, kill_at, lines, outcome, ppo_steps, quiet_console

from fastppo.batch.encode import encode_answer
from fastppo.errors import UserError
from fastppo.evaluate import allowed_answers, check_room, encode, evaluate, evaluate_run, with_interval
from fastppo.rollout.sampler import Sampling, generate
from fastppo.tasks import TASKS, Example, get_task
from fastppo.tasks.task import CLOSING

ROOM = {"sample__max_new_tokens": 24, "ppo__iterations": 2, "sft__epochs": 1, "sft__examples": 16}


def words(draw, n=3):
    return " ".join(draw.choice(("cat", "dog", "sees", "sleeps", "she", "they")) for _ in range(n))


def rows_of(name, n, seed):
    """Rows in the task's form, labels by name and in turn."""
    task, draw = TASKS[name], random.Random(seed)
    for i in range(n):
        if name == "stsb":
            yield {"sentence1": words(draw), "sentence2": words(draw), "score": round(draw.uniform(0, 5), 2)}
        elif name == "multirc":
            answers = [{"text": words(draw), "label": k % 2} for k in range(3)]
            yield {"passage": {"text": words(draw, 9), "questions": [{"question": words(draw), "answers": answers}]}}
        elif name == "record":
            passage = {"text": "Ann saw Bob and Cid.", "entities": [{"start": s, "end": s + 2} for s in (0, 8, 16)]}
            query = {"query": f"{words(draw)} @placeholder", "answers": [{"text": "Bob"}]}
            yield {"passage": passage, "qas": [query]}
        elif name == "wsc":
            target = {"span1_text": "Ann", "span2_text": "she", "span2_index": 2}
            yield {"text": f"Ann said she {words(draw)}", "target": target, "label": i % 2 == 0}
        else:
            texts = {slot: draw.choice(task.values[slot]) if slot in task.values else words(draw) for slot in task.slots}
            yield texts | {"label": task.label_names[i % len(task.labels)]}


def write(folder, name, sizes=(40, 12)):
    folder.mkdir(exist_ok=True)
    for split, n, seed in (("train", sizes[0], 1), ("dev", sizes[1], 2)):
        rows = rows_of(name, n, seed)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RUNS = [
    ("stsb", "short", {"reward__preset": "paper"}),
    ("stsb", "tagged", {"reward__preset": "code", "fallback": "random"}),
    ("multirc", "tagged", {}),
    ("record", "short", {}),
    ("mnli", "tagged", {"sample__constrained": True}),
    ("wsc", "short", {"fallback": "random", "reward__preset": "code"}),
    ("cola", "tagged", {"sample__constrained": True}),
]


@pytest.mark.parametrize(("name", "template", "changes"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_run_of_every_kind_of_task(world, tmp_path, name, template, changes):
    data = world.data if name == "cola" else write(tmp_path / "data", name)
    run = tmp_path / "run"
    summary, out = world.train(run, data=data, task=name, template=template, **ROOM, **changes)
    task = TASKS[name]
    assert list(summary["stages"]) == ["zero_shot", "sft", "ppo"]
    shown_as = {"stsb": "Spearman", "multirc": "F1a", "record": "F1", "mnli": "accuracy", "wsc": "accuracy", "cola": "MCC"}
    assert f"{shown_as[name]} [95 % interval]" in out
    for row in summary["stages"].values():
        for metric in task.metrics:
            if not metric.endswith("matched"):
                assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
        assert row["n"] == {"multirc": 36, "record": 36, "cola": 20}.get(name, 12)
    if changes.get("sample__constrained"):
        assert [row["malformed"] for row in summary["stages"].values()] == [0.0] * 3
    for step in ppo_steps(run):
        assert step["sampler_gap"] < 1e-4 and ("accuracy" in step) == (name != "stsb")
        if step["step"] % 2 == 0:
            assert f"valid_{task.metrics[0]}" in step
    samples = lines(run / "samples.jsonl")
    assert all(set(task.slots) == set(row["fields"]) for row in samples)
    row = evaluate_run(run, None, "dev", None, quiet_console())
    assert row == {key: value for key, value in summary["stages"]["ppo"].items() if key != "labels"}


def test_a_run_of_a_tagged_number_task_resumes_to_the_same_bits(world, tmp_path):
    data = write(tmp_path / "data", "stsb")
    settings = {"data": data, "task": "stsb", "template": "tagged", **ROOM}
    whole, _ = world.train(tmp_path / "whole", **settings)
    hook = ("fastppo.trainer", "ppo_iteration", 2)
    code, _, _ = call(world.argv(tmp_path / "cut", **settings), tmp_path / "first", kill_at, *hook)
    assert code == -9
    code, _, err = call(["train", "--resume", str(tmp_path / "cut")], tmp_path / "second")
    assert code == 0, err
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("template", ["short", "tagged"])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_sft_teaches_is_the_answer_word_and_the_end(name, template):
    """Decoded again, the taught tokens are the answer with its closing tag, never a bare label id; and they parse."""
    model, task = make_model("llama"), get_task(name, template)
    tokenizer = model.base.tokenizer
    labels = (0.0, 2.75, 5.0) if task.span else range(len(task.labels))
    example = Example({slot: "The cat sees." for slot in task.slots}, None, "")
    prompt = list(tokenizer(task.prompt(example))["input_ids"])
    for label in labels:
        tokens = encode_answer(tokenizer, task.prompt(example), prompt, task.answer(label))
        assert tokens[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(tokens[:-1])
        assert text == task.answer(label) and text.endswith(task.closing)
        assert task.parse(text) == (round(label, 1) if task.span else label)


def test_the_closing_tag_ends_an_answer_and_stays_in_it():
    model = make_model("llama")
    prompts = random_prompts(0, 6)
    free = generate(model, prompts, 2, Sampling(max_new_tokens=12), seed=0)
    text = model.base.tokenizer.decode(free.samples[3].tokens)
    tag = text[2:6]
    closed = generate(model, prompts, 2, Sampling(max_new_tokens=12, closing=tag), seed=0)
    assert closed.samples[3].finish == "stop" and closed.samples[3].text == text[: text.index(tag) + len(tag)]
    assert len(closed.samples[3].tokens) < len(free.samples[3].tokens)
    both = generate(model, prompts, 2, Sampling(max_new_tokens=12, closing=tag, stop=(text[1:3],)), seed=0)
    assert both.samples[3].text == text[: text.index(text[1:3])]  # what comes first counts
    for a, b in zip(free.samples, closed.samples, strict=True):
        assert b.tokens == a.tokens[: len(b.tokens)]


def test_sampling_ends_at_the_tag_of_tagged_prompts_alone():
    tagged = make_model("llama", template="tagged").config
    assert Sampling.of(tagged).closing == Sampling.greedy(tagged).closing == CLOSING
    assert Sampling.of(make_model("llama").config).closing == ""


def test_numbers_cannot_be_constrained():
    model, task = make_model("llama", sample__constrained=True, sample__max_new_tokens=9), get_task("stsb")
    data = encode(model, task, [Example({"sentence1": "a", "sentence2": "b"}, 2.0, "x:1")])
    with pytest.raises(UserError, match="^--sample-constrained: answers to task stsb are numbers, not one of a few words"):
        allowed_answers(model, data)


def test_too_few_tokens_for_an_answer_is_an_error():
    model, task = make_model("llama", template="tagged", sample__max_new_tokens=4), get_task("rte", "tagged")
    data = encode(model, task, [Example({"premise": "a", "hypothesis": "b"}, label, "x:1") for label in (0, 1)])
    with pytest.raises(UserError, match=r"^--sample-max-new-tokens: 4 is too few for .* task rte; .* least \d+$") as error:
        check_room(model, data)
    needed = int(str(error.value).split()[-1])
    for given, fits in ((needed - 1, False), (needed, True)):
        model = make_model("llama", template="tagged", sample__max_new_tokens=given)
        if fits:
            check_room(model, data)
        else:
            with pytest.raises(UserError):
                check_room(model, data)


def test_unparsable_answers_are_wrong_or_guessed_and_always_counted():
    """A random model says nothing that parses: wrong by default; evenly right with the fallback, seeded."""
    task = get_task("cb", "tagged")
    examples = [Example({"premise": f"{i}", "hypothesis": "b"}, i % 3, f"x:{i}") for i in range(60)]
    found = {}
    for fallback in ("wrong", "random"):
        model = make_model("llama", template="tagged", fallback=fallback, sample__max_new_tokens=4)
        data = encode(model, task, examples)
        found[fallback] = evaluate(model, data)
        again = evaluate(model, data)
        assert again == found[fallback]
        row = with_interval(found[fallback], 0)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] and row["malformed"] == 1.0
    (wrong,), (guessed,) = found["wrong"], found["random"]
    assert wrong.predicted == guessed.predicted == [None] * 60 and wrong.reward == guessed.reward == -2.0
    assert wrong.scores["accuracy"] == 0.0 and 0.15 < guessed.scores["accuracy"] < 0.55
    assert wrong.scores["malformed"] == guessed.scores["malformed"] == 1.0


def test_a_diagnostic_set_judges_a_run_of_another_task(world, tmp_path):
    write(tmp_path / "data", "rte")
    run = tmp_path / "run"
    world.train(run, data=tmp_path / "data", task="rte", **ROOM | {"ppo__iterations": 0})
    for name in ("axb", "axg"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"premise": f"The {i} said she left.", "hypothesis": "b", "label": "entailment"} for i in range(8)]
        rows += [row | {"premise": row["premise"].replace("she", "he"), "label": "not_entailment"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        row = evaluate_run(run, str(path), "dev", None, quiet_console(), name)
        assert row["n"] == 16 and {"axb": "mcc", "axg": "parity"}[name] in row
        with pytest.raises(UserError, match="^--split train: task ax[bg] has no train split$"):
            evaluate_run(run, str(path), "train", None, quiet_console(), name)
    with pytest.raises(UserError, match="^--task axb: is not the run's task rte; give its data with --data$"):
        evaluate_run(run, None, "dev", None, quiet_console(), "axb")
    code, _, err = call(["train", "--task", "axb", "--data", str(path)], tmp_path)
    assert code == 2 and err.startswith("fastppo: error: task axb is a diagnostic set without a train split: train on rte")
    code, out, err = call(["eval", str(run), "--task", "axg", "--data", str(path)], tmp_path)
    assert code == 0 and "gender parity 0" in out and "no gender parity" not in out, err
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    code, out, err = call(["eval", str(run), "--task", "axg", "--data", str(path)], tmp_path)
    assert code == 0 and "no gender parity: no two of these examples differ in the gender of a pronoun alone\n" in out, err
    assert "gender parity 0" not in out and "accuracy" in out and "n 8" in out


def test_examples_keep_their_group_in_evaluation():
    """The questions of MultiRC are scored as wholes in a run, too."""
    task = get_task("multirc")
    model = make_model("llama", sample__constrained=True, sample__max_new_tokens=12)
    fields = [{"passage": "a", "question": f"{i // 4}", "candidate": f"{i}"} for i in range(16)]
    examples = [Example(fields[i], i % 2, f"x:{i}", f"q{i // 4}") for i in range(16)]
    data = encode(model, task, examples)
    (found,) = evaluate(model, data)
    scores, said = found.scores, found.predicted
    whole = [all(said[i] == i % 2 for i in range(q, q + 4)) for q in range(0, 16, 4)]
    assert scores["em"] == sum(whole) / 4
    alone = [replace(example, group=example.origin) for example in examples]
    assert task.score(alone, said)["em"] == scores["accuracy"]
