"""Every setting, once: nested frozen dataclasses filled from defaults, then a YAML or TOML file, then flags.

A setting is known by its key (`ppo.lr`, or `task` at the top), which is its place in a file; its flag is `--ppo-lr`.
Each field carries its help, what is allowed and where its default comes from (`Rule`), and everything else (parsing,
checking, the command line, the help) is derived from that.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastppo import files
from fastppo.errors import UserError

LARGEST_INT = 2**31 - 1

NPLUS = "Huang et al. 2024, The N+ implementation details of RLHF with PPO (arXiv 2403.17031)"
PPO = "Schulman et al. 2017, PPO (arXiv 1707.06347)"
GAE = "Schulman et al. 2016, GAE (arXiv 1506.02438)"
ZIEGLER = "Ziegler et al. 2019 (arXiv 1909.08593), section 2.2"
LORA = "Hu et al. 2021, LoRA (arXiv 2106.09685)"
LORA_LR = "LoRA Without Regret (Schulman et al. 2025): about 10 x the rate of full fine-tuning"
OURS = "fastppo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a setting means, what it may be, and where its default comes from.

    Bounds: `low` and `high` are allowed values, `above` and `below` are not.
    """

    help: str
    source: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    pattern: tuple[str, str] | None = None  # a regular expression for the whole text, and how to say it


def _setting(default: Any, help: str, source: str = OURS, **allowed: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help=help, source=source, **allowed)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the frozen base."""

    rank: int = _setting(
        16, "rank of the adapters", "Seed-paper setting r 16; N+ uses 8, verl advises 32 or more", low=1, high=65536
    )
    alpha: float = _setting(32.0, "scale: the update is alpha / rank * B A x", f"{LORA}, section 4.1; N+: 32", above=0)
    targets: str = _setting(
        "all-linear",
        "linear layers that get an adapter: all-linear, or module names separated by commas",
        f"{NPLUS}: all linear layers",
        pattern=(r"[^,\s]+(,[^,\s]+)*", "all-linear, or module names separated by commas"),
    )
    rslora: bool = _setting(
        False, "scale by alpha / sqrt(rank) instead", "Kalajdzievski 2023, rsLoRA (arXiv 2312.03732), theorem 3.2"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueConfig:
    """The critic: a head on the shared trunk, or on a trunk with its own adapter."""

    trunk: str = _setting(
        "shared",
        "what the critic's head reads: the policy's states, the same without training them, or those of an own adapter",
        "TRL issue 1063",
        choices=("shared", "detached", "own"),
    )
    warmup: int = _setting(
        0, "first PPO iterations that train the critic only", "VC-PPO (arXiv 2503.01491), value pre-training", low=0
    )
    coef: float = _setting(0.1, "weight of the value loss", f"{NPLUS}; TRL vf_coef", low=0)
    clip: float = _setting(0.2, "how far a value may move from the old one per update", f"{NPLUS}; TRL", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    """The supervised warm start: cross-entropy on the answer only."""

    examples: int = _setting(400, "labelled examples used (0 skips the stage)", low=0)
    epochs: int = _setting(4, "passes over them", low=1)
    lr: float = _setting(
        1e-3, "learning rate of AdamW; 0.0002 where --model is given", f"{OURS}: tuned on the built-in model; {LORA_LR}",
        above=0, high=1,
    )  # fmt: skip
    batch_size: int = _setting(32, "examples per optimizer step", low=1)
    warmup: float = _setting(0.1, "fraction of the steps that warm the learning rate up", low=0, high=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig:
    """Proximal policy optimisation."""

    iterations: int = _setting(70, "rounds of sample, score, update (0 skips the stage)", low=0)
    prompts: int = _setting(128, "prompts per iteration", f"{NPLUS}: 512 samples per update", low=1)
    samples: int = _setting(4, "samples per prompt", f"{NPLUS}: 512 samples per update", low=1)
    epochs: int = _setting(2, "passes over each iteration's samples", f"{NPLUS}: few epochs on a large batch", low=1)
    minibatches: int = _setting(2, "optimizer steps per pass", f"{PPO}, algorithm 1", low=1)
    lr: float = _setting(
        1e-3, "learning rate of AdamW; 0.00003 where --model is given", f"{OURS}: tuned on the built-in model; {LORA_LR}",
        above=0, high=1,
    )  # fmt: skip
    schedule: str = _setting(
        "linear",
        "learning rate after warm-up: falls to zero or stays",
        f"{NPLUS}: linear to 0",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = _setting(0.05, "fraction of the iterations that warm the learning rate up", low=0, high=1)
    clip: float = _setting(0.2, "clip range of the probability ratio", f"{PPO}, equation 7", above=0, below=1)
    gamma: float = _setting(1.0, "discount per token", NPLUS, low=0, high=1)
    lam: float = _setting(0.95, "lambda of generalised advantage estimation", f"{GAE}, equation 16; N+", low=0, high=1)
    kl_coef: float = _setting(0.05, "weight of the KL to the reference", f"{NPLUS}; TRL kl_coef", low=0)
    kl_estimator: str = _setting(
        "k1",
        "k1: in the reward; k2 or k3: in the loss",
        "Schulman 2020, Approximating KL divergence",
        choices=("k1", "k2", "k3"),
    )
    kl_target: float | None = _setting(
        None, "adapt the KL weight towards this KL per sample, in nats", f"{ZIEGLER}", above=0
    )
    entropy_coef: float = _setting(0.0, "weight of the entropy bonus", f"{PPO}, equation 9; N+: 0", low=0)
    whiten: bool = _setting(True, "whiten the advantages over the whole batch", f"{NPLUS}; arXiv 2404.10719")
    target_kl: float | None = _setting(
        None, "end an iteration's epochs once the policy moved this far, in nats", "OpenAI Spinning Up, PPO", above=0
    )
    max_grad_norm: float = _setting(1.0, "clip the gradient to this norm (SFT too)", f"{NPLUS}; TRL", above=0)
    adam_eps: float = _setting(1e-5, "epsilon of Adam (SFT too)", f"{NPLUS}, section on Adam", above=0, below=1)
    reference: str = _setting(
        "start",
        "policy that the KL is taken to: the one PPO starts from (after SFT), or the bare base",
        "Ouyang et al. 2022, InstructGPT (arXiv 2203.02155), section 3.5",
        choices=("start", "base"),
    )
    old_logprobs: str = _setting(
        "trainer",
        "who supplies the old log-probs: the training forward (first ratio exactly 1) or the sampler",
        "von Werra et al. 2024, RLOO in TRL (HF blog): recompute with the training forward",
        choices=("trainer", "sampler"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Sampling for PPO. Evaluation is greedy."""

    temperature: float = _setting(1.0, "temperature, divided out of the log-probs too", f"{NPLUS}; verl: 1", above=0)
    top_k: int = _setting(0, "sample among the k most likely tokens (0: all)", low=0)
    top_p: float = _setting(1.0, "sample among the fewest tokens with this probability (1: all)", above=0, high=1)
    max_new_tokens: int = _setting(4, "longest answer, in tokens", low=1)
    stop: tuple[str, ...] = _setting(
        (), r'text that ends an answer; \n is a newline; several as a JSON list, ["a", "b"]'
    )
    constrained: bool = _setting(
        False,
        "draw nothing but the answers of the task; ratio and KL stay of all tokens: right where constrained_mass is near 1",
    )
    slots: int = _setting(512, "sequences decoded at the same time", low=1)
    gap_limit: float | None = _setting(
        None,
        "largest gap between the sampler's and the trainer's log-probs, in nats (none: 1e-3 in float32, else 0.3)",
        above=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """What an answer is worth."""

    preset: str = _setting(
        "default",
        "rewards of a right, a wrong and a malformed answer: default 1, -1, -2; paper 1, 0, -1; code 1, -1, -3; where answers "
        "are numbers it falls evenly with the error, in paper and code as 2.5 - error",
        "paper, code: Somayajula et al. 2025 (arXiv 2410.11020), the article and its released code",
        choices=("default", "paper", "code"),
    )
    correct: float | None = _setting(None, "reward of the right answer (none: the preset's)", "RL4GLUE-style rewards +1 / -1")
    wrong: float | None = _setting(None, "reward of a wrong answer (none: the preset's)", "RL4GLUE-style rewards +1 / -1")
    malformed: float | None = _setting(
        None, "reward of text that is no answer (none: the preset's)", "between -1 (N+) and -3 (torchtune)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a run."""

    task: str = _setting("cola", "task to train on", pattern=(r"\S+", "the name of a task"))
    template: str = _setting(
        "short",
        "how the task is asked: short ends with the end token, tagged with </answer>",
        "tagged: as Somayajula et al. 2025 (arXiv 2410.11020), in other words",
        choices=("short", "tagged"),
    )
    fallback: str = _setting(
        "wrong",
        "what evaluation scores for an answer that is none: wrong, or the first label it names anywhere, else a random one",
        "random: Somayajula et al. 2025 (arXiv 2410.11020), released code",
        choices=("wrong", "random"),
    )
    model: str | None = _setting(None, "model folder or hub name (none: the built-in tiny model)")
    data: str | None = _setting(None, "data folder, file or hub name (none: the built-in corpus)")
    out: str | None = _setting(None, "run folder to make (none: runs/TASK-TIME)")
    seed: int = _setting(0, "seed of everything random", low=0, high=2**32 - 1)
    device: str = _setting(
        "auto",
        "where to run: auto, cpu, cuda or cuda:N",
        pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    )
    dtype: str = _setting(
        "auto",
        "numbers of the frozen base (auto: bfloat16 on a GPU, float32 on the CPU; nf4: 4 bits, computed in what auto is)",
        "nf4: Dettmers et al. 2023, QLoRA (arXiv 2305.14314)",
        choices=("auto", "float32", "bfloat16", "float16", "nf4"),
    )
    train_examples: int | None = _setting(None, "use only the first N of the shuffled train set", low=1)
    valid_examples: int = _setting(400, "held out of train to pick the best checkpoint, at most a tenth", low=0)
    eval_every: int = _setting(10, "PPO iterations between validations", low=1)
    checkpoint_every: int = _setting(10, "steps between checkpoints (SFT steps, PPO iterations)", low=1)
    micro_batch_tokens: int | None = _setting(
        None, "tokens of the tree per forward and backward: memory (none: 2048 on the CPU; on a GPU 8192, or what fits)", low=1
    )
    activations: str = _setting(
        "auto",
        "how activations reach backward: kept, computed again block by block from blocks' inputs, or those inputs kept in the "
        "host's memory (auto: kept where that fits, else computed again)",
        "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174)",
        choices=("auto", "keep", "recompute", "offload"),
    )
    max_prompt_tokens: int = _setting(1024, "longest allowed prompt, in tokens", low=1)
    trust_remote_code: bool = _setting(False, "run Python code that comes with the model")
    lora: LoraConfig = field(default_factory=LoraConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One leaf of `Config`: `section` is "" at the top; `kind` is str, int, float, bool or tuple (of str)."""

    section: str
    name: str
    kind: type
    optional: bool
    default: Any
    rule: Rule

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        return "--" + self.key.replace(".", "-").replace("_", "-")

    @property
    def allowed(self) -> str:
        """What the setting takes, in words: `a number above 0`."""
        rule = self.rule
        if rule.pattern:
            words = rule.pattern[1]
        elif rule.choices:
            words = "one of " + ", ".join(rule.choices)
        elif self.kind is bool:
            words = "true or false"
        elif self.kind is tuple:
            words = "a text, or a list of texts, none of them empty"
        elif self.kind is str:
            words = "a text that is not empty"
        else:
            low, high = rule.low, rule.high
            if self.kind is int and high is None:
                high = LARGEST_INT
            words = "a whole number" if self.kind is int else "a finite number"
            if low is not None and high is not None:
                words += f" from {low} to {high}"
            elif low is not None:
                words += f", {low} or more"
            elif rule.above is not None:
                words += f" above {rule.above}"
                if high is not None:
                    words += f" and up to {high}"
                elif rule.below is not None:
                    words += f" and below {rule.below}"
        return words + (", or none" if self.optional else "")


def _leaves(cls: type, section: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f.name)
            continue
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [typing.get_origin(option) or option for option in options if option is not types.NoneType]
        yield Setting(
            section=section,
            name=f.name,
            kind=kinds[0],
            optional=types.NoneType in options,
            default=f.default,
            rule=f.metadata["rule"],
        )


SETTINGS: dict[str, Setting] = {setting.key: setting for setting in _leaves(Config, "")}
# A model of a hundred million parameters and more wants smaller steps than the tiny built-in one. Ten times N+'s rate for full
# fine-tuning (3e-6) for PPO; the usual LoRA rate for SFT (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, table 9).
REAL_MODEL_DEFAULTS = {"sft.lr": 2e-4, "ppo.lr": 3e-5}
# Of settings that are no more: what does what they did.
REPLACED = {"value.detach": ("value.trunk", "detached"), "value.adapter": ("value.trunk", "own")}
SECTIONS: dict[str, type] = {
    f.name: typing.cast(type, f.default_factory) for f in dataclasses.fields(Config) if "rule" not in f.metadata
}


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


class _UniqueKeyLoader(yaml.SafeLoader):
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


def read_tree(path: Path) -> dict[Any, Any]:
    """What a YAML or TOML file holds, with the names at its top. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"settings file {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"settings file {path}: is not UTF-8 text") from None
    if path.suffix == ".toml":
        try:
            tree: object = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"settings file {path}: is not TOML: {error}") from None
    elif path.suffix in (".yaml", ".yml"):
        try:
            tree = yaml.load(text, Loader=_UniqueKeyLoader)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"settings file {path}{line}: {error.problem}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"settings file {path}: is not YAML: {str(error).splitlines()[0]}") from None
    else:
        raise UserError(f"settings file {path}: the name must end in .yaml, .yml or .toml")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"settings file {path}: expected settings by name, not {type(tree).__name__}")
    return tree


def _read_file(path: Path) -> dict[str, object]:
    """The values of a settings file by key."""
    values: dict[str, object] = {}
    for key, value in flatten(read_tree(path), str(path)):
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
        file: a YAML or TOML file with the sections nested, or None.

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
    ppo, value = config.ppo, config.value
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
