"""From texts to token ids, for tokenizers that open, close or merge texts in their own way."""

import pytest
from tiny import merging_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from fastppo.batch.encode import encode_answer, encode_prompts, prompt_limit
from fastppo.config import load_config
from fastppo.errors import UserError
from fastppo.tasks import Example, get_task

COLA = get_task("cola")
EXAMPLES = [Example({"sentence": s}, 1, f"train.tsv:{i + 1}") for i, s in enumerate(["The cat sees the dogs.", "She"])]


def closing_tokenizer():
    """Closes every text with </s>, as T5's or some LLaMA conversions do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, closing_tokenizer])
def test_prompts(make):
    tokenizer = make()
    prompts = encode_prompts(tokenizer, COLA, EXAMPLES, limit=1000, limit_name="--max-prompt-tokens")
    for example, ids in zip(EXAMPLES, prompts, strict=True):
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == COLA.prompt(example)
        assert type(ids) is list


def test_no_prompts():
    assert encode_prompts(tiny_tokenizer(), COLA, [], limit=10, limit_name="x") == []


def test_a_prompt_of_nothing_but_an_end_token_is_left_as_it_is():
    """Some tokenizers use one token for both begin and end of a text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0, "x": 1}, unk_token="</s>")), eos_token="</s>"
    )
    prompts = encode_prompts(tokenizer, COLA, EXAMPLES[:1], limit=99, limit_name="x")
    assert prompts == [[0]]


def test_too_long_a_prompt_names_its_row():
    prompts = encode_prompts(tiny_tokenizer(), COLA, EXAMPLES, limit=1000, limit_name="x")
    longest, other = len(prompts[0]), len(prompts[1])
    assert other < longest
    with pytest.raises(UserError, match=rf"train.tsv:1: .*{longest} tokens.*at most {longest - 1} \(--max-prompt-tokens\)"):
        encode_prompts(tiny_tokenizer(), COLA, EXAMPLES, limit=longest - 1, limit_name="--max-prompt-tokens")
    assert encode_prompts(tiny_tokenizer(), COLA, EXAMPLES, limit=longest, limit_name="x") == prompts


def test_too_long_a_prompt_names_its_file_by_the_whole_path():
    example = Example({"sentence": "The cat."}, 1, "train.tsv:1", path="data/cola/train.tsv:1")
    with pytest.raises(UserError, match="^data/cola/train.tsv:1: its prompt has"):
        encode_prompts(tiny_tokenizer(), COLA, [example], limit=3, limit_name="x")


@pytest.mark.parametrize(
    ("positions", "limit", "way_out"),
    [
        (None, 100, "--max-prompt-tokens"),
        (200, 100, "--max-prompt-tokens; this model allows up to 190"),
        (111, 100, "--max-prompt-tokens; this model allows up to 101"),
        (110, 100, "the model's 110 positions less --sample-max-new-tokens 10; longer prompts need another --model, "),
        (11, 1, "the model's 11 positions less --sample-max-new-tokens 10; longer"),
    ],
)
def test_what_limits_a_prompt_and_the_way_out(positions, limit, way_out):
    config = load_config({"max_prompt_tokens": "100", "sample.max_new_tokens": "10"})
    found, name = prompt_limit(config, positions)
    assert found == limit and name.startswith(way_out) and (positions is None or positions > 110) == (len(name) == len(way_out))
    with pytest.raises(UserError, match="^--sample-max-new-tokens: 10 leaves no room for a prompt in the model's 10 pos"):
        prompt_limit(config, 10)


@pytest.mark.parametrize("make", [tiny_tokenizer, closing_tokenizer])
@pytest.mark.parametrize("answer", [" yes", " no"])
def test_answer_in_place(make, answer):
    """Prompt and answer together are what the tokenizer makes of the whole text; one end token closes them."""
    tokenizer = make()
    text = COLA.prompt(EXAMPLES[0])
    prompt = encode_prompts(tokenizer, COLA, EXAMPLES, limit=1000, limit_name="x")[0]
    ids = encode_answer(tokenizer, text, prompt, answer)
    assert prompt + ids == [*tiny_tokenizer()(text + answer)["input_ids"], tokenizer.eos_token_id]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_answer_of_a_tokenizer_that_merges_across_the_border():
    """The prompt that the sampler continues ends in ``:``; so the answer keeps its own tokens."""
    tokenizer = merging_tokenizer()
    prompt = tokenizer("ok:")["input_ids"]
    together = tokenizer("ok: yes")["input_ids"]
    assert together[: len(prompt)] != prompt
    ids = encode_answer(tokenizer, "ok:", prompt, " yes")
    assert tokenizer.decode(prompt + ids[:-1]) == "ok: yes" and ids[-1] == tokenizer.eos_token_id
    assert encode_answer(tokenizer, "ok:", prompt, "no")[:-1] == tokenizer("no")["input_ids"]
