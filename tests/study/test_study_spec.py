"""What a study is told to do, from flags and files."""

import pytest

from fastppo.config import LARGEST_INT
from fastppo.errors import UserError
from fastppo.study import command, spec
from fastppo.study.spec import Method, Study

FILE = """
tasks:
  cola: {sample: {max_new_tokens: 6}, ppo.lr: 2e-3}
methods:
  sft:
  ppo from the base: {kind: ppo, sft.examples: 0}
seeds: [0, 3]
settings:
  ppo: {iterations: 5}
  sample.stop: ["x"]
"""


def study_of(text, tmp_path, **flags):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    settings = {key: flags.pop(key) for key in list(flags) if "." in key or key in ("model", "data", "fallback")}
    return command.study_of(flags, settings, path)


def test_a_file_with_settings_of_tasks_and_methods(tmp_path):
    study = study_of(FILE, tmp_path)
    sft, ppo = study.methods
    assert (sft.kind, ppo) == ("sft", Method("ppo from the base", "ppo", {"sft.examples": 0}))
    supervised, reinforced = (study.config("cola", method, 3) for method in study.methods)
    assert (supervised.sft.examples, supervised.ppo.iterations, supervised.seed) == (LARGEST_INT, 0, 3)
    assert (reinforced.sft.examples, reinforced.ppo.iterations, reinforced.ppo.lr) == (0, 5, 2e-3)
    assert reinforced.sample.max_new_tokens == 6 and reinforced.sample.stop == ("x",)


def test_what_a_task_says_of_ppo_is_not_for_its_supervised_run(tmp_path):
    study = study_of("tasks: {cola: {ppo.iterations: 5, sft.examples: 7, sft.epochs: 2}}\nmethods: [sft, ppo]", tmp_path)
    supervised, reinforced = (study.config("cola", method, 0) for method in study.methods)
    assert (supervised.sft.examples, supervised.ppo.iterations, supervised.sft.epochs) == (LARGEST_INT, 0, 2)
    assert (reinforced.sft.examples, reinforced.ppo.iterations, reinforced.sft.epochs) == (7, 5, 2)


def test_flags_come_after_the_file(tmp_path):
    study = study_of(FILE, tmp_path, methods="zero-shot", seeds="7", **{"ppo.iterations": "9", "sample.stop": "\\n"})
    assert [method.kind for method in study.methods] == ["zero-shot"] and study.seeds == (7,)
    config = study.config("cola", study.methods[0], 7)
    assert config.ppo.iterations == 9 and config.sample.stop == ("\n",)


def test_what_the_seed_does_not_change_is_run_once(tmp_path):
    for task in ("rte", "record"):
        (tmp_path / "all" / task).mkdir(parents=True)
    (tmp_path / "all" / "cola").touch()  # of one file the seed draws the dev split
    methods = "zero-shot,few-shot,sft"

    def run_with(task, **flags):
        study = study_of("tasks: [rte, record, cola]", tmp_path, methods=methods, seeds="3,4", **flags)
        return [len(study.seeds_of(task, method)) for method in study.methods]

    data = str(tmp_path / "all")
    assert run_with("rte", data=data) == run_with("cola") == [1, 2, 2]
    assert run_with("rte", data=data, demonstrations="first") == [1, 1, 2]
    assert run_with("record", data=data, demonstrations="first") == [1, 2, 2]  # its train split is drawn
    assert run_with("cola", data=data, demonstrations="first") == [2, 2, 2]
    assert run_with("rte", fallback="random", demonstrations="first") == [2, 2, 2]


def test_what_is_saved_is_read_back(tmp_path):
    study = study_of(FILE, tmp_path)
    spec.save(study, tmp_path / "saved.yaml")
    again = Study(**spec.read(tmp_path / "saved.yaml"))
    assert again == study
    assert again.config("cola", again.methods[1], 0) == study.config("cola", study.methods[1], 0)


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("methods: [sft]", {}, "--tasks: is missing"),
        ("tasks: [cola]\nmethods: [dpo]", {}, "'dpo' is not known: choose from zero-shot"),
        ("tasks: [cola, cola]", {}, "is given twice"),
        ("tasks: [cola]\nseeds: [0, 0]", {}, "--seeds: 0 is given twice"),
        ("tasks: [cola]\nseeds: [-1]", {}, "seeds: [-1] is not allowed"),
        ("tasks: [cola]", {"seeds": "one"}, "--seeds: 'one' is not allowed"),
        ("tasks: [colla]", {}, "task 'colla' is not known"),
        ("tasks: {cola: {ppo.rl: 1}}", {}, "unknown setting 'ppo.rl'"),
        ("tasks: {cola: {seed: 1}}", {}, "seed is not allowed here; --seeds says it"),
        ("tasks: [cola]\nmethods: {ppo: {ppo.lr: -1}}", {}, "methods.ppo.ppo.lr: -1 is not allowed"),
        ("tasks: [cola]\nshots: 0", {}, "--shots: 0 is not allowed"),
        ("tasks: [cola]", {"shots": "x"}, "--shots: 'x' is not allowed"),
        ("tasks: [cola]\ndemonstrations: last", {}, "expected first or random"),
        ("tasks: [cola]\nmethods: [encoder]", {}, "--encoder: is missing"),
        ("tasks: [cola]\nmethods: {../../evil: {kind: ppo}}", {}, "'../../evil' is not allowed; expected a name of"),
        ("tasks: [cola]\nmethods: {a|b: {kind: ppo}}", {}, "'a|b' is not allowed"),
        ("tasks: [cola]\nmethods: {'': {kind: ppo}}", {}, "'' is not allowed"),
        ("task: [cola]", {}, "unknown field 'task'; did you mean tasks"),
        ("tasks: 3", {}, "3 is not allowed; expected names"),
        ("[cola]", {}, "expected settings by name"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, flags, said):
    with pytest.raises(UserError) as error:
        study_of(text, tmp_path, **flags)
    assert said in str(error.value) and "\n" not in str(error.value)
