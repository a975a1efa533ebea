"""``fastppo predict``: runs' answers to unlabelled test splits, collected in a folder for a server."""

import json
import zipfile

import pytest
from small import call, quiet_console

from fastppo.errors import UserError
from fastppo.evaluate import evaluate_run
from fastppo.predict import predict_runs
from fastppo.tasks import TASKS


def write_test(folder, texts, header="index\tsentence"):
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{2 * i}\t{text}\n" for i, text in enumerate(texts))
    (folder / "test.tsv").write_text(f"{header}\n{rows}")


@pytest.fixture(scope="module")
def cola(world, tmp_path_factory):
    """A run that answers yes and no, and a test file beside its data."""
    run = tmp_path_factory.mktemp("predict") / "cola"
    world.train(run, sft__epochs=12, ppo__iterations=0, valid_examples=0, sample__constrained=True, seed=3)
    return run


@pytest.fixture(scope="module")
def rte(world, tmp_path_factory):
    """A run whose answers are malformed."""
    folder = tmp_path_factory.mktemp("predict")
    for split, n in (("train", 20), ("dev", 4)):
        names = TASKS["rte"].label_names
        rows = [{"premise": f"A cat sees {i}.", "hypothesis": "A dog.", "label": names[i % 2]} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"premise": f"A cat sees {i}.", "hypothesis": "A dog.", "idx": i} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "run"
    world.train(run, task="rte", data=folder, sft__examples=0, ppo__iterations=0)
    return run


def shown(call_, *args):
    console = quiet_console()
    call_(*args, console)
    return console.file.getvalue()


def test_the_answers_are_those_of_eval_in_the_order_and_with_the_indices_of_the_file(cola, world, tmp_path):
    dev = [line.split("\t") for line in (world.data / "dev.tsv").read_text().splitlines()]
    write_test(tmp_path / "data", [row[3] for row in dev])
    out = shown(predict_runs, [cola], tmp_path / "to", str(tmp_path / "data"), None, None)
    lines = (tmp_path / "to" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [str(2 * i) for i in range(20)]
    said = [int(line.split("\t")[1]) for line in lines[1:]]
    assert set(said) == {0, 1}
    right = sum(answer == int(row[1]) for answer, row in zip(said, dev, strict=True))
    assert evaluate_run(cola, None, "dev", None, quiet_console())["accuracy"] == pytest.approx(right / 20)
    assert f"wrote {tmp_path / 'to' / 'CoLA.tsv'}: 20 answers, 0 malformed\n" in out
    assert "submission.zip with 1 of the 11 files of GLUE; missing: SST-2.tsv, MRPC.tsv, QQP.tsv, STS-B.tsv, " in out
    with zipfile.ZipFile(tmp_path / "to" / "submission.zip") as archive:
        assert archive.namelist() == ["CoLA.tsv"] and archive.read("CoLA.tsv").decode().splitlines() == lines


def test_public_test_file(cola, shared_data, tmp_path):
    if not (shared_data / "cola" / "test.tsv").is_file():
        pytest.skip("no cola/test.tsv in the folder of public data")
    rows = (shared_data / "cola" / "test.tsv").read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    predict_runs([cola], tmp_path / "to", str(tmp_path / "test.tsv"), None, None, quiet_console())
    lines = (tmp_path / "to" / "CoLA.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [row.split("\t")[0] for row in rows]


@pytest.mark.parametrize("fallback", [None, "first", "random"])
def test_malformed_answers_become_labels_and_are_counted(rte, tmp_path, fallback):
    out = shown(predict_runs, [rte], tmp_path / "to", None, None, fallback)
    rows = [json.loads(line) for line in (tmp_path / "to" / "RTE.jsonl").read_text().splitlines()]
    assert [row["idx"] for row in rows] == [0, 1, 2]
    names = {row["label"] for row in rows}
    assert names == {"entailment"} if fallback != "random" else names <= {"entailment", "not_entailment"}
    how = "one drawn evenly" if fallback == "random" else "yes"
    assert f"RTE.jsonl: 3 answers, 3 malformed (written: the first label that each names, else {how})\n" in out
    assert "submission.zip with 1 of the 10 files of SuperGLUE; missing: BoolQ.jsonl, CB.jsonl, " in out


def test_a_folder_collects_the_files_of_one_server(cola, rte, world, tmp_path):
    to = tmp_path / "to"
    write_test(tmp_path / "data", ["The cat sees a dog."])
    predict_runs([cola], to, str(tmp_path / "data"), None, None, quiet_console())
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tA cat.\tA dog.\n")
    predict_runs([rte], to, str(tmp_path / "glue"), None, None, quiet_console())
    with zipfile.ZipFile(to / "submission.zip") as archive:
        assert archive.namelist() == ["CoLA.tsv", "RTE.tsv"]
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    refusals = [
        ([cola], tmp_path / "data", None, f"^--to: {to}/CoLA.tsv exists already; remove it, or choose another folder$"),
        ([rte], None, None, f"^--to: {to} holds CoLA.tsv, which is no file for SuperGLUE's server; choose a folder"),
        ([rte, rte], tmp_path / "glue", None, "RTE.tsv: is what more than one of these runs would write; give one of them$"),
        ([cola, rte], tmp_path / "data", "cola", "CoLA.tsv: is what more than one"),
        ([cola], None, None, f"^{world.data}: no test split: looked for test with the ending"),
        ([cola], None, "sst2", "^--task sst2: is not the run's task cola; give its data with --data$"),
        ([cola], tmp_path / "data", "none", "^task 'none' is not known"),
    ]
    for runs, data, task, expected in refusals:
        with pytest.raises(UserError, match=expected):
            predict_runs(runs, to, data and str(data), task, None, quiet_console())
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    (to / "notes.txt").touch()
    with pytest.raises(UserError, match="holds notes.txt, which is no file for GLUE's server"):
        predict_runs([rte], to, str(tmp_path / "glue"), None, None, quiet_console())


@pytest.fixture
def beside(world):
    """A test file in the folder of the run's own data."""
    path = world.data / "test.tsv"
    path.write_text("index\tsentence\n7\tThe cat sees a dog.\n")
    yield
    path.unlink()


def test_several_runs_are_for_one_server(cola, rte, beside, tmp_path):
    """Each with the test split of its own data."""
    with pytest.raises(UserError, match="^task cola is for GLUE's server, task rte for SuperGLUE's; not both$"):
        predict_runs([cola, rte], tmp_path / "to", None, None, None, quiet_console())
    assert not (tmp_path / "to").exists()


def test_the_command(cola, beside, tmp_path):
    code, out, err = call(["predict", str(cola), "--to", str(tmp_path / "to")], tmp_path)
    assert (code, err) == (0, "") and "cola: answering 1 examples\n" in out and (tmp_path / "to" / "CoLA.tsv").is_file()
    code, _, err = call(["predict", str(cola), "--to", str(tmp_path / "to"), "--data", str(tmp_path / "none")], tmp_path)
    assert code == 2 and err.startswith("fastppo: error: data '") and err.count("\n") == 1


def test_a_run_on_one_file_has_no_test_split_of_its_own(cola, world, tmp_path):
    text = (cola / "config.yaml").read_text()
    (tmp_path / "adapter").symlink_to(cola / "adapter")
    (tmp_path / "config.yaml").write_text(text.replace(str(world.data), str(world.data / "train.tsv")))
    with pytest.raises(UserError, match="train.tsv is one file, without a test split; give that with --data$"):
        predict_runs([tmp_path], tmp_path / "to", None, None, None, quiet_console())


def test_record_says_how_many_queries_had_no_right_entity(rte, tmp_path):
    text = {"text": "Ann met Bob.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]}
    row = {"idx": 0, "passage": text, "qas": [{"query": "@placeholder left", "idx": 4}]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    out = shown(predict_runs, [rte], tmp_path / "to", str(tmp_path), "record", "first")
    assert json.loads((tmp_path / "to" / "ReCoRD.jsonl").read_text()) == {"idx": 4, "label": "Ann"}
    assert "2 answers, 2 malformed (written: the first label that each names, else no); 1 queries, 1 without an entity" in out


def test_several_runs_in_one_command(cola, world, beside, tmp_path):
    other = tmp_path / "mrpc"
    other.mkdir()
    (other / "data").mkdir()
    (other / "data" / "test.tsv").write_text("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n5\t1\t2\tA cat.\tA dog.\n")
    (other / "adapter").symlink_to(cola / "adapter")
    text = (cola / "config.yaml").read_text().replace(str(world.data), str(other / "data"))
    (other / "config.yaml").write_text(text.replace("task: cola", "task: mrpc"))
    out = shown(predict_runs, [cola, other], tmp_path / "to", None, None, None)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["CoLA.tsv", "MRPC.tsv", "submission.zip"]
    assert (tmp_path / "to" / "MRPC.tsv").read_text().splitlines()[1][:2] == "5\t" and "with 2 of the 11 files of GLUE" in out


def test_all_tasks_of_a_run(cola, world, tmp_path):
    """A run of two tasks: each with the test split of its part of the data; or one of them."""
    run, data = tmp_path / "run", tmp_path / "data"
    for folder in (run, data, data / "cola", data / "mrpc"):
        folder.mkdir()
    (data / "cola" / "test.tsv").write_text("index\tsentence\n7\tThe cat sees a dog.\n")
    (data / "mrpc" / "test.tsv").write_text("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n5\t1\t2\tA cat.\tA dog.\n")
    (run / "adapter").symlink_to(cola / "adapter")
    text = (cola / "config.yaml").read_text().replace(str(world.data), str(data))
    (run / "config.yaml").write_text(text.replace("task: cola", "task: cola,mrpc"))
    predict_runs([run], tmp_path / "both", None, None, None, quiet_console())
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["CoLA.tsv", "MRPC.tsv", "submission.zip"]
    predict_runs([run], tmp_path / "one", None, "mrpc", None, quiet_console())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["MRPC.tsv", "submission.zip"]
    with pytest.raises(UserError, match="^--task sst2: is not one of the run's tasks cola,mrpc; give its data with --data$"):
        predict_runs([run], tmp_path / "two", None, "sst2", None, quiet_console())


def test_a_run_with_tasks_that_no_server_or_another_server_takes(cola, tmp_path):
    """What to leave out is said."""
    own, run, data = tmp_path / "teams.yaml", tmp_path / "run", tmp_path / "data"
    own.write_text('template: "Which team? {text}"\nanswers: [yes, no]\n')
    for folder in (run, data, data / "cola", data / "rte"):
        folder.mkdir()
    (data / "cola" / "test.tsv").write_text("index\tsentence\n7\tThe cat sees a dog.\n")
    (data / "rte" / "test.jsonl").write_text('{"premise": "A cat.", "hypothesis": "A dog.", "idx": 0}\n')
    (run / "adapter").symlink_to(cola / "adapter")
    text = (cola / "config.yaml").read_text()
    for tasks, said in (
        (f"cola,{own},rte", "teams: no server takes its .*; leave it out: --task cola,rte$"),
        (str(own), "task teams: no server takes its test answers; only the tasks of GLUE and SuperGLUE have one$"),
        ("cola,rte", "^task cola is for GLUE's server, task rte for SuperGLUE's; not both; give some of them with --task$"),
    ):
        (run / "config.yaml").write_text(text.replace("task: cola", f"task: {tasks}"))
        with pytest.raises(UserError, match=said):
            predict_runs([run], tmp_path / "to", str(data), None, None, quiet_console())
    assert not (tmp_path / "to").exists()
