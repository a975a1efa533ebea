"""The command line: `fastppo train | plan | study | eval | predict | ..`. Nothing heavy comes before a command runs."""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastppo import __version__, config, files
from fastppo.errors import Interrupted, UserError, is_out_of_memory, printable

if TYPE_CHECKING:
    from fastppo.tasks import Task

EXIT_USER_ERROR = 2
CONFIG_HELP = f"settings in a YAML or TOML file, or the name of a preset: {', '.join(config.PRESETS)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """The whole command line's parser, and those of the commands that take settings."""
    parser = _Parser(prog="fastppo", description="PPO and LoRA for language models on one GPU.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastppo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a model on a task",
        description="Supervised warm start, then PPO. Settings come from defaults, then --config, then flags.",
        usage="fastppo train [--config FILE] [--SETTING VALUE ...] | --resume RUN",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", type=Path, help=CONFIG_HELP)
    train.add_argument(
        "--resume", metavar="RUN", type=Path, help="go on with an interrupted run, with its own settings"
    )
    _add_settings(train)

    plan = commands.add_parser(
        "plan",
        help="say what memory a run will take, before any weight is loaded",
        description="Takes the settings of train. The exit status is 1 where the run does not fit.",
        usage="fastppo plan [--gpu NAME] [--json] [--config FILE] [--SETTING VALUE ...]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
    )
    plan.add_argument("--gpu", metavar="NAME", help="a GPU that need not be here: a100-40, h100-80 and others, or 24GiB")
    plan.add_argument("--json", action="store_true", help="the same as one JSON object")
    plan.add_argument("--config", metavar="FILE", type=Path, help=CONFIG_HELP)
    _add_settings(plan)

    study = commands.add_parser(
        "study",
        help="compare methods on several tasks",
        description="A table of tasks and methods, with intervals over seeds. Settings are those of train.",
        usage="fastppo study --tasks A,B [--methods M,N] [--seeds 0,1] [--config FILE] [--SETTING VALUE ...] | --resume STUDY",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        allow_abbrev=False,
    )
    study.add_argument("--tasks", metavar="A,B", help="tasks or their files, separated by commas")
    study.add_argument(
        "--methods", metavar="M,N",
        help="zero-shot, few-shot, sft, ppo, encoder; for all tasks at once: sft-multi, ppo-multi (default: zero-shot,sft,ppo)",
    )  # fmt: skip
    study.add_argument("--seeds", metavar="N,N", help="seeds (default: 0)")
    study.add_argument("--config", metavar="FILE", type=Path, help="a study in a YAML file, or a preset; flags come after it")
    study.add_argument("--resume", metavar="STUDY", type=Path, help="go on with an interrupted study; finished cells stay")
    study.add_argument("--shots", metavar="N", help="solved examples in front of a few-shot question (default: 5)")
    study.add_argument("--demonstrations", metavar="{random,first}", help="which examples these are (default: random)")
    study.add_argument("--encoder", metavar="MODEL", help="folder or hub name of the encoder")
    study.add_argument("--encoder-lr", metavar="X", help="its learning rate (default: 2e-5)")
    study.add_argument("--encoder-epochs", metavar="N", help="its passes over the train split (default: 3)")
    study.add_argument(
        "--data", metavar="DIR", default=argparse.SUPPRESS,
        help="a folder that has one for each task, named like it (none: the built-in corpus for cola, else the hub)",
    )  # fmt: skip
    study.add_argument("--out", metavar="DIR", default=argparse.SUPPRESS, help="study folder to make (none: studies/TIME)")
    _add_settings(study, leave_out=("task", "seed", "data", "out"))

    evaluate = commands.add_parser("eval", help="evaluate a run's adapter", allow_abbrev=False)
    evaluate.add_argument("run", metavar="RUN", type=Path, help="run folder")
    evaluate.add_argument("--data", metavar="D", help="data folder, file or hub name, as in train (default: the run's)")
    evaluate.add_argument(
        "--task", metavar="T", help="one of several tasks, or another than the run's, or its file, with its --data"
    )
    evaluate.add_argument("--split", choices=("dev", "train"), default="dev", help="(default: dev)")
    evaluate.add_argument("--limit", metavar="N", help="use only the first N examples of each task")

    predict = commands.add_parser(
        "predict",
        help="answer unlabelled test splits, for the servers of GLUE and SuperGLUE",
        description="Writes the file of each test split and submission.zip. The folder may hold files of other runs already.",
        allow_abbrev=False,
    )
    predict.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folders")
    predict.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder for the files of one server")
    predict.add_argument("--data", metavar="D", help="folder with a test file, that file, or hub name (default: the run's)")
    predict.add_argument("--task", metavar="T", help="some of the run's tasks, or others, with their --data: a diagnostic set")
    predict.add_argument(
        "--fallback", choices=("first", "random"),
        help="what is written for an answer that is none and names no label: the first label, or a random one "
        "(default: random in runs with --fallback random, else first)",
    )  # fmt: skip

    report = commands.add_parser(
        "report", help="write a run's or study's report.html, finished or not", allow_abbrev=False
    )
    report.add_argument("run", metavar="RUN", type=Path, help="folder of a run or study")
    report.add_argument("--to", metavar="FILE", type=Path, help="where to write it (default: report.html in that folder)")

    export = commands.add_parser("export", help="write a run's adapter, or a merged model", allow_abbrev=False)
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder to make")
    export.add_argument("--merged", action="store_true", help="the whole model with the adapter merged in")

    doctor = commands.add_parser(
        "doctor", help="say what of this machine training can use, and why not the rest", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="the same facts as one JSON object")
    return parser, {"train": train, "plan": plan, "study": study}


def _add_settings(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    groups = {"": parser.add_argument_group("run")}
    for section, cls in config.SECTIONS.items():
        groups[section] = parser.add_argument_group(section, (cls.__doc__ or "").strip())
    for setting in config.SETTINGS.values():
        if setting.key not in leave_out:
            _add_flag(groups[setting.section], setting)


def _add_flag(group: Any, setting: config.Setting) -> None:
    shown = setting.default if setting.default != () else "none"
    options: dict[str, Any] = {"dest": setting.key, "default": argparse.SUPPRESS}
    if setting.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        shown = "on" if setting.default else "off"
    else:
        choices = "{" + ",".join(setting.rule.choices) + "}" if setting.rule.choices else None
        options["metavar"] = choices or {int: "N", float: "X", str: "TEXT", tuple: "TEXT"}[setting.kind]
    text = setting.rule.help if setting.default is None else f"{setting.rule.help} (default: {shown})"
    group.add_argument(setting.flag, help=text.replace("%", "%%"), **options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, with_settings = _parser()
    if not argv:
        raise UserError(f"no command is given; expected {', '.join(COMMANDS)}; see fastppo --help")
    if argv[0][:1] == "-" and argv[0] not in ("-h", "--help", "--version"):
        raise UserError(f"{argv[0]} stands before the command; expected fastppo COMMAND {argv[0]}; see fastppo --help")
    if argv[0][:1] != "-" and argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]}{config.suggest(argv[0], list(COMMANDS))}; see fastppo --help")
    taking = with_settings.get(argv[0], with_settings["train"])
    flags = {flag: action for action in taking._actions for flag in action.option_strings}
    joined: list[str] = []
    for word in argv:
        # argparse takes a value such as -1e-3 or -inf for a flag; --flag=-inf it understands.
        last = joined[-1] if joined else ""
        if last in flags and flags[last].nargs is None and word[:1] == "-" and word[:2] != "--":
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    args, unknown = parser.parse_known_args(joined)
    if unknown:
        flag = unknown[0].split("=")[0]
        what = "flag" if flag.startswith("-") else "argument"
        known = list(flags) if args.command in with_settings else []
        raise UserError(f"{args.command}: unknown {what} {flag}{config.suggest(flag, known)}")
    return args


def _console() -> Any:
    from fastppo.track import Console

    return Console()


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {key: value for key, value in vars(args).items() if key in config.SETTINGS}
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in given.items()}


def _train(args: argparse.Namespace) -> None:
    overrides = _overrides(args)
    if args.resume:
        overrides |= {key: files.whole_path(overrides[key]) for key in ("model", "data") if key in overrides}
        if "task" in overrides:
            from fastppo.tasks.own import whole_name

            overrides["task"] = whole_name(overrides["task"])
        for flag, wrong in (("--config", args.config), ("--out", overrides.get("out"))):
            if wrong:
                raise UserError(f"{flag}: {wrong} is not allowed with --resume; the run folder holds its settings")
        run = _existing(args.resume)
    else:
        settings = _anchored(config.load_config(overrides, args.config))
        from fastppo.tasks import get_tasks

        tasks = get_tasks(settings.task, settings.template, to_train=True)  # a wrong name is known before seconds of imports
        run = _new_run(settings, "+".join(task.name for task in tasks))
    console = _console()
    if not args.resume:
        _say_built_in(settings, tasks, console)
    console.print("loading PyTorch and transformers")  # seconds, in which nothing else would be seen
    try:
        import torch

        from fastppo import allocator, trainer

        if not torch.cuda.is_available():
            allocator.keep_freed_memory()
        if args.resume:
            trainer.resume(run, overrides, console)
        else:
            trainer.train(settings, run, console)
    except (Interrupted, KeyboardInterrupt) as stop:
        began = (run / "config.yaml").exists()
        signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        raise Interrupted(signum, f"go on with: {_resume(run)}" if began else "nothing was trained yet") from None


def _say_built_in(settings: config.Config, tasks: "Sequence[Task]", console: Any) -> None:
    """What of fastppo's own is used, and the command for a real model."""
    from fastppo.tasks.task import BUILT_IN

    corpus = settings.data is None and any(task.data == BUILT_IN for task in tasks)
    builtin = [what for what, used in (("model", settings.model is None), ("corpus", corpus)) if used]
    if not builtin:
        return
    hub = tasks[0].hub
    data = settings.data or "FOLDER" if len(tasks) > 1 else ":".join(hub) if hub else settings.data
    on = "" if data is None else f" --data {shlex.quote(data)}"
    real = f"fastppo train --task {shlex.quote(settings.task)} --model Qwen/Qwen2.5-0.5B{on}"
    said = f"using the built-in {' and '.join(builtin)}; for a real one: {real}"
    console.print(printable(said), markup=False, soft_wrap=True)


def _resume(run: Path) -> str:
    return f"fastppo train --resume {shlex.quote(str(run))}"


def _anchored(settings: config.Config) -> config.Config:
    """Model, data and a task's file that are on this disk by their whole path, so that the run can be used from any folder."""
    from fastppo.tasks.own import whole_name

    model, data = files.whole_path(settings.model), files.whole_path(settings.data)
    return dataclasses.replace(settings, model=model, data=data, task=whole_name(settings.task))


def _new_run(settings: config.Config, tasks: str) -> Path:
    if settings.out:
        run = Path(settings.out)
        if not files.is_unused(run):
            go_on = f", or go on with it: {_resume(run)}" if (run / "config.yaml").exists() else ""
            raise UserError(f"--out: {run} exists and is not empty; choose another folder{go_on}")
        return run
    return files.unused(Path("runs", f"{tasks}-{time.strftime('%Y%m%d-%H%M%S')}"))


def _existing(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        why = "has no config.yaml, so no run began there" if run.exists() else "no such folder"
        if (run / "study.yaml").is_file():
            go_on = f"fastppo study --resume {shlex.quote(str(run))}"
            why = f"is a study, whose runs are its folders cells/TASK/METHOD/seed-N; go on with it: {go_on}"
        raise UserError(f"run folder {run}: {why}")
    return run


def _eval(args: argparse.Namespace) -> None:
    run = _existing(args.run)
    limit = None
    if args.limit is not None:
        if not (args.limit.isascii() and args.limit.isdigit() and int(args.limit) > 0):
            raise UserError(f"--limit: {args.limit!r} is not allowed; expected a whole number, 1 or more")
        limit = int(args.limit)
    from fastppo import evaluate

    evaluate.evaluate_run(run, args.data, args.split, limit, _console(), args.task)


def _predict(args: argparse.Namespace) -> None:
    runs = [_existing(run) for run in args.runs]
    for flag, given in (("--data", args.data), ("--task", args.task)):
        if given is not None and len(runs) > 1:
            raise UserError(f"{flag}: {given} is not allowed with {len(runs)} runs; give one at a time with the same --to")
    from fastppo import predict

    predict.predict_runs(runs, args.to, args.data, args.task, args.fallback, _console())


def _report(args: argparse.Namespace) -> None:
    study = (args.run / "study.yaml").is_file()
    folder = args.run if study else _existing(args.run)
    if args.to is not None and args.to.suffix != ".html":  # no other file is ever written over
        raise UserError(f"--to: {args.to} is not allowed; expected a name that ends in .html")
    from fastppo import report

    to = args.to or folder / report.NAME
    if study:
        from fastppo.study import command

        notes = command.report(folder, to)
    else:
        notes = report.write_report(folder, to)
    for line in (f"wrote {to}", *notes):
        _console().print(printable(line), markup=False, soft_wrap=True)


def _export(args: argparse.Namespace) -> None:
    run = _existing(args.run)
    if not files.is_unused(args.to):
        raise UserError(f"--to: {args.to} exists and is not empty; choose another folder")
    from fastppo import export

    export.export_run(run, args.to, args.merged, _console())


def _plan(args: argparse.Namespace) -> int:
    settings = config.load_config(_overrides(args), args.config)
    from fastppo import plan

    return plan.plan(settings, args.gpu, None if args.json else _console())


def _study(args: argparse.Namespace) -> int:
    from fastppo.study import command

    overrides = _overrides(args)
    own = {name: getattr(args, name) for name in command.FLAGS if getattr(args, name) is not None}
    if args.resume:
        given = [*own, *overrides, *(["config"] if args.config else [])]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: is not allowed with --resume; the study's folder says it")
        return command.resume(args.resume, _console())
    out = overrides.pop("out", None)
    return command.begin(own, overrides, args.config, out, _console())


def _doctor(args: argparse.Namespace) -> int:
    from fastppo import doctor

    return doctor.doctor(None if args.json else _console())


# What a command returns is the exit code, None for 0.
COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": _train, "plan": _plan, "study": _study, "eval": _eval, "predict": _predict, "report": _report,
    "export": _export, "doctor": _doctor,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: the command's, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    status = 0
    try:
        try:
            args = _parse(sys.argv[1:] if argv is None else argv)
            status = COMMANDS[args.command](args) or 0
        except SystemExit as done:  # --help and --version
            if done.code:
                raise
        sys.stdout.flush()
    except UserError as error:
        return _say(f"error: {error}", EXIT_USER_ERROR)
    except Interrupted as stop:
        return _say(str(stop), 128 + stop.signum)
    except KeyboardInterrupt:
        return _say("stopped by SIGINT", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader left (`| head`). Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = " ".join(str(error).split())[:240]
        return _say(f"error: out of memory ({first}); fastppo plan says what a run takes", EXIT_USER_ERROR)
    return status


def _say(line: str, status: int) -> int:
    print(f"fastppo: {printable(line)}", file=sys.stderr)
    return status
