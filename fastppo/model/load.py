"""Loading a frozen base and its tokenizer, with one clear line for everything that can be wrong with them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fastppo.builtin import MODEL_DIR
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.model import nf4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A frozen base model in evaluation mode, its tokenizer, and the ids that end an answer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    name: str


def pick_device(setting: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU; a GPU that is not there is an error."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(setting)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device: {setting!r} is not here; torch sees {torch.cuda.device_count()} GPUs, use cpu or auto"
        )
    return device


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """What a base computes in; one in 4 bits in what ``auto`` is."""
    if setting in ("auto", "nf4"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[setting]


def source_of(config: Config) -> tuple[str, str]:
    """(folder or hub name of the base model, how messages name it).

    Raises:
        UserError: no such folder, or one without a configuration.
    """
    source = str(MODEL_DIR) if config.model is None else os.path.expanduser(config.model)
    shown = "the built-in model" if config.model is None else f"model {config.model!r}"
    folder = Path(source)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{shown}: is a file; expected a folder with config.json, weights and tokenizer, or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{shown}: the folder has no config.json; expected a model saved with save_pretrained")
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"{shown}: no such folder")
    return source, shown


def be_quiet() -> None:
    """Transformers and the hub say what they have to say in exceptions; the rest would be lines between ours."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # without a network its retries log a dozen lines in front of the error


def load_base(config: Config) -> Base:
    """The base model and tokenizer that the settings name, on their device, frozen.

    Raises:
        UserError: no such folder, no configuration, weights that are missing, damaged or do not fit, no decoder, no
            bitsandbytes for 4 bits, a tokenizer that is missing or has no end-of-sequence token.
    """
    source, shown = source_of(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": dtype}
    if config.dtype == "nf4":
        options |= _in_4_bits(device, dtype)
    be_quiet()
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        check_decoder(found, shown)
        if getattr(found, "quantization_config", None) is not None:
            options["device_map"] = _whole_on(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise kinds of their own for a damaged folder
        missing_here = "" if Path(source).is_dir() else "no such folder, and the hub does not give it: "
        raise UserError(f"{shown}: cannot be loaded: {missing_here}{first_line(error)}") from error
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{shown}: the weights do not fit its config.json: {name!r} has shape {list(found)}, expected {list(wanted)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{shown}: the weights lack {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]!r}; "
            "expected the full weights of a decoder"
        )
    tokenizer = load_tokenizer(source, shown, config.trust_remote_code)
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    if config.dtype == "nf4" or nf4.in_4_bits(model):  # or stored so
        nf4.adopt(model, dtype, shown)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels launch on the current device
    return Base(model, tokenizer, _eos_ids(model, tokenizer, shown), source)


def check_decoder(found: PreTrainedConfig, shown: str) -> None:
    """Raises UserError for the configuration of a model that does not write from left to right, such as BERT's or T5's."""
    if "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {}):  # code of its own knows
        return
    if found.is_encoder_decoder:
        kind = "an encoder and decoder"
    elif type(found) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # transformers makes a decoder of some encoders too, which looks ahead unless its configuration says otherwise.
        if type(found) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(found, "is_decoder", False):
            return
        kind = "an encoder"
    else:
        kind = "an encoder" if type(found) in MODEL_FOR_MASKED_LM_MAPPING else "no language model"
    raise UserError(f"{shown}: is {kind} ({found.model_type}); expected a decoder, such as Llama or Qwen")


def _in_4_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What makes `from_pretrained` quantise a base, on its device."""
    try:
        why = nf4.obstacle(device)
    except Exception as error:  # whatever a wrong build of it raises
        why = first_line(error)
    if why:
        raise UserError(f"--dtype: nf4 is not possible here: {why}; it needs: pip install 'bitsandbytes>=0.50'")
    return {"quantization_config": nf4.quantisation(dtype), "device_map": _whole_on(device)}


def _whole_on(device: torch.device) -> dict[str, str]:
    """Left to itself, transformers puts a quantised model on the first GPU."""
    return {"": f"cuda:{device.index or 0}" if device.type == "cuda" else device.type}


def load_tokenizer(source: str, shown: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights. Raises UserError where there is none that answers could be made with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise UserError(f"{shown}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer("yes", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{shown}: its tokenizer is empty; expected tokenizer.json or the like beside the weights")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{shown}: its tokenizer has no end-of-sequence token (eos_token), so no answer could ever end")
    return tokenizer


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shown: str) -> tuple[int, ...]:
    """The tokenizer's end token first (what SFT teaches), then those that generation also stops at."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    others = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ids = tuple(dict.fromkeys([tokenizer.eos_token_id, *others]))
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        raise UserError(f"{shown}: end token {max(ids)} is outside its vocabulary of {rows}")
    return ids


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:240] + "...") if len(text) > 240 else text or type(error).__name__
