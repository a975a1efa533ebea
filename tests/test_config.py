"""Settings: the frozen list, order of sources, and one clear line for everything that is not allowed."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.config import (
    SETTINGS,
    Config,
    LoraConfig,
    PpoConfig,
    SampleConfig,
    ValueConfig,
    check,
    differences,
    load_config,
    save,
    to_dict,
)
from fastppo.errors import UserError

# A setting more is a decision, not an accident: first ask whether one fewer would do. The limit was 64; the published recipe
# for GLUE could not be written down without `ppo.optimizer` and `sample.max_new_tokens_from`.
FROZEN = {
    "": "task template fallback model data out seed device dtype train_examples valid_examples eval_every checkpoint_every "
    "micro_batch_tokens activations max_prompt_tokens trust_remote_code",
    "lora": "rank alpha targets rslora",
    "value": "trunk warmup coef clip",
    "sft": "examples epochs lr batch_size warmup",
    "ppo": "iterations prompts samples epochs minibatches optimizer lr schedule warmup clip gamma lam kl_coef kl_estimator "
    "kl_target entropy_coef whiten target_kl max_grad_norm adam_eps reference old_logprobs",
    "sample": "temperature top_k top_p max_new_tokens max_new_tokens_from stop constrained slots gap_limit",
    "reward": "preset correct wrong malformed",
}


def error_of(overrides: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(overrides, file)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_given_model_has_smaller_default_learning_rates_and_flags_win():
    assert (load_config({}).sft.lr, load_config({}).ppo.lr) == (1e-3, 1e-3)
    given = load_config({"model": "owner/name", "sft.lr": "0.5"})
    assert (given.sft.lr, given.ppo.lr) == (0.5, 3e-5)


def test_the_list_of_settings_is_frozen():
    expected = [f"{section}.{name}".lstrip(".") for section, names in FROZEN.items() for name in names.split()]
    assert list(SETTINGS) == expected
    assert len(SETTINGS) <= 65


def test_every_setting_says_what_it_is_and_where_its_default_comes_from():
    flags = [setting.flag for setting in SETTINGS.values()]
    assert len(set(flags)) == len(flags)
    for setting in SETTINGS.values():
        assert setting.rule.help and setting.rule.source and setting.allowed


def test_defaults_are_allowed():
    assert load_config({}) == Config()


def test_order_is_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nppo:\n  lr: 1e-4\n  epochs: 3\n")
    config = load_config({"ppo.epochs": "5"}, file)
    assert (config.seed, config.ppo.lr, config.ppo.epochs, config.ppo.samples) == (3, 1e-4, 5, 4)


def test_toml_and_yaml_say_the_same(tmp_path):
    yaml, toml = tmp_path / "a.yaml", tmp_path / "a.toml"
    yaml.write_text('model: x/y\nppo:\n  kl_target: null\nsample:\n  stop: ["\\n", "END"]\nvalue:\n  trunk: detached\n')
    toml.write_text(
        'model = "x/y"\n[ppo]\nkl_target = "none"\n[sample]\nstop = ["\\n", "END"]\n[value]\ntrunk = "detached"\n'
    )
    config = load_config({}, yaml)
    assert config == load_config({}, toml)
    assert config.sample.stop == ("\n", "END") and config.value.trunk == "detached" and config.model == "x/y"


@pytest.mark.parametrize(
    ("text", "stop"),
    [("none", ()), ("", ()), (r"\n", ("\n",)), ("a,b", ("a,b",)), ('["a", "\\n"]', ("a", "\n")), ("[INST", ("[INST",))],
)
def test_stop_texts_of_the_flag(text, stop):
    assert load_config({"sample.stop": text}).sample.stop == stop


@pytest.mark.parametrize(("text", "value"), [("none", None), ("0.5", 0.5), ("1", 1.0)])
def test_optional_numbers(text, value):
    assert load_config({"ppo.target_kl": text}).ppo.target_kl == value


@settings(deadline=None)
@given(
    st.builds(
        Config,
        model=st.none() | st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text and text != "none"),
        seed=st.integers(0, 2**32 - 1),
        ppo=st.builds(
            PpoConfig,
            lr=st.floats(1e-12, 1.0),
            kl_target=st.none() | st.floats(1e-6, 1e3),
            whiten=st.booleans(),
            schedule=st.sampled_from(["linear", "cosine", "constant"]),
        ),
        sample=st.builds(SampleConfig, stop=st.lists(st.text(min_size=1)).map(tuple)),
    )
)
def test_saved_settings_read_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    save(config, file)
    assert load_config({}, file) == config
    assert differences(config, load_config({}, file)) == []


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("ppo.lr", "abc", "--ppo-lr: 'abc' is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo.lr", "0", "--ppo-lr: '0' is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo.lr", "nan", "--ppo-lr: 'nan' is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo.lr", "1e999", "--ppo-lr: '1e999' is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo.lr", "none", "--ppo-lr: 'none' is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo.kl_target", "-1", "--ppo-kl-target: '-1' is not allowed; expected a finite number above 0, or none"),
        ("reward.wrong", "-inf", "--reward-wrong: '-inf' is not allowed; expected a finite number"),
        ("ppo.clip", "1", "--ppo-clip: '1' is not allowed; expected a finite number above 0 and below 1"),
        ("ppo.gamma", "1.01", "--ppo-gamma: '1.01' is not allowed; expected a finite number from 0 to 1"),
        ("sample.top_p", "0", "--sample-top-p: '0' is not allowed; expected a finite number above 0 and up to 1"),
        ("sample.top_p", "0 .5", "--sample-top-p: '0 .5' is not allowed; expected a finite number above 0 and up to 1"),
        ("lora.rank", "1.5", "--lora-rank: '1.5' is not allowed; expected a whole number from 1 to 65536"),
        ("lora.rank", "1_0", "--lora-rank: '1_0' is not allowed; expected a whole number from 1 to 65536"),
        ("lora.rank", "", "--lora-rank: '' is not allowed; expected a whole number from 1 to 65536"),
        ("eval_every", "0", "--eval-every: '0' is not allowed; expected a whole number from 1 to 2147483647"),
        ("eval_every", "9" * 30, f"--eval-every: '{'9' * 30}' is not allowed; expected a whole number from 1 to"),
        ("seed", "4294967296", "--seed: '4294967296' is not allowed; expected a whole number from 0 to 4294967295"),
        ("dtype", "fp16", "--dtype: 'fp16' is not allowed; expected one of auto, float32, bfloat16, float16"),
        ("device", "gpu", "--device: 'gpu' is not allowed; expected auto, cpu, cuda or cuda:N"),
        ("ppo.schedule", "Linear", "--ppo-schedule: 'Linear' is not allowed; expected one of linear, cosine, constant"),
        ("lora.targets", "q,,v", "--lora-targets: 'q,,v' is not allowed; expected all-linear, or module names"),
        ("model", " ", "--model: ' ' is not allowed; expected a text that is not empty, or none"),
        ("ppo.whiten", "yes", "--ppo-whiten: 'yes' is not allowed; expected true or false"),
        ("value.trunk", "both", "--value-trunk: 'both' is not allowed; expected one of shared, detached, own"),
        ("sample.stop", '["a", 3]', "--sample-stop: ['a', 3] is not allowed; expected a text, or a list of texts"),
    ],
)
def test_a_wrong_flag_gives_one_line_with_its_name_value_and_what_is_allowed(key, text, expected):
    assert error_of({key: text}).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo:\n  lr: -1\n", "ppo.lr: -1 is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo:\n  lr: .nan\n", "ppo.lr: nan is not allowed; expected a finite number above 0 and up to 1"),
        ("ppo:\n  lr: true\n", "ppo.lr: True is not allowed"),
        ("ppo:\n  lr:\n", "ppo.lr: None is not allowed"),
        ("seed: 1.0\n", "seed: 1.0 is not allowed; expected a whole number"),
        ("seed: true\n", "seed: True is not allowed"),
        ("seed: {a: 1}\n", "seed: {'a': 1} is not allowed"),
        ("task: no\n", "task: False is not allowed"),
        ("sample:\n  stop: [1]\n", "sample.stop: [1] is not allowed"),
        ("ppo:\n  lrr: 1\n", "unknown setting 'ppo.lrr'; did you mean ppo.lr?"),
        ("value: {detach: true}\n", "unknown setting 'value.detach'; what it did is now value.trunk: detached"),
        ("kl_coef: 1\n", "unknown setting 'kl_coef'; did you mean ppo.kl_coef?"),
        ("pop:\n  lr: 1\n", "unknown setting 'pop'"),
        ("ppo: 3\n", "ppo: 3 is not allowed; expected a section of settings"),
        ("1: 3\n", "unknown setting '1'"),
        ("[a]: 3\n", "while constructing a mapping|unhashable|found"),
        ("- task\n", "expected settings by name, not list"),
        ("seed: 1\nseed: 2\n", "line 2: 'seed' stands here twice"),
        ("ppo: {lr: 1}\nppo.lr: 2\n", "ppo.lr stands there twice"),
        ("a: [\n", "line 2: "),
        ("a: \x00\n", "is not YAML"),
    ],
)
def test_a_wrong_file_gives_one_line_with_the_file_and_the_setting(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    line = error_of({}, file)
    assert str(file) in line and any(part in line for part in expected.split("|"))


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read: No such file" in error_of({}, tmp_path / "none.yaml")
    assert "cannot be read: Is a directory" in error_of({}, tmp_path)
    (tmp_path / "a.ini").write_text("seed = 1")
    assert "the name must end in .yaml, .yml or .toml" in error_of({}, tmp_path / "a.ini")
    (tmp_path / "a.toml").write_text("seed = ")
    assert "is not TOML" in error_of({}, tmp_path / "a.toml")
    (tmp_path / "b.yaml").write_bytes(b"seed: \xff")
    assert "is not UTF-8 text" in error_of({}, tmp_path / "b.yaml")


def test_empty_file_and_empty_section_change_nothing(tmp_path):
    for text in ("", "# nothing\n", "ppo:\n"):
        (tmp_path / "empty.yaml").write_text(text)
        assert load_config({}, tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"ppo.prompts": "1"}, "ppo.minibatches: 2 is not allowed; expected at most --ppo-prompts (1)"),
        ({"ppo.minibatches": "129"}, "--ppo-minibatches: 129 is not allowed; expected at most ppo.prompts (128)"),
        ({"value.warmup": "5", "ppo.iterations": "5"}, "--value-warmup: 5 is not allowed; expected less than"),
        ({"ppo.kl_target": "6", "ppo.kl_coef": "0"}, "--ppo-kl-target: 6.0 is not allowed with --ppo-kl-coef 0"),
        (
            {"sample.max_new_tokens_from": "5"},
            "--sample-max-new-tokens-from: 5 is not allowed; expected at most sample.max_new_tokens (4)",
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides, expected):
    assert error_of(overrides).startswith(expected)


def test_a_run_without_ppo_needs_no_value_warmup():
    assert load_config({"ppo.iterations": "0"}).ppo.iterations == 0


def test_unknown_override():
    assert error_of({"lr": "1"}) == "unknown setting 'lr'; did you mean sft.lr or ppo.lr?"


@pytest.mark.parametrize(
    "config",
    [
        Config(seed=-1),
        Config(ppo=PpoConfig(lr=math.inf)),
        Config(ppo=PpoConfig(lr="0.1")),  # type: ignore[arg-type]
        Config(sample=SampleConfig(stop=["a"])),  # type: ignore[arg-type]
        Config(value=ValueConfig(trunk="both")),
    ],
)
def test_settings_built_in_python_are_checked_too(config):
    with pytest.raises(UserError):
        check(config)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


def test_differences_name_each_setting_but_not_the_folder():
    a, b = Config(out="a"), Config(out="b", seed=1, lora=LoraConfig(rank=4))
    assert differences(a, b) == ["seed: 0, now 1", "lora.rank: 16, now 4"]


def test_to_dict_has_every_setting_once():
    tree = to_dict(Config(sample=SampleConfig(stop=("x",))))
    leaves = [value for value in tree.values() if not isinstance(value, dict)]
    assert len(leaves) + sum(len(section) for section in tree.values() if isinstance(section, dict)) == len(SETTINGS)
    assert tree["sample"]["stop"] == ["x"]
