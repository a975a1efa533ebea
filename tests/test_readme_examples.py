"""Every Python example of README.md and docs/kernels.md runs, and does what its text says.

A block is named by a comment on the line before it (``<!-- example: NAME -->``, invisible when rendered). Here each name has
what its reader would bring along (a model, a tokenizer, data) and what must hold afterwards.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TEXT, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

import fastppo_kernels

REPO = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(?:<!-- example: (?P<name>\w+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("README.md", "docs/kernels.md")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def blocks() -> list[Any]:
    found = []
    for page in PAGES:
        for match in FENCE.finditer((REPO / page).read_text()):
            line = (REPO / page).read_text()[: match.start()].count("\n") + 1
            found.append(pytest.param(match["name"], match["code"], id=f"{page}:{line}:{match['name']}"))
    return found


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = tiny_config("llama", len(tiny_tokenizer()))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def words(tokenizer: Any, n: int = 16) -> list[str]:
    sentences = [word for text in TEXT for word in text.split()]
    return [" ".join(sentences[i % 30 : i % 30 + 4]) for i in range(n)]


def run(code: str, **given: Any) -> SimpleNamespace:
    """The names that the block leaves behind."""
    torch.manual_seed(0)
    space = {"__name__": "example"} | given
    exec(compile(code, "<example>", "exec"), space)
    return SimpleNamespace(**space)


class Calls:
    """How often patched layers ran in the fast form, and log-probs came from fastppo_kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lora_linear = 0
        patching = importlib.import_module("fastppo_kernels.patch_peft")
        # A layer that is as it was at its last call goes past the checks of `lora_linear`.
        for name in ("lora_linear", "checked_group"):
            monkeypatch.setattr(patching, name, self._counting(getattr(patching, name)))
        self.selective_log_softmax = 0
        selective_log_softmax = fastppo_kernels.selective_log_softmax

        def counting_too(*args: Any, **kwargs: Any) -> Any:
            self.selective_log_softmax += 1
            return selective_log_softmax(*args, **kwargs)

        monkeypatch.setattr(fastppo_kernels, "selective_log_softmax", counting_too)

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.lora_linear += 1
            return function(*args, **kwargs)

        return counting


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    for name, value in {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return Calls(monkeypatch)


def losses(trainer: Any, key: str = "loss") -> torch.Tensor:
    return torch.tensor([row[key] for row in trainer.state.log_history if key in row])


def without_fastppo(code: str) -> str:
    """The same example as its reader had it before."""
    code = re.sub(r"^from fastppo_kernels import .*\n", "", code, flags=re.MULTILINE)
    code = re.sub(r"^trl\.trainer\.\w+\.selective_log_softmax = .*\n", "", code, flags=re.MULTILINE)
    code = code.replace("patch_peft(", "(")
    assert "fastppo" not in code and "patch_peft" not in code
    return code


def example_trainer(code: str, calls: Calls) -> None:
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text).input_ids[:8] for text in words(tokenizer)]
    length = min(map(len, ids))
    dataset = [{"input_ids": row[:length], "labels": row[:length]} for row in ids]
    found = losses(run(code, model=tiny_model(), dataset=dataset).trainer)
    assert len(found) == 12 and float(found[-3:].mean()) < 0.9 * float(found[:3].mean())
    assert calls.lora_linear == 12 * 2 * 7  # steps, decoder layers, linear layers of each
    before = losses(run(without_fastppo(code), model=tiny_model(), dataset=dataset).trainer)
    torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-3)
    assert calls.lora_linear == 12 * 2 * 7
    assert Path("runs/sft/adapter_model.safetensors").is_file()


def example_dpo(code: str, calls: Calls) -> None:
    from datasets import Dataset

    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    texts = words(None, 24)
    dataset = Dataset.from_list([{"prompt": text, "chosen": " yes yes", "rejected": " no"} for text in texts])
    own = dpo.selective_log_softmax

    def train(code: str) -> Any:
        return run(code, model=tiny_model(), tokenizer=tiny_tokenizer(), dataset=dataset).trainer

    try:
        trainer = train(code)
    finally:
        dpo.selective_log_softmax = own
    found = losses(trainer)
    assert abs(float(found[0]) - 0.6931) < 1e-3  # log 2: policy and reference are one at first
    assert float(found[-1]) < 0.6
    assert calls.lora_linear == 8 * 2 * 7 * 2  # TRL checkpoints the layers; the reference runs with its adapters off
    assert calls.selective_log_softmax == 8 * 2
    torch.testing.assert_close(found, losses(train(without_fastppo(code))), rtol=1e-3, atol=1e-3)


def example_grpo(code: str, calls: Calls) -> None:
    from datasets import Dataset

    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    dataset = Dataset.from_list([{"prompt": text} for text in words(None)])
    own = grpo.selective_log_softmax

    def train(code: str) -> Any:
        return run(code, model=tiny_model(), tokenizer=tiny_tokenizer(), dataset=dataset).trainer

    try:
        trainer = train(code)
    finally:
        grpo.selective_log_softmax = own
    assert calls.lora_linear > 0 and calls.selective_log_softmax > 0
    plain = train(without_fastppo(code))
    for key in ("loss", "reward", "kl"):
        found = losses(trainer, key)
        assert len(found) == 3
        torch.testing.assert_close(found, losses(plain, key), rtol=1e-2, atol=1e-3)


def example_ppo(code: str, calls: Calls) -> None:
    model = tiny_model()
    good = model.get_output_embeddings().weight[:, 0] > 0  # learnable with a frozen head
    left = run(code, model=model, prompts=torch.randint(3, 300, (32, 5)), reward=lambda answers: good[answers].float().mean(1))
    assert sum(left.history[-3:]) / 3 > sum(left.history[:3]) / 3 + 0.1, left.history
    assert calls.lora_linear > 0 and float(left.metrics["kl_ref_sum"]) > 0
    assert left.head.grad is None


def example_adapter_mask(code: str, calls: Calls) -> None:
    left = run(code, model=tiny_model().eval(), tokenizer=tiny_tokenizer())
    assert calls.lora_linear == 2 * 7  # one forward
    targets = left.tokens[:, 1:, None]

    def logprob() -> torch.Tensor:
        with torch.no_grad():
            return left.model(left.tokens).logits[:, :-1].log_softmax(-1).gather(-1, targets).squeeze(-1)

    torch.testing.assert_close(left.policy, logprob(), rtol=1e-4, atol=1e-5)
    with left.model.disable_adapter():
        torch.testing.assert_close(left.reference, logprob(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(left.policy, left.reference, atol=1e-2)


def example_lora_linear(code: str, calls: Calls) -> None:
    left = run(code)
    torch.testing.assert_close(left.y, left.x @ left.weight.T)  # B is 0
    assert left.weight.grad is None and not left.lora_A.grad.any() and left.lora_B.grad.any()


@pytest.mark.parametrize(("name", "code"), blocks())
def test_example(name: str, code: str, calls: Calls) -> None:
    check = globals().get(f"example_{name}")
    assert check is not None, "name the block with a comment before it, and give it a function here"
    check(code, calls)


def test_examples_are_found() -> None:
    """The examples the documentation promises; and none that no test sees."""
    names = {block.values[0] for block in blocks()}
    assert {"trainer", "dpo", "grpo", "ppo", "adapter_mask"} <= names
    for page in PAGES:
        assert len(FENCE.findall((REPO / page).read_text())) == (REPO / page).read_text().count("```python")
