"""A run that ends at any instant, by any signal, goes on to the bits of the unbroken one."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small import (
    REPO,
    call,
    kill_after,
    kill_at,
    leftovers,
    lines,
    outcome,
    ppo_steps,
    signal_twice,
    start,
    write_rows,
)
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    code, _, err = call(world.argv(folder / "run"), folder)
    assert (code, err) == (0, ""), err
    return folder / "run"


def resume(run, folder, *more: str, hook=None, args=()):
    return call(["train", "--resume", str(run), *more], folder, hook, *args)


def assert_goes_on(run, folder, unbroken):
    code, _, err = resume(run, folder)
    assert (code, err) == (0, "")
    assert outcome(run) == outcome(unbroken)
    assert leftovers(run) == []


MOMENTS = {
    "before anything is evaluated": ("fastppo.trainer", "evaluate", 1),
    "in SFT, before its first checkpoint": ("fastppo.trainer", "sft_step", 2),
    "in SFT": ("fastppo.trainer", "sft_step", 5),
    "in the evaluation after SFT": ("fastppo.evaluate", "answer_reward", 30),
    "while sampling": ("fastppo.trainer", "generate", 2),
    "in the middle of PPO": ("fastppo.algorithms.ppo", "update", 3),
    "in a validation": ("fastppo.trainer", "evaluate", 4),
    "before a PPO checkpoint": ("fastppo.checkpoint", "save_checkpoint", 7),
    "before the last adapter": ("fastppo.checkpoint", "save_adapter", 2),
    "before the set-up is in place": ("fastppo.files", "write_json", 1),
    "before the answers of a stage are in place": ("os", "replace", 3),
    "between a stage's answers and its checkpoint": ("fastppo.checkpoint", "save_checkpoint", 1),
    "before the summary": ("fastppo.files", "write_json", 2),
    "before the report": ("fastppo.report.run", "read_records", 1),
    "in the first checkpoint, before its first file": ("fastppo.checkpoint", "save_file", 1),
    "in a checkpoint, before its last file": ("fastppo.checkpoint", "save_file", 12),
    "in the last checkpoint": ("fastppo.checkpoint", "save_file", 26),
    "before a checkpoint takes its place": ("os", "rename", 3),
    "between the two renames that replace the adapter": ("os", "rename", 8),
    "before the settings are in place": ("os", "replace", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(world, tmp_path, unbroken, moment):
    run = tmp_path / "run"
    code, _, _ = call(world.argv(run), tmp_path, kill_at, *MOMENTS[moment])
    assert code == -signal.SIGKILL
    if moment == "before the settings are in place":  # nothing began: the same command begins it
        assert not (run / "config.yaml").exists() and leftovers(run)
        assert call(world.argv(run), tmp_path)[0] == 0
        assert outcome(run) == outcome(unbroken) and leftovers(run) == []
    else:
        assert_goes_on(run, tmp_path, unbroken)


@pytest.mark.parametrize("place", [("fastppo.checkpoint", "save_checkpoint", 5), ("fastppo.algorithms.ppo", "update", 2)])
def test_killed_right_after(world, tmp_path, unbroken, place):
    run = tmp_path / "run"
    assert call(world.argv(run), tmp_path, kill_after, *place)[0] == -signal.SIGKILL
    assert_goes_on(run, tmp_path, unbroken)


def test_the_moment_between_two_renames_is_met(world, tmp_path):
    """The adapter of SFT is out of the way and that of PPO not yet in its place."""
    run = tmp_path / "run"
    call(world.argv(run), tmp_path, kill_at, *MOMENTS["between the two renames that replace the adapter"])
    assert not (run / "adapter").exists() and (run / ".adapter.old").exists()


def test_killed_again_and_again(world, tmp_path, unbroken):
    run = tmp_path / "run"
    assert call(world.argv(run), tmp_path, kill_at, "fastppo.trainer", "sft_step", 4)[0] == -signal.SIGKILL
    for place in (
        ("fastppo.trainer", "sft_step", 1),
        ("fastppo.trainer", "Trainer.restore", 1),
        ("fastppo.track", "Tracker.restore", 1),
        ("fastppo.trainer", "generate", 1),
        ("fastppo.trainer", "generate", 2),
        ("fastppo.checkpoint", "save_checkpoint", 1),
        ("fastppo.checkpoint", "save_adapter", 1),
    ):
        assert resume(run, tmp_path, hook=kill_at, args=place)[0] == -signal.SIGKILL, place
    assert_goes_on(run, tmp_path, unbroken)


@pytest.mark.parametrize(
    "more",
    [{}, {"ppo__optimizer": "adafactor", "sample__max_new_tokens_from": 3, "sample__max_new_tokens": 6}],
    ids=["AdamW", "Adafactor and random lengths"],
)
def test_killed_with_an_own_value_adapter_warm_up_and_adaptive_kl(world, tmp_path, more):
    """What else a checkpoint must hold: two adapters, a critic ahead of the policy, a coefficient that moves."""
    changes = {"value__trunk": "own", "value__warmup": 2, "ppo__kl_target": 0.01, **more}
    assert call(world.argv(tmp_path / "a", **changes), tmp_path)[0] == 0
    run = tmp_path / "b"
    for argv, count in ((world.argv(run, **changes), 2), (["train", "--resume", str(run)], 3)):
        assert call(argv, tmp_path, kill_at, "fastppo.algorithms.ppo", "update", count)[0] == -signal.SIGKILL
    assert_goes_on(run, tmp_path, tmp_path / "a")


def test_killed_padded(world, tmp_path):
    model = save_tiny_model("mpt", tmp_path / "model")
    assert call(world.argv(tmp_path / "a", model=model), tmp_path)[0] == 0
    run = tmp_path / "b"
    place = ("fastppo.algorithms.ppo", "update", 4)
    assert call(world.argv(run, model=model), tmp_path, kill_at, *place)[0] == -signal.SIGKILL
    assert_goes_on(run, tmp_path, tmp_path / "a")


def test_a_plain_process_killed_from_outside(world, tmp_path, unbroken):
    """The program as a user starts it, and ``kill -9`` from outside as soon as some steps are recorded."""
    run = tmp_path / "run"
    path = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "fastppo", *world.argv(run)], env=env, stdout=subprocess.DEVNULL)
    wait_for_lines(run / "metrics.jsonl", 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert_goes_on(run, tmp_path, unbroken)


def wait_for_lines(path, n):
    end = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= n):
        assert time.monotonic() < end, f"no {n} lines in {path}"
        time.sleep(0.001)


# -- signals that ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", [("fastppo.trainer", "sft_step", 3), ("fastppo.algorithms.ppo", "update", 3)])
def test_stopped_between_checkpoints_loses_no_step(world, tmp_path, unbroken, signum, status, place):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run), tmp_path, kill_at, *place, signum)
    assert code == status
    assert err == (
        "\nfastppo: finishing this step, then saving; press Ctrl-C again to stop at once\n"
        f"fastppo: stopped by {signal.Signals(signum).name}; go on with: fastppo train --resume {run}\n"
    )
    before = lines(run / "metrics.jsonl")
    assert before[-1]["step"] == 3
    code, _, err = resume(run, tmp_path)
    assert (code, err) == (0, "") and outcome(run) == outcome(unbroken)
    assert lines(run / "metrics.jsonl")[: len(before)] == before  # nothing was done twice, timings included


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stopped_while_evaluating(world, tmp_path, unbroken, count):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run), tmp_path, kill_at, "fastppo.trainer", "evaluate", count, signal.SIGINT)
    assert code == 130 and "--resume" in err
    assert_goes_on(run, tmp_path, unbroken)


def test_second_signal_stops_at_once(world, tmp_path, unbroken):
    run = tmp_path / "run"
    place = ("fastppo.algorithms.ppo", "update", 3)
    code, _, err = call(world.argv(run), tmp_path, signal_twice, *place, signal.SIGTERM, signal.SIGINT)
    assert code == 130 and err.endswith(f"fastppo: stopped by SIGINT; go on with: fastppo train --resume {run}\n")
    assert len(ppo_steps(run)) == 2  # the third was not finished
    assert_goes_on(run, tmp_path, unbroken)


def test_second_signal_in_a_checkpoint(world, tmp_path, unbroken):
    run = tmp_path / "run"
    code, _, _ = call(
        world.argv(run), tmp_path, signal_twice, "fastppo.checkpoint", "save_file", 8, signal.SIGINT, signal.SIGINT
    )
    assert code == 130 and leftovers(run) == []
    assert_goes_on(run, tmp_path, unbroken)


def test_stopped_before_the_model_is_loaded_leaves_nothing(world, tmp_path):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run), tmp_path, kill_at, "fastppo.trainer", "load_sets", 1, signal.SIGINT)
    assert code == 130 and err.endswith("fastppo: stopped by SIGINT; nothing was trained yet\n")
    assert not run.exists()


# -- resuming what cannot go on ----------------------------------------------------------------------------------------


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_finished_run_says_so_and_stays_as_it_is(unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    before = files_of(run)
    code, out, err = resume(run, tmp_path)
    assert (code, err) == (0, "") and "is finished already" in out and "after PPO" in out
    assert files_of(run) == before


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    place = ("fastppo.algorithms.ppo", "update", 4)
    assert call(world.argv(folder / "run"), folder, kill_at, *place)[0] == -signal.SIGKILL
    return folder / "run"


@pytest.fixture
def half(killed, tmp_path):
    """A run killed in the middle of PPO."""
    return shutil.copytree(killed, tmp_path / "half")


def refused(run, folder, *more):
    """Resuming is refused with one line; no file of the run changes."""
    before = files_of(run)
    code, _, err = resume(run, folder, *more)
    assert code == 2 and err.startswith("fastppo: error: ") and err.count("\n") == 1
    assert files_of(run) == before
    return err


def test_other_settings_are_refused_and_the_same_are_not(half, tmp_path, unbroken):
    err = refused(half, tmp_path, "--ppo-lr", "1e-4", "--seed", "7")
    assert "begun with other settings" in err and "seed: 0, now 7" in err and "ppo.lr: 0.005, now 0.0001" in err
    assert resume(half, tmp_path, "--seed", "0", "--ppo-lr", "0.005")[0] == 0
    assert outcome(half) == outcome(unbroken)


@pytest.mark.parametrize(("old", "new"), [("rank: 4", "rank: 2"), ("gamma: 1.0", "gamma: 0.5")])
def test_settings_file_changed_by_hand(half, tmp_path, old, new):
    text = (half / "config.yaml").read_text()
    assert old in text
    (half / "config.yaml").write_text(text.replace(old, new))
    assert "settings, data, base model, device or the versions" in refused(half, tmp_path)


@pytest.mark.parametrize("what", ["data", "labels", "model"])
def test_data_or_model_changed(world, tmp_path, what):
    data, model = shutil.copytree(world.data, tmp_path / "data"), shutil.copytree(world.model, tmp_path / "model")
    run = tmp_path / "run"
    argv = world.argv(run, data=data, model=model)
    assert call(argv, tmp_path, kill_at, "fastppo.algorithms.ppo", "update", 1)[0] == -signal.SIGKILL
    if what == "model":
        save_tiny_model("llama", model, seed=1)
    elif what == "data":
        write_rows(data / "dev.tsv", 20, seed=9)
    else:
        rows = (data / "train.tsv").read_text()
        (data / "train.tsv").write_text(rows.replace("src\t1", "src\t0", 1))
    assert "settings, data, base model, device or the versions" in refused(run, tmp_path)


DAMAGES = [(f"{name}.safetensors", damage) for name in ("model", "optimizer", "best") for damage in ("cut", "flipped")]


@pytest.mark.parametrize(
    ("name", "damage"), [*DAMAGES, ("best.safetensors", "gone"), ("state.json", "cut"), ("state.json", "empty")]
)
def test_damaged_checkpoint_is_named_and_the_one_before_goes_on(half, tmp_path, unbroken, name, damage):
    newest = max((half / "checkpoints").iterdir())
    path = newest / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        content[-20] ^= 1
        path.write_bytes(content)
    err = refused(half, tmp_path)
    assert f"checkpoint {newest}: damaged" in err
    if (name, damage) == ("best.safetensors", "flipped"):
        shutil.rmtree(newest)
        assert_goes_on(half, tmp_path, unbroken)


def test_records_that_are_shorter_than_the_checkpoint_says(half, tmp_path):
    (half / "metrics.jsonl").write_text("")
    assert "metrics.jsonl: has 0 lines, but the checkpoint was taken after 8" in refused(half, tmp_path)


def test_partial_checkpoint_of_a_killed_process_is_no_checkpoint(half, tmp_path, unbroken):
    partial = half / "checkpoints" / ".000099.12345.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half a file")
    assert_goes_on(half, tmp_path, unbroken)


def test_moved_run_goes_on(half, tmp_path, unbroken):
    moved = half.rename(tmp_path / "moved run")
    assert_goes_on(moved, tmp_path, unbroken)


def hold_until(path) -> None:
    """In the new process: wait at the first SFT step until a file is there."""
    from fastppo import trainer

    original = trainer.sft_step

    def wait(*args):
        trainer.sft_step = original
        while not os.path.exists(path):
            time.sleep(0.005)
        return original(*args)

    trainer.sft_step = wait


def test_two_processes_in_one_folder(world, tmp_path, unbroken):
    run = tmp_path / "run"
    first = start(world.argv(run), tmp_path / "1", hold_until, str(tmp_path / "go"))
    wait_for_lines(run / ".lock", 1)
    wait_for_config(run)
    code, _, err = call(["train", "--resume", str(run)], tmp_path / "2")
    assert code == 2
    assert err == f"fastppo: error: run folder {run}: in use by process {first.pid}; wait for it, or choose another --out\n"
    (tmp_path / "go").touch()
    assert first.wait()[0] == 0
    assert outcome(run) == outcome(unbroken)


def wait_for_config(run):
    end = time.monotonic() + 60
    while not (run / "config.yaml").exists():
        assert time.monotonic() < end
        time.sleep(0.001)


def another_run_begins_meanwhile(run) -> None:
    """In the new process: while the model loads, another process trains in the folder and ends."""
    from fastppo import trainer

    original = trainer.load_base

    def load(config):
        run.mkdir()
        (run / "config.yaml").write_text("seed: 1\n")
        return original(config)

    trainer.load_base = load


def test_a_run_that_began_meanwhile_is_not_overwritten(world, tmp_path):
    run = tmp_path / "run"
    code, _, err = call(world.argv(run), tmp_path, another_run_begins_meanwhile, run)
    assert code == 2 and err == f"fastppo: error: run folder {run}: exists and is not empty; choose another folder\n"
    assert (run / "config.yaml").read_text() == "seed: 1\n" and not (run / "metrics.jsonl").exists()


def test_lock_file_alone_is_no_run(tmp_path, world):
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = call(world.argv(run), tmp_path)
        assert code == 2 and "in use by another process" in err
    code, _, _ = call(world.argv(run, ppo__iterations=0, sft__examples=0), tmp_path)
    assert code == 0 and json.loads((run / "summary.json").read_text())["seed"] == 0
