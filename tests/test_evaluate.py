"""``fastppo eval``: a run's adapter on its own data and on others."""

import json
import shutil

import pytest
from small import call, quiet_console, write_rows

from fastppo import cli
from fastppo.errors import UserError
from fastppo.evaluate import evaluate_run


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    # Trained until the answers differ, so that a wrong adapter would be seen.
    summary, _ = world.train(run, sft__epochs=12, ppo__iterations=6, valid_examples=0, seed=3)
    assert summary["stages"]["ppo"]["mcc"] != summary["stages"]["zero_shot"]["mcc"]
    return run


def test_dev_row_is_that_of_the_summary(finished):
    stages = json.loads((finished / "summary.json").read_text())["stages"]
    row = evaluate_run(finished, None, "dev", None, quiet_console())
    assert row == {key: value for key, value in stages["ppo"].items() if key != "labels"}


def test_what_is_shown(finished, capsys):
    row = json.loads((finished / "summary.json").read_text())["stages"]["ppo"]
    assert cli.main(["eval", str(finished)]) == 0
    out, err = capsys.readouterr()
    expected = f"dev: MCC {row['mcc']:.3f} [{row['mcc_low']:.3f}, {row['mcc_high']:.3f}]  accuracy {row['accuracy']:.1%}"
    assert expected in out and "n 20" in out and err == ""


def test_other_split_other_data_and_limit(finished, tmp_path):
    assert evaluate_run(finished, None, "train", None, quiet_console())["n"] == 60
    assert evaluate_run(finished, None, "dev", 7, quiet_console())["n"] == 7
    assert evaluate_run(finished, None, "dev", 1000, quiet_console())["n"] == 20
    write_rows(tmp_path / "other.tsv", 50, seed=8)
    assert evaluate_run(finished, str(tmp_path / "other.tsv"), "dev", None, quiet_console())["n"] == 5


def test_evaluation_writes_nothing(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    evaluate_run(finished, None, "dev", 3, quiet_console())
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_run_without_an_adapter_yet(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    code, _, err = call(["eval", str(run)], tmp_path)
    assert code == 2
    assert err == f"fastppo: error: run folder {run}: has no adapter yet; finish it with: fastppo train --resume {run}\n"


@pytest.mark.parametrize("damage", ["cut", "gone", "other rank"])
def test_damaged_adapter_is_one_line(world, finished, tmp_path, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "gone":
        path.unlink()
    else:
        world.train(tmp_path / "two", lora__rank=2, ppo__iterations=0, sft__examples=0)
        shutil.copy(tmp_path / "two" / "adapter" / "adapter_model.safetensors", path)
    for command in (["eval", str(run)], ["export", str(run), "--to", str(tmp_path / "to")]):
        code, _, err = call(command, tmp_path)
        assert code == 2 and err.count("\n") == 1, err
        assert err.startswith(f"fastppo: error: {run / 'adapter'}: the adapter ")
    code, _, err = call(["export", str(run), "--to", str(tmp_path / "to"), "--merged"], tmp_path)
    assert code == 2 and err.count("\n") == 1, err
    assert not (tmp_path / "to").exists()


def test_model_that_is_gone(world, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(world.model), str(tmp_path / "gone")))
    with pytest.raises(UserError, match="no such folder"):
        evaluate_run(run, None, "dev", None, quiet_console())
