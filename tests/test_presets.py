"""Shipped presets: what they hold and name, that docs/presets.md says the same, and that they run."""

import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from engine import make_model
from small import REPO, adapter, call, kill_at, leftovers, outcome, ppo_steps, quiet_console

from fastppo import cli
from fastppo import config as config_module
from fastppo.config import PRESETS, REAL_MODEL_DEFAULTS, SETTINGS, Config, load_config
from fastppo.errors import UserError
from fastppo.study import command, spec
from fastppo.trainer import train

# Settings of a run and a machine, not of a recipe.
LEFT_OUT = {
    "task", "model", "data", "out", "seed", "device", "checkpoint_every", "micro_batch_tokens", "activations",
    "max_prompt_tokens", "trust_remote_code", "sample.slots", "sample.gap_limit",
}  # fmt: skip
PAGE = (REPO / "docs" / "presets.md").read_text()


def held(name: str) -> dict[str, object]:
    """What a preset's file says, by key, as texts."""
    return yaml.load(PRESETS[name].read_text(), Loader=yaml.BaseLoader)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder to be in, in which a bare name is no file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_two():
    assert list(PRESETS) == ["paper-nlu", "recommended"]


@pytest.mark.parametrize("name", PRESETS)
def test_each_names_every_setting_of_a_recipe(name, there):
    """Also those that are as the defaults are: a preset must not move with them."""
    assert list(held(name)) == [key for key in SETTINGS if key not in LEFT_OUT]
    for key, value in held(name).items():
        assert config_module.get(load_config({}, Path(name)), key) == converted(key, value), key


@pytest.mark.parametrize("name", PRESETS)
def test_every_line_names_its_source(name):
    text = PRESETS[name].read_text()
    sources = set(re.findall(r"^#   (.+?): ", text, re.MULTILINE))
    named_sources = {word for source in sources for word in source.split(", ")}
    assert {"TRL", "fastppo"} <= named_sources
    elsewhere = r"(\w+(, \w+)* et al\. \d{4}|verl|trlX|LoRA Without Regret|RLOO in TRL)"
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"[\w.]+: \S+  # (.+)", line)
        assert match, line
        known = any(match[1].startswith(source) for source in named_sources)
        assert known or re.match(elsewhere, match[1]), line


def converted(key: str, text: object) -> object:
    given = config_module.from_flag(key, "none" if text == [] else str(text))
    return config_module._convert(SETTINGS[key], given)


def test_the_page_says_what_the_files_and_the_code_say():
    """Columns: setting, paper, the presets in their order, default."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if row[0].strip("`") in SETTINGS]
    heading = next(line for line in PAGE.splitlines() if line.startswith("| setting |"))
    assert heading == "| setting | paper | `paper-nlu` | `recommended` | default |"
    assert [row[0].strip("`") for row in rows] == [key for key in SETTINGS if key not in LEFT_OUT]
    for first, paper, *columns, default in rows:
        key = first.strip("`")
        assert paper
        for name, cell in zip(PRESETS, columns, strict=True):
            assert converted(key, cell) == converted(key, held(name)[key]), (key, name)
        default, *with_model = default.split("; with `--model` ")
        assert converted(key, default) == SETTINGS[key].default, key
        assert [converted(key, value) for value in with_model] == [x for k, x in REAL_MODEL_DEFAULTS.items() if k == key]
    after = PAGE.split("Not in presets", 1)[1].split("## ", 1)[0]
    assert set(re.findall(r"`([\w.]+)`", after)) == LEFT_OUT


def test_every_source_of_the_papers_column_is_a_known_one():
    rows = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| `") and line.split("`")[1] in SETTINGS]
    sources = {source for row in rows for found in re.findall(r"\[(.+?)\]", row) for source in found.split(", ")}
    files = {"ppo.py", "ppo.sh", "sft.py", "sft.sh", "prompt.py", "inference.py", "ppo.py names none"}
    assert sources <= files | {"TRL"} and "ppo.py" in sources


# -- where a preset's name is taken ---------------------------------------------------------------------------------------


def test_the_recipe(there):
    config = load_config({"task": "rte"}, Path("paper-nlu"))
    assert config.task == "rte" and config.model is None
    lora, ppo, sample = config.lora, config.ppo, config.sample
    assert (lora.rank, lora.alpha, lora.rslora, lora.targets) == (16, 32, True, "q_proj,v_proj")
    assert (ppo.optimizer, ppo.lr, ppo.schedule, ppo.warmup, ppo.epochs) == ("adafactor", 9e-6, "constant", 0, 4)
    assert (ppo.kl_coef, ppo.kl_target, ppo.reference) == (0.2, 6, "base")
    assert (sample.max_new_tokens_from, sample.max_new_tokens) == (12, 31)
    assert (config.template, config.reward.preset) == ("tagged", "code")


def test_its_adapters_have_a_scale_of_8():
    recipe = held("paper-nlu")
    settings = {f"lora__{name}": recipe[f"lora.{name}"] for name in ("rank", "alpha", "targets", "rslora")}
    model = make_model("qwen2", **settings)
    layers = [layer for layer in model._lora_layers if layer.r]
    assert layers and {float(scale) for layer in layers for scale in layer.scaling.values()} == {8.0}
    assert {name.split(".")[-3] for name in model.adapter_tensors("policy")} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", PRESETS)
def test_flags_come_after_it_and_a_models_rates_do_not(name, there):
    flags = {"model": "owner/name", "ppo.samples": "7"}
    config = load_config(flags, Path(name))
    assert config.ppo.samples == 7 and config.model == "owner/name"
    assert (config.sft.lr, config.ppo.lr) == {"paper-nlu": (9e-6, 9e-6), "recommended": (2e-4, 3e-5)}[name]


def test_recommended_is_the_defaults_for_a_model_but_for_longer_answers(there):
    """Today. Where they part, this list says so."""
    found = config_module.differences(load_config({"model": "a/b"}), load_config({"model": "a/b"}, Path("recommended")))
    assert found == ["sample.max_new_tokens: 4, now 8"]


def test_a_file_of_that_name_is_the_file_and_a_folder_is_not(there):
    (there / "recommended").mkdir()
    assert load_config({}, Path("recommended")).sample.max_new_tokens == 8
    (there / "paper-nlu").write_text("seed: 3\n")
    with pytest.raises(UserError, match="^settings file paper-nlu: the name must end in .yaml, .yml or .toml$"):
        load_config({}, Path("paper-nlu"))
    (there / "paper-nlu.yaml").write_text("seed: 3\n")
    assert load_config({}, Path("paper-nlu.yaml")) == Config(seed=3)


def test_a_name_that_is_none_gives_one_line_with_all(there, capsys):
    line = "--config: 'papernlu' is no file and no preset; presets are paper-nlu, recommended; did you mean paper-nlu?"
    for argv in (["train"], ["plan"], ["study", "--tasks", "cola"]):
        assert cli.main([*argv, "--config", "papernlu"]) == 2
        assert capsys.readouterr() == ("", f"fastppo: error: {line}\n")
    (there / "study.yaml").write_text("preset: best\ntasks: [cola]\n")
    assert cli.main(["study", "--config", "study.yaml"]) == 2
    said = "study.yaml: preset: 'best' is no file and no preset; presets are paper-nlu, recommended"
    assert capsys.readouterr().err == f"fastppo: error: {said}\n"


def test_what_contradicts_a_preset_is_said_with_its_name(there):
    with pytest.raises(UserError) as error:
        load_config({"sample.max_new_tokens": "9"}, Path("paper-nlu"))
    assert str(error.value) == (
        "paper-nlu: sample.max_new_tokens_from: 12 is not allowed; expected at most --sample-max-new-tokens (9)"
    )


def test_the_help_lists_them(capsys):
    for name in ("train", "plan"):
        cli.main([name, "--help"])
        assert "the name of a preset: paper-nlu, recommended" in " ".join(capsys.readouterr().out.split())


def test_a_plan_of_the_recipe(there, capsys):
    assert cli.main(["plan", "--config", "paper-nlu", "--device", "cpu", "--json"]) == 0
    assert any("Adafactor" in part["how"] for part in json.loads(capsys.readouterr().out)["parts"])


def test_a_study_by_its_file_and_by_its_flag(there):
    (there / "study.yaml").write_text(
        "preset: paper-nlu\ntasks: {cola: {ppo.epochs: 3}}\nmethods: [sft, ppo]\nsettings: {ppo: {iterations: 9}}\n"
    )
    by_file = command.study_of({}, {"ppo.samples": "2"}, Path("study.yaml"))
    by_flag = command.study_of(
        {"tasks": "cola", "methods": "sft,ppo"}, {"ppo.samples": "2", "ppo.iterations": "9"}, Path("paper-nlu")
    )
    for study, epochs in ((by_file, 3), (by_flag, 4)):
        sft, ppo = (study.config("cola", method, 0) for method in study.methods)
        assert (ppo.ppo.iterations, ppo.ppo.samples, ppo.ppo.epochs, ppo.ppo.optimizer) == (9, 2, epochs, "adafactor")
        assert ppo.sft.examples == 0 and sft.sft.examples > 0 and sft.sft.lr == 9e-6
        spec.save(study, there / "saved.yaml")  # with all values: it does not change when a preset does
        saved = yaml.safe_load((there / "saved.yaml").read_text())
        assert "preset" not in saved and saved["settings"]["lora.rslora"] is True
        assert spec.Study(**spec.read(there / "saved.yaml")) == study


# -- a run -----------------------------------------------------------------------------------------------------------------


def argv(run: Path, *more: str) -> list[str]:
    """The recipe, for three iterations."""
    few = ["--ppo-iterations", "3", "--ppo-prompts", "4", "--train-examples", "40", "--checkpoint-every", "1"]
    return ["train", "--config", "paper-nlu", "--task", "cola", "--out", str(run), *few, *more]


def test_a_short_run_of_the_recipe_on_what_is_built_in(tmp_path):
    run = tmp_path / "run"
    code, _, err = call(argv(run, "--sample-max-new-tokens", "16"), tmp_path)  # a thousand test sentences are answered twice
    assert (code, err) == (0, "")
    steps = ppo_steps(run)
    assert len(steps) == 3 and all(row["steps"] == 4 for row in steps)  # four epochs of one step each
    assert steps[0]["kl"] == 0.0 and steps[0]["first_log_ratio"] == 0.0 and steps[0]["kl_coef"] == 0.2
    assert steps[1]["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 10_000))  # KL 0 of target 6: down by the largest step
    assert list(json.loads((run / "summary.json").read_text())["stages"]) == ["zero_shot", "ppo"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["ppo"]["optimizer"], saved["sample"]["max_new_tokens_from"]) == ("adafactor", 12)
    assert any(tensor.any() for name, tensor in adapter(run).items() if "lora_B" in name)  # it moved


def test_the_recipe_killed_goes_on_to_the_same_bits(world, tmp_path):
    small = ["--model", str(world.model), "--data", str(world.data)]
    whole, cut = tmp_path / "a", tmp_path / "b"
    assert call(argv(whole, *small), tmp_path)[0] == 0
    assert call(argv(cut, *small), tmp_path, kill_at, "fastppo.algorithms.ppo", "update", 3)[0] == -signal.SIGKILL
    assert call(["train", "--resume", str(cut)], tmp_path)[::2] == (0, "")
    assert outcome(cut) == outcome(whole) and leftovers(cut) == []
    lengths = [row["length"] for row in ppo_steps(whole)]  # of a random model, which does not end its answers
    assert len(set(lengths)) > 1 and all(11 < length <= 31 for length in lengths)


def test_recommended_runs(world, tmp_path):
    settings = {"model": str(world.model), "data": str(world.data), "ppo.iterations": "1"}
    summary = train(load_config(settings, Path("recommended")), tmp_path / "run", quiet_console())
    assert list(summary["stages"]) == ["zero_shot", "sft", "ppo"]
