"""Progress and records of a run."""

import io
import json
import re

import pytest

from fastppo.errors import UserError, printable
from fastppo.files import read_json_lines
from fastppo.track import Console, Tracker

NASTY = "[bold red]x[/] \x1b[2J\x07\r\n\u202e y\x9b"


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, legacy_windows=False)


def shown(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_printable_keeps_text_and_escapes_control_characters():
    assert printable("é 猫 🙂 [x]") == "é 猫 🙂 [x]"
    assert printable(NASTY) == "[bold red]x[/] \\x1b[2J\\x07\\r\\n\\u202e y\\x9b"


def test_records_hold_every_step_in_order(tmp_path):
    with Tracker(tmp_path, console()) as track:
        track.stage("sft", 2)
        track.step(1, {"loss": 0.5})
        track.step(2, {"loss": float("nan")})
        track.stage("ppo", 1)
        track.step(1, {"reward": 1.0, "kl": 0.0})
        track.samples([{"text": NASTY, "reward": -2.0}])
    assert read_json_lines(tmp_path / "metrics.jsonl") == [
        {"stage": "sft", "step": 1, "loss": 0.5},
        {"stage": "sft", "step": 2, "loss": None},
        {"stage": "ppo", "step": 1, "reward": 1.0, "kl": 0.0},
    ]
    assert read_json_lines(tmp_path / "samples.jsonl") == [{"text": NASTY, "reward": -2.0}]


def test_resumed_records_equal_unbroken_ones(tmp_path):
    def steps(track: Tracker, first: int, last: int) -> None:
        for n in range(first, last + 1):
            track.step(n, {"loss": 1 / n})
            track.samples([{"n": n}])

    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    with Tracker(tmp_path / "unbroken", console()) as track:
        track.stage("ppo", 6)
        steps(track, 1, 6)
    with Tracker(tmp_path / "broken", console()) as track:
        track.stage("ppo", 6)
        steps(track, 1, 3)
        state = json.loads(json.dumps(track.state()))
        steps(track, 4, 5)
    with Tracker(tmp_path / "broken", console()) as track:
        track.restore(state)
        track.stage("ppo", 6, done=3)
        steps(track, 4, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_restore_refuses_records_that_are_too_short(tmp_path):
    with Tracker(tmp_path, console()) as track, pytest.raises(UserError, match=r"metrics\.jsonl: has 0 lines"):
        track.restore({"metrics": 1, "samples": 0})


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = console()
    with Tracker(tmp_path, out) as track:
        track.stage("ppo", 100)
        for n in range(1, 101):
            track.step(n, {"loss": 0.5, "reward": 0.25, "kl": 0.125, "accuracy": 0.75, "samples_per_s": 31.4, "x": 1})
        track.note("saved " + NASTY)
    lines = shown(out).splitlines()
    assert len(lines) == 21
    assert re.fullmatch(
        r"ppo 5/100  loss 0\.5000  reward \+0\.250  KL 0\.1250  accuracy 0\.750  31 samples/s  ETA \d+:\d\d", lines[0]
    )
    assert lines[19].startswith("ppo 100/100  ") and "ETA" not in lines[19]
    assert lines[20] == "saved " + printable(NASTY)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown(out))


def test_long_plain_lines_are_not_broken(tmp_path):
    out = console()
    with Tracker(tmp_path, out) as track:
        track.note("word " * 100)
    assert len(shown(out).splitlines()) == 1


def test_progress_on_a_terminal_escapes_what_others_wrote(tmp_path):
    out = console(terminal=True)
    with Tracker(tmp_path, out) as track:
        track.stage("ppo [red]", 3)
        track.step(1, {"reward": 0.5})
        track.note(NASTY)
        track.step(3, {"reward": 0.5})
        track.stage("next", 1)
    text = shown(out)
    assert "3/3" in text and "reward +0.500" in text and "next" in text and "ppo [red]" in text
    assert printable(NASTY) in text and "\x1b[2J" not in text and "\u202e" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_terminal_is_left_in_order_after_an_error(tmp_path):
    out = console(terminal=True)
    with pytest.raises(RuntimeError), Tracker(tmp_path, out) as track:
        track.stage("ppo", 3)
        raise RuntimeError
    assert shown(out).rindex("\x1b[?25h") > shown(out).rindex("\x1b[?25l")


def stage_row(mcc: float, labels: int) -> dict[str, float]:
    return {
        "mcc": mcc, "mcc_low": mcc - 0.1, "mcc_high": mcc + 0.1, "accuracy": 0.5, "malformed": 0.25, "n": 10,
        "labels": labels,
    }  # fmt: skip


def test_table_has_a_row_for_each_stage_that_ran(tmp_path):
    out = console()
    with Tracker(tmp_path, out) as track:
        track.table({"stages": {"ppo": stage_row(0.5, 12000), "zero_shot": stage_row(0.0, 0)}})
    rows = [re.sub(r"[^\w.,%\[\] -]", "", line).split() for line in shown(out).splitlines()]
    assert ["stage", "MCC", "[95", "%", "interval]", "accuracy", "malformed", "labels", "seen"] in rows
    assert ["zero-shot", "0.000", "[-0.100,", "0.100]", "50.0%", "25.0%", "0"] in rows
    assert ["after", "PPO", "0.500", "[0.400,", "0.600]", "50.0%", "25.0%", "12,000"] in rows
    assert not any("SFT" in row for row in rows)


def test_table_of_a_task_with_two_metrics_fits_80_columns(tmp_path):
    out = Console(file=io.StringIO(), width=80)
    row = {"macro_f1": 0.5, "accuracy": 0.75, "malformed": 0.25, "macro_f1_low": 0.4, "macro_f1_high": 0.6, "labels": 9}
    number = {"spearman": 0.5, "pearson": 0.25, "malformed": 0, "spearman_low": 0.4, "spearman_high": 0.6, "labels": 9}
    with Tracker(tmp_path, out) as track:
        track.table({"stages": {"ppo": row | {"accuracy_low": 0.7, "accuracy_high": 0.8}}})
        track.table({"stages": {"ppo": number | {"pearson_low": 0.0, "pearson_high": 0.5}}})
    rows = [re.sub(r"[^\w.,%\[\] -]", "", line).split() for line in shown(out).splitlines()]
    assert ["stage", "macro", "F1", "[95", "%", "interval]", "accuracy", "malformed", "labels", "seen"] in rows
    assert ["after", "PPO", "0.500", "[0.400,", "0.600]", "75.0%", "25.0%", "9"] in rows
    assert ["stage", "Spearman", "[95", "%", "interval]", "Pearson", "malformed", "labels", "seen"] in rows
    assert ["after", "PPO", "0.500", "[0.400,", "0.600]", "0.250", "0.0%", "9"] in rows
