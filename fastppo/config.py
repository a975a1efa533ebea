"""Settings as a user gives them: defaults, then a YAML or TOML file, then flags; read, checked and written.

A setting is known by its key (`ppo.lr`, or `task` at the top), which is its place in a file; its flag is `--ppo-lr`. What
there is and what is allowed stands in `fastppo.settings`.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastppo import files
from fastppo.errors import UserError
from fastppo.settings import (
    LARGEST_INT,
    REAL_MODEL_DEFAULTS,
    REPLACED,
    SECTIONS,
    SETTINGS,
    Config,
    LoraConfig,
    PpoConfig,
    RewardConfig,
    SampleConfig,
    Setting,
    SftConfig,
    ValueConfig,
)

__all__ = [
    "LARGEST_INT",
    "PRESETS",
    "REAL_MODEL_DEFAULTS",
    "SETTINGS",
    "Config",
    "LoraConfig",
    "PpoConfig",
    "RewardConfig",
    "SampleConfig",
    "Setting",
    "SftConfig",
    "UniqueKeyLoader",
    "ValueConfig",
    "check",
    "differences",
    "flatten",
    "from_flag",
    "from_values",
    "get",
    "load_config",
    "names_preset",
    "preset_file",
    "read_tree",
    "save",
    "suggest",
    "to_dict",
]


# Settings files that come with the package, by name.
PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def suggest(word: str, known: list[str]) -> str:
    """`; did you mean X or Y?` for a name that is not known, what took its place, or nothing if none is near."""
    bare = word.lstrip("-")
    if replaced := REPLACED.get(bare.removeprefix("no-").replace("-", ".")):
        key, value = replaced
        for name, form in ((key, f"{key}: {value}"), (SETTINGS[key].flag, f"{SETTINGS[key].flag} {value}")):
            if name in known:
                return f"; what it did is now {form}"
    near = [name for name in known if name.endswith(("." + bare, "-" + bare))]
    near = near or difflib.get_close_matches(word, known, n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _number(setting: Setting, value: object) -> int | float | None:
    """The value as the setting's kind of number, or None. Text is read strictly: no blanks, no underscores."""
    if isinstance(value, str):  # flags, and YAML 1.1, where 1e-3 without a point is text
        if setting.kind is int:
            return int(value) if re.fullmatch(r"[+-]?[0-9]{1,19}", value) else None
        return float(value) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if setting.kind is int:
        return value if isinstance(value, int) else None
    try:
        return float(value)
    except OverflowError:
        return None


def _within(setting: Setting, number: float) -> bool:
    rule = setting.rule
    high = LARGEST_INT if setting.kind is int and rule.high is None else rule.high
    return (
        math.isfinite(number)
        and (rule.low is None or number >= rule.low)
        and (high is None or number <= high)
        and (rule.above is None or number > rule.above)
        and (rule.below is None or number < rule.below)
    )


def _convert(setting: Setting, value: object) -> Any:
    """The value in the setting's type; ValueError if it is not allowed."""
    if setting.optional and (value is None or value == "none"):
        return None
    if setting.kind is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
    elif setting.kind is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) and item for item in items):
            return tuple(items)
    elif setting.kind is str:
        rule = setting.rule
        if (
            isinstance(value, str)
            and value.strip()
            and "\0" not in value
            and (rule.choices is None or value in rule.choices)
            and (rule.pattern is None or re.fullmatch(rule.pattern[0], value, re.ASCII))
        ):
            return value
    else:
        number = _number(setting, value)
        if number is not None and _within(setting, number):
            return number
    raise ValueError(f"{_shown(value)} is not allowed; expected {setting.allowed}")


def from_flag(key: str, text: str) -> object:
    r"""What a flag's text says, for `from_values`. Several texts: a JSON list if it looks like one, else one in which \n and
    \t stand for themselves."""
    if SETTINGS[key].kind is not tuple:
        return text
    if text in ("", "none"):
        return []
    if text.startswith("["):
        try:
            items = json.loads(text)
        except ValueError:
            items = None
        if isinstance(items, list):
            return items
    return [text.replace("\\n", "\n").replace("\\t", "\t")]


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML would silently drop the first, a whole section perhaps."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                continue
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{_shown(key)} stands here twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_tree(path: Path, what: str = "settings", loader: type[yaml.SafeLoader] = UniqueKeyLoader) -> dict[Any, Any]:
    """What a YAML or TOML file of ``what`` holds, with the names at its top. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} file {path}: is not UTF-8 text") from None
    if path.suffix == ".toml":
        try:
            tree: object = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{what} file {path}: is not TOML: {error}") from None
    elif path.suffix in (".yaml", ".yml"):
        try:
            tree = yaml.load(text, Loader=loader)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"{what} file {path}{line}: {error.problem}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{what} file {path}: is not YAML: {str(error).splitlines()[0]}") from None
    else:
        raise UserError(f"{what} file {path}: the name must end in .yaml, .yml or .toml")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{what} file {path}: expected settings by name, not {type(tree).__name__}")
    return tree


def preset_file(name: str, where: str = "--config") -> Path:
    """The file of a preset. Raises UserError; ``where`` names the place that asks for it."""
    if name not in PRESETS:
        raise UserError(
            f"{where}: {_shown(name)} is no file and no preset; presets are {', '.join(PRESETS)}{suggest(name, list(PRESETS))}"
        )
    return PRESETS[name]


def names_preset(given: Path) -> bool:
    """Whether ``--config`` means a preset: a bare word that is no file."""
    return not given.suffix and len(given.parts) == 1 and not given.is_file()


def _read_file(path: Path) -> dict[str, object]:
    """The values of a settings file, or of the preset that ``path`` names, by key."""
    values: dict[str, object] = {}
    tree = read_tree(preset_file(path.name) if names_preset(path) else path)
    for key, value in flatten(tree, str(path)):
        if key in values:  # `ppo.lr` and, in a section, `ppo: {lr: ...}`
            raise UserError(f"settings file {path}: {key} stands there twice")
        values[key] = value
    return values


def flatten(tree: Mapping[Any, Any], where: str) -> Iterator[tuple[str, object]]:
    """Settings by key, from sections. Raises UserError for a section that is none; ``where`` names the tree."""
    for name, value in tree.items():
        if name in SECTIONS and isinstance(value, dict):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in value.items())
        elif name in SECTIONS:
            if value is not None:  # a section with nothing in it
                raise UserError(f"{where}: {name}: {_shown(value)} is not allowed; expected a section of settings")
        else:
            yield str(name), value


def from_values(values: Mapping[str, tuple[object, str]]) -> Config:
    """A checked `Config` from (value, name) by key; `name` is the setting as the user wrote it, for messages."""
    parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for key, (value, name) in values.items():
        setting = SETTINGS[key]
        try:
            parts[setting.section][setting.name] = _convert(setting, value)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    if parts[""].get("model") is not None:
        for key, default in REAL_MODEL_DEFAULTS.items():
            parts[SETTINGS[key].section].setdefault(SETTINGS[key].name, default)
    sections = {section: cls(**parts[section]) for section, cls in SECTIONS.items()}
    config = Config(**parts[""], **sections)
    check(config, lambda key: values[key][1] if key in values else key)
    return config


def load_config(argv_overrides: Mapping[str, str], file: Path | None = None) -> Config:
    """Defaults, then the file, then the flags.

    Args:
        argv_overrides: texts by key, as the flags gave them: `{"ppo.lr": "1e-3", "ppo.whiten": "false"}`.
        file: a YAML or TOML file with the sections nested, the name of a preset, or None.

    Raises:
        UserError: one line for the first setting that is unknown, of the wrong type or outside what is allowed.
    """
    values: dict[str, tuple[object, str]] = {}
    if file is not None:
        for key, value in _read_file(file).items():
            if key not in SETTINGS:
                raise UserError(f"{file}: unknown setting {_shown(key)}{suggest(key, list(SETTINGS))}")
            values[key] = (value, f"{file}: {key}")
    for key, text in argv_overrides.items():
        if key not in SETTINGS:
            raise UserError(f"unknown setting {_shown(key)}{suggest(key, list(SETTINGS))}")
        values[key] = (from_flag(key, text), SETTINGS[key].flag)
    return from_values(values)


def check(config: Config, name: Callable[[str], str] = str) -> None:
    """Raises UserError for a value that is not allowed, or values that contradict each other.

    `load_config` calls this; call it for a `Config` built in Python. `name` says a key as the user wrote it.
    """
    for key, setting in SETTINGS.items():
        leaf = get(config, key)
        try:
            proper = _convert(setting, leaf) == leaf
        except ValueError:
            proper = False
        if not proper:
            raise UserError(f"{name(key)}: {_shown(leaf)} is not allowed; expected {setting.allowed}")
    ppo, value, sample = config.ppo, config.value, config.sample
    if ppo.minibatches > ppo.prompts:
        raise UserError(
            f"{name('ppo.minibatches')}: {ppo.minibatches} is not allowed; expected at most "
            f"{name('ppo.prompts')} ({ppo.prompts}): the samples of a prompt stay together"
        )
    if ppo.iterations and value.warmup >= ppo.iterations:
        raise UserError(
            f"{name('value.warmup')}: {value.warmup} is not allowed; expected less than "
            f"{name('ppo.iterations')} ({ppo.iterations}), or the policy is never trained"
        )
    if sample.max_new_tokens_from is not None and sample.max_new_tokens_from > sample.max_new_tokens:
        raise UserError(
            f"{name('sample.max_new_tokens_from')}: {sample.max_new_tokens_from} is not allowed; expected at most "
            f"{name('sample.max_new_tokens')} ({sample.max_new_tokens})"
        )
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        raise UserError(
            f"{name('ppo.kl_target')}: {ppo.kl_target} is not allowed with {name('ppo.kl_coef')} 0: "
            "the weight is adapted by factors, and 0 stays 0"
        )


def get(config: Config, key: str) -> Any:
    """The value of one setting by key."""
    setting = SETTINGS[key]
    return getattr(getattr(config, setting.section) if setting.section else config, setting.name)


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain nested dicts (tuples as lists), ready for YAML or JSON."""
    tree: dict[str, Any] = {}
    for key, setting in SETTINGS.items():
        place = tree.setdefault(setting.section, {}) if setting.section else tree
        value = get(config, key)
        place[setting.name] = list(value) if isinstance(value, tuple) else value
    return tree


def save(config: Config, path: Path) -> None:
    """Writes a YAML file, atomically, that `load_config({}, path)` reads back to an equal `Config`."""
    files.write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def differences(a: Config, b: Config) -> list[str]:
    """One text per setting that differs, such as `ppo.lr: 0.001, now 0.002`; not `out`, which only names the folder."""
    return [
        f"{key}: {_shown(get(a, key))}, now {_shown(get(b, key))}"
        for key in SETTINGS
        if key != "out" and get(a, key) != get(b, key)
    ]
