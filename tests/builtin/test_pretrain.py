"""The pretraining script, end to end for a few steps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.builtin import pretrain

TINY = "--tokens 600 --vocab 300 --hidden 32 --layers 1 --heads 2 --row 32 --batch 2 --threads 1".split()


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr(pretrain, "TOKENIZER_DOCUMENTS", 200)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the script sets them: other tests compare bits with processes of one thread


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_on_the_grammar(tmp_path) -> None:
    pretrain.main(["--out", str(tmp_path / "a"), *TINY])
    pretrain.main(["--out", str(tmp_path / "b"), *TINY])
    pretrain.main(["--out", str(tmp_path / "c"), "--seed", "1", *TINY])
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert model.dtype == torch.float32 and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (32, 1, 300)


def test_on_text(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("Ein Satz über Bären.\n\nNoch ein Satz 🐻.\n", encoding="utf-8")
    (tmp_path / "two.txt").write_text("A third document.\n", encoding="utf-8")
    out = tmp_path / "deep" / "model"
    pretrain.main(["--out", str(out), "--text", str(tmp_path / "one.txt"), str(tmp_path / "two.txt"), *TINY])
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = tokenizer("Noch ein Satz 🐻.", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert torch.isfinite(model(ids).logits).all()
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_learns(tmp_path) -> None:
    """On one repeated line the loss goes far below that of guessing (ln 300 = 5.7 nats)."""
    (tmp_path / "one.txt").write_text("The same words again and again.\n")
    loss = pretrain.pretrain(
        tmp_path / "m", [tmp_path / "one.txt"], tokens=64 * 60, vocab=300, hidden=32, layers=1, heads=2, row=32,
        batch=2, lr=1e-2, bf16=False, seed=0,
    )  # fmt: skip
    assert loss < 2


def test_documents_are_packed_without_loss(tmp_path) -> None:
    tokenizer = pretrain.train_tokenizer(["one two three", "four"], 270)
    source = pretrain.rows(iter(["one two three", "four"] * 512), tokenizer, 7)
    first, second = next(source), next(source)
    assert len(first) == len(second) == 8
    assert first[-1] == second[0]  # the last target is the first input of the next row
    text = tokenizer.decode(first[:-1] + second)
    assert text.startswith("<s>one two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--vocab", "100"], "--vocab 100: must be at least 259"),
        (["--hidden", "50", "--heads", "4"], "--hidden 50: must be a multiple"),
        (["--tokens", "0"], "--tokens 0"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
    ],
)
def test_one_line_for_a_wrong_setting(tmp_path, capsys, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        pretrain.main(["--out", str(tmp_path / "m"), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_empty_text(tmp_path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(SystemExit):
        pretrain.main(["--out", str(tmp_path / "m"), "--text", str(tmp_path / "empty.txt")])
    assert "no text" in capsys.readouterr().err
