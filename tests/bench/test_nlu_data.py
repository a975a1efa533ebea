"""The data of the README's study: what is tested is in nothing that is trained on."""

from pathlib import Path

import pytest

from bench import nlu_data
from fastppo.study import spec
from fastppo.tasks import get_task, load_data

SENTENCES = [
    "a long and moving film about the last days of summer",
    "the plot is thin and the jokes are older than the cast",
    "nobody will remember this dull and loud sequel next year",
]


def test_a_test_sentence_is_whole_and_training_has_no_part_of_it() -> None:
    texts = [*SENTENCES, "moving film", "the jokes", "dull", "a moving film", "film"]
    phrases = {tuple(text.split()): "1" for text in texts}
    for seed in range(6):
        train, test = nlu_data.split_sst2(phrases, sentences=1, seed=seed)
        assert " ".join(test[0]) in SENTENCES
        assert not any(phrase in nlu_data.parts(test[0]) for phrase in train)
        assert all(phrase in train for phrase in phrases if phrase not in nlu_data.parts(test[0]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    out = tmp_path_factory.mktemp("nlu")
    nlu_data.make(shared_data, out, lambda _: None)
    return out


def test_the_text_has_no_test_sentence_and_both_tasks_load(made: Path, shared_data: Path) -> None:
    lines = (made / "text.txt").read_text(encoding="utf-8").splitlines()
    text = set(lines)
    sst2 = load_data(get_task("sst2"), str(made / "data" / "sst2"))
    assert (len(sst2.train), len(sst2.dev)) == (55_517, nlu_data.TEST_SENTENCES)
    assert not text & {example.fields["sentence"] for example in sst2.dev}
    assert text >= {example.fields["sentence"] for example in sst2.train}
    cola = load_data(get_task("cola"), str(made / "data" / "cola"))
    assert (len(cola.train), len(cola.dev)) == (6_023 + 2 * 2_528, 1_043)
    marks = (nlu_data.ACCEPTABLE, nlu_data.STARRED)
    judged = {line.rpartition(" ")[0] for line in lines if line.endswith(tuple(f" {mark}" for mark in marks))}
    pairs = [pair for path in sorted((shared_data / "blimp").glob("*.jsonl")) for pair in nlu_data.objects(path)]
    assert judged >= {pair[f"sentence_{which}"] for pair in pairs for which in ("good", "bad")}
    assert not judged & {example.fields["sentence"] for example in (*cola.train, *cola.dev)}


def test_the_study_of_the_readme_can_be_read() -> None:
    study = spec.Study(**spec.read(Path(nlu_data.__file__).with_name("nlu_study.yaml")))
    spec.check(study)
    start = {task: study.config(task, study.methods[2], 0).sft.examples for task in study.tasks}
    assert start == {"sst2": 16_000, "cola": 4_000} and [method.name for method in study.methods] == ["zero-shot", "sft", "ppo"]
