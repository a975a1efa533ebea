"""Every setting, once: nested frozen dataclasses, a field for each.

Each field carries its help, what is allowed and where its default comes from (`Rule`), and everything else (parsing,
checking, the command line, the help) is derived from that. `fastppo.config` fills and checks them.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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

    examples: int = _setting(400, "labelled examples used, of each task (0 skips the stage)", low=0)
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
    optimizer: str = _setting(
        "adamw",
        "optimizer of PPO (SFT has AdamW); adafactor: averages of rows and columns for Adam's moments, clipped updates",
        f"{NPLUS}: Adam; adafactor: Shazeer & Stern 2018 (arXiv 1804.04235), algorithms 4 and 5, without relative steps",
        choices=("adamw", "adafactor"),
    )
    lr: float = _setting(
        1e-3, "learning rate; 0.00003 where --model is given", f"{OURS}: tuned on the built-in model; {LORA_LR}",
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
    max_new_tokens_from: int | None = _setting(
        None,
        "draw the longest answer of each PPO iteration evenly from this to max_new_tokens (none: max_new_tokens)",
        "Somayajula et al. 2025 (arXiv 2410.11020), released code: 12 to 31",
        low=1,
    )
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

    task: str = _setting(
        "cola", "task to train on, or its file, or several: A,B",
        pattern=(r"\S(.*\S)?", "the name of a task, or its file, or A,B"),
    )  # fmt: skip
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
    data: str | None = _setting(
        None, "data folder, file or hub name; of several tasks a folder (none: the task's own, for cola the built-in corpus)"
    )
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
    train_examples: int | None = _setting(None, "use only the first N of the shuffled train set, of each task", low=1)
    valid_examples: int = _setting(400, "held out of train to pick the best checkpoint, of each task, at most a tenth", low=0)
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
