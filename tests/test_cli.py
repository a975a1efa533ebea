"""The command line: flags, exit codes, one line for each mistake, signals. The engine behind it is a stand-in."""

import os
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

import fastppo
from fastppo import cli
from fastppo.config import SETTINGS, Config
from fastppo.errors import Interrupted, UserError
from fastppo.interrupt import Interruptible

REPO = Path(__file__).resolve().parents[1]


def without_console(args: tuple[Any, ...]) -> list[Any]:
    return [arg for arg in args if not hasattr(arg, "print")]


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple[Any, ...]]:
    """Puts stand-ins in the place of the engine's modules; what was called, without the console. In an empty folder."""
    monkeypatch.chdir(tmp_path)
    made: list[tuple[Any, ...]] = []
    for module, functions in (
        ("trainer", ("train", "resume")),
        ("evaluate", ("evaluate_run",)),
        ("export", ("export_run",)),
        ("predict", ("predict_runs",)),
    ):
        stand_in = types.ModuleType(f"fastppo.{module}")
        for function in functions:
            setattr(stand_in, function, lambda *args, name=function: made.append((name, *without_console(args))))
        monkeypatch.setitem(sys.modules, f"fastppo.{module}", stand_in)
        monkeypatch.setattr(fastppo, module, stand_in, raising=False)
    return made


def a_run(name: str = "r") -> Path:
    run = Path(name)
    run.mkdir()
    (run / "config.yaml").write_text("task: cola\n")
    return run


def test_train_passes_settings_and_a_new_folder(calls):
    flags = (
        "--ppo-lr 2e-3 --trust-remote-code --no-ppo-whiten --value-trunk detached --reward-wrong -1e-1 --sample-stop - "
        "--lora-rank=4 --out r"
    )
    assert cli.main(["train", *flags.split()]) == 0
    [(name, config, run)] = calls
    assert (name, run) == ("train", Path("r"))
    assert (config.ppo.lr, config.trust_remote_code, config.ppo.whiten, config.reward.wrong) == (2e-3, True, False, -0.1)
    assert (config.sample.stop, config.lora.rank, config.value.trunk) == (("-",), 4, "detached")


def test_every_setting_is_a_flag(calls):
    for setting in SETTINGS.values():
        value = setting.default
        if setting.kind is bool:
            argv = [setting.flag if value else setting.flag.replace("--", "--no-", 1)]
        else:
            argv = [setting.flag, "none" if value in (None, ()) else str(value)]
        assert cli.main(["train", *argv]) == 0, argv
        assert calls.pop()[1] == Config()


def test_settings_from_a_file_with_flags_on_top(calls, tmp_path):
    (tmp_path / "a.toml").write_text("seed = 3\n[ppo]\nsamples = 8\n")
    assert cli.main(["train", "--config", "a.toml", "--seed", "4"]) == 0
    config = calls[0][1]
    assert (config.seed, config.ppo.samples) == (4, 8)


def test_default_folder_has_task_and_time_and_is_new_each_time(calls, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    for expected in ("cola-20260102-030405", "cola-20260102-030405-2", "cola-20260102-030405-3"):
        assert cli.main(["train"]) == 0
        run = calls[-1][2]
        assert run == Path("runs", expected)
        run.mkdir(parents=True)
        (run / "config.yaml").touch()


def test_existing_folder_is_an_error_that_suggests_resume(calls, capsys):
    a_run("my run")
    assert cli.main(["train", "--out", "my run"]) == 2
    assert capsys.readouterr().err == (
        "fastppo: error: --out: my run exists and is not empty; choose another folder, "
        "or go on with it: fastppo train --resume 'my run'\n"
    )
    Path("other").mkdir()
    Path("other", "x").touch()
    assert cli.main(["train", "--out", "other"]) == 2
    assert "resume" not in capsys.readouterr().err
    assert calls == []


def test_resume_passes_only_what_was_given(calls):
    run = a_run()
    assert cli.main(["train", "--resume", "r", "--ppo-lr", "1", "--no-ppo-whiten"]) == 0
    assert calls == [("resume", run, {"ppo.lr": "1", "ppo.whiten": "false"})]


def test_eval_and_export(calls):
    run = a_run()
    assert cli.main(["eval", "r"]) == 0
    assert cli.main("eval r --task axb --data d --split train --limit 7".split()) == 0
    assert cli.main("export r --to out --merged".split()) == 0
    assert cli.main("predict r --to d --data e --task ax --fallback random".split()) == 0
    assert cli.main("predict r r --to d".split()) == 0
    assert calls == [
        ("evaluate_run", run, None, "dev", None, None),
        ("evaluate_run", run, "d", "train", 7, "axb"),
        ("export_run", run, Path("out"), True),
        ("predict_runs", [run], Path("d"), "e", "ax", "random"),
        ("predict_runs", [run, run], Path("d"), None, None, None),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "no command is given; expected train, plan, "),
        ("--lora-rank 4 train", "--lora-rank stands before the command; expected fastppo COMMAND --lora-rank;"),
        ("trian", "unknown command trian; did you mean train?; see fastppo --help"),
        ("train --ppo-learning-rate 1", "train: unknown flag --ppo-learning-rate"),
        ("train --lr 1", "train: unknown flag --lr; did you mean --sft-lr or --ppo-lr?"),
        ("train --lora-rnak=1", "train: unknown flag --lora-rnak; did you mean --lora-rank"),
        ("train --value-detach", "train: unknown flag --value-detach; what it did is now --value-trunk detached"),
        ("plan --no-value-adapter", "plan: unknown flag --no-value-adapter; what it did is now --value-trunk own"),
        ("eval x --value-detach", "eval: unknown flag --value-detach"),
        ("train --ppo-l 1", "train: unknown flag --ppo-l; did you mean --ppo-lr"),
        ("train cola", "train: unknown argument cola"),
        ("train --ppo-lr", "argument --ppo-lr: expected one argument"),
        ("train --ppo-lr -x", "--ppo-lr: '-x' is not allowed; expected a finite number above 0"),
        ("train --ppo-whiten=true", "argument --ppo-whiten/--no-ppo-whiten: ignored explicit argument 'true'"),
        ("train --config none.yaml", "settings file none.yaml: cannot be read: No such file or directory"),
        ("train --resume none", "run folder none: no such folder"),
        ("train --resume .", "run folder .: has no config.yaml, so no run began there"),
        ("train --resume r --config a.yaml", "--config: a.yaml is not allowed with --resume"),
        ("train --resume r --out s", "--out: s is not allowed with --resume"),
        ("eval none", "run folder none: no such folder"),
        ("predict r", "the following arguments are required: --to"),
        ("predict --to d", "the following arguments are required: RUN"),
        ("predict none --to d", "run folder none: no such folder"),
        ("predict r r --to d --data e", "--data: e is not allowed with 2 runs; give one at a time with the same --to"),
        ("predict r r --to d --task ax", "--task: ax is not allowed with 2 runs; give one at a time with the same --to"),
        ("predict r --to d --fallback wrong", "argument --fallback: invalid choice: 'wrong'"),
        ("eval r --limit 0", "--limit: '0' is not allowed; expected a whole number, 1 or more"),
        ("eval r --split test", "argument --split: invalid choice: 'test'"),
        ("eval r --lmit 3", "eval: unknown"),
        ("export r", "the following arguments are required: --to"),
        ("doctor --jsn", "doctor: unknown flag --jsn"),
        ("doctor --json=1", "argument --json: ignored explicit argument '1'"),
        ("doctor now", "doctor: unknown argument now"),
        ("export r --to r", "--to: r exists and is not empty; choose another folder"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(calls, capsys, line, expected):
    a_run()
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastppo: error: " + expected)
    assert err.count("\n") == 1 and out == "" and calls == []


def raiser(error: BaseException) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (Interrupted(signal.SIGINT), 130, "SIGINT"),
        (Interrupted(signal.SIGTERM), 143, "SIGTERM"),
        (KeyboardInterrupt(), 130, "SIGINT"),
    ],
)
def test_interrupted_run_says_how_to_go_on(calls, monkeypatch, capsys, error, status, name):
    monkeypatch.setattr(sys.modules["fastppo.trainer"], "train", raiser(error))
    assert cli.main("train --out r".split()) == status
    assert capsys.readouterr().err == f"fastppo: stopped by {name}; nothing was trained yet\n"
    monkeypatch.setattr(sys.modules["fastppo.trainer"], "resume", raiser(error))
    a_run()
    assert cli.main("train --resume r".split()) == status
    assert capsys.readouterr().err == f"fastppo: stopped by {name}; go on with: fastppo train --resume r\n"


def test_message_of_a_mistake_stays_one_clean_line(calls, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["fastppo.trainer"], "train", raiser(UserError("a\nb \x1b[2J [red]")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fastppo: error: a\\nb \\x1b[2J [red]\n"


def test_errors_of_the_program_keep_their_traceback(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["fastppo.trainer"], "train", raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_model_and_data_on_this_disk_are_kept_by_their_whole_path(tmp_path, monkeypatch):
    """So that a run can be resumed, evaluated and exported from any folder; hub names stay as they are."""
    seen = []
    fake = types.SimpleNamespace(train=lambda settings, run, console: seen.append(settings), resume=None)
    monkeypatch.setitem(sys.modules, "fastppo.trainer", fake)
    monkeypatch.setattr(fastppo, "trainer", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").touch()
    assert cli.main(["train", "--model", "model", "--data", "rows.jsonl", "--out", "a"]) == 0
    assert cli.main(["train", "--model", "owner/name", "--data", "owner/set:part", "--out", "b"]) == 0
    assert [(s.model, s.data) for s in seen] == [
        (str(tmp_path / "model"), str(tmp_path / "rows.jsonl")),
        ("owner/name", "owner/set:part"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "model and corpus; for a real one: {} --task cola --model Qwen/Qwen2.5-0.5B --data nyu-mll/glue:cola\n"),
        ("--task sst2 --data d", "model; for a real one: {} --task sst2 --model Qwen/Qwen2.5-0.5B --data nyu-mll/glue:sst2\n"),
        ("--task sst2,cola", "model and corpus; for a real one: {} --task sst2,cola --model Qwen/Qwen2.5-0.5B --data FOLDER\n"),
        ("--task sst2,cola --data /d", "model; for a real one: {} --task sst2,cola --model Qwen/Qwen2.5-0.5B --data /d\n"),
        ("--model m", "corpus; for a real one: "),
        ("--model m --data d", None),
    ],
)
def test_the_built_in_model_and_corpus_are_named_once_at_the_start(calls, capsys, line, said):
    assert cli.main(["train", "--out", "r", *line.split()]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"using the built-in {said.format('fastppo train')}" if said else "loading PyTorch")
    assert out.count("built-in") == bool(said)
    a_run()
    assert cli.main(["train", "--resume", "r"]) == 0
    assert "built-in" not in capsys.readouterr().out


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastppo {fastppo.__version__}\n"
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in SETTINGS.values():
        assert setting.flag in text
    rate = "learning rate; 0.00003 where --model is given (default: 0.001)"
    for part in ("ppo: Proximal policy", rate, "{linear,cosine,constant}"):
        assert part in text


# What follows runs the program itself, in a process of its own.

ENGINE = """
import os, signal, sys, types
import fastppo
from fastppo.interrupt import Interruptible
trainer = types.ModuleType("fastppo.trainer")
def train(config, run, console):
    run.mkdir()
    (run / "config.yaml").touch()
    with Interruptible() as stop:
        {body}
trainer.train = train
sys.modules["fastppo.trainer"] = fastppo.trainer = trainer
from fastppo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def program(tmp_path: Path, body: str, shell: str = '{python} "$0" train --out r') -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(ENGINE.replace("{body}", textwrap.indent(textwrap.dedent(body), " " * 8).strip()))
    return subprocess.run(
        ["bash", "-c", shell.format(python=sys.executable), str(script)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_first_signal_stops_at_the_next_safe_point(tmp_path, name, status):
    body = f"""
        os.kill(os.getpid(), signal.{name})
        (run / "saved").touch()
        stop.check()
        (run / "too far").touch()
    """
    done = program(tmp_path, body)
    assert done.returncode == status
    assert (tmp_path / "r" / "saved").exists() and not (tmp_path / "r" / "too far").exists()
    assert done.stderr == (
        "\nfastppo: finishing this step, then saving; press Ctrl-C again to stop at once\n"
        f"fastppo: stopped by {name}; go on with: fastppo train --resume r\n"
    )


def test_second_signal_stops_at_once(tmp_path):
    body = """
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        (run / "too far").touch()
    """
    done = program(tmp_path, body)
    assert done.returncode == 130 and not (tmp_path / "r" / "too far").exists()
    assert done.stderr.endswith("fastppo: stopped by SIGINT; go on with: fastppo train --resume r\n")


def test_closed_pipe_is_quiet(tmp_path):
    body = """
        for n in range(100000):
            console.print("x" * 1000)
    """
    done = program(tmp_path, body, '{python} "$0" train --out r | head -n 1; exit ${{PIPESTATUS[0]}}')
    assert (done.returncode, done.stderr) == (141, "")


def test_ignored_signals_stay_ignored_and_old_handlers_return():
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    try:
        with Interruptible() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.check()
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGINT) is before
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)
