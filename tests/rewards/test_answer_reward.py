"""The published tables of answers and their rewards, by task and preset."""

import pytest

from fastppo.config import Config, RewardConfig, load_config
from fastppo.errors import UserError
from fastppo.rewards.rules import answer_reward
from fastppo.tasks import TASKS, get_task

PRESETS = {"default": (1.0, -1.0, -2.0), "paper": (1.0, 0.0, -1.0), "code": (1.0, -1.0, -3.0)}
WORDS = sorted(name for name in TASKS if TASKS[name].span is None)
END = "</answer>"


def reward(name, gold, text, template="tagged", **settings):
    task = get_task(name, template)
    return answer_reward(task, gold, task.parse(text), text, RewardConfig(**settings))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", WORDS)
def test_answer_words(name, preset):
    """Right and wrong classes in any case; no tag, no label and several labels are failures."""
    right, wrong, malformed = PRESETS[preset]
    labels = TASKS[name].labels
    for gold in range(len(labels)):
        for said, word in enumerate(labels):
            for text in (word, word.capitalize(), f" {word.upper()}\n"):
                assert reward(name, gold, text + END, preset=preset) == (right if said == gold else wrong)
                assert reward(name, gold, text, "short", preset=preset) == (right if said == gold else wrong)
                assert reward(name, gold, text, preset=preset) == malformed
        first, second = labels[0].capitalize(), labels[1].capitalize()
        for text in (f"{first} and {second}", f"{first} or {second}", *([] if name == "record" else ["Maybe", ""])):
            assert reward(name, gold, text + END, preset=preset) == malformed, text
            assert reward(name, gold, text, "short", preset=preset) == malformed, text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [name for name in WORDS if TASKS[name].labels in (("no", "yes"), ("yes", "no"))])
def test_yes_and_no_is_a_failure(name, preset):
    assert reward(name, 1, "Yes and No" + END, preset=preset) == PRESETS[preset][2]


def test_record_spares_a_closed_answer_without_a_label_with_the_codes_rewards():
    for text, worth in (("perhaps" + END, -1.0), (END, -1.0), ("perhaps", -3.0), ("yes or no" + END, -3.0), ("yes" + END, 1.0)):
        assert reward("record", 1, text, preset="code") == worth, text
    assert reward("record", 1, "perhaps" + END, preset="paper") == -1.0
    assert reward("record", 1, "perhaps" + END) == -2.0
    assert reward("record", 1, "perhaps", "short", preset="code") == -3.0
    assert reward("rte", 1, "perhaps" + END, preset="code") == -3.0
    assert reward("record", 1, "perhaps" + END, preset="code", wrong=-0.5) == -0.5


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize(
    ("said", "gold", "worth"),
    [("5", 5.0, 2.5), ("0", 5.0, -2.5), ("3.2", 4.0, 1.7), ("5", 0.0, -2.5), ("2.5", 2.5, 2.5), ("4.0", 3.2, 1.7)],
)
def test_numbers(preset, said, gold, worth):
    for template, text in (("tagged", said + END), ("short", said)):
        assert reward("stsb", gold, text, template, preset=preset) == pytest.approx(worth, abs=1e-12)


def test_numbers_off_the_scale_are_bounded_but_with_the_codes_rewards():
    assert reward("stsb", 2.5, "50" + END, preset="code") == pytest.approx(2.5 - 47.5)
    assert reward("stsb", 2.5, "50" + END, preset="paper") == reward("stsb", 2.5, "-50" + END, preset="paper") == -2.5
    assert reward("stsb", 2.5, "50" + END) == -1.0


@pytest.mark.parametrize(("preset", "worth"), [("default", -2.0), ("paper", -2.5), ("code", -2.5)])
def test_what_is_no_number(preset, worth):
    for text in ("high" + END, "4.5", END, ""):
        assert reward("stsb", 2.5, text, preset=preset) == worth
    assert reward("stsb", 2.5, "about 4", "short", preset=preset) == worth


def test_numbers_of_the_default_run_from_right_to_wrong():
    values = [reward("stsb", 5.0, f"{said}{END}") for said in (5, 4, 2.5, 0)]
    assert values == pytest.approx([1.0, 0.6, 0.0, -1.0])


def test_single_rewards_replace_those_of_the_preset():
    given = {"preset": "paper", "correct": 4.0, "malformed": -7.0}
    assert [reward("sst2", 1, text + END, **given) for text in ("positive", "negative", "")] == [4.0, 0.0, -7.0]
    assert [reward("stsb", 5.0, text + END, **given) for text in ("5", "0", "x")] == [4.0, -2.5, -7.0]


def test_the_settings_are_those_before_there_were_presets():
    config = Config().reward
    assert [answer_reward(TASKS["cola"], 1, said, "", config) for said in (1, 0, None)] == [1.0, -1.0, -2.0]
    flipped = load_config({"reward.correct": "-1", "reward.wrong": "1"}).reward
    assert [answer_reward(TASKS["cola"], 1, said, "", flipped) for said in (1, 0, None)] == [-1.0, 1.0, -2.0]
    with pytest.raises(UserError, match="^--reward-preset: 'published' is not allowed; expected one of default, paper, code$"):
        load_config({"reward.preset": "published"})
