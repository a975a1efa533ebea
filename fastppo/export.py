"""``fastppo export``: the trained adapter in PEFT's format, or the whole model with the adapter merged in."""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from pathlib import Path

import rich.console
from peft import PeftModel
from rich.text import Text

from fastppo import files
from fastppo.config import Config
from fastppo.errors import UserError
from fastppo.evaluate import open_run, read_adapter
from fastppo.model import nf4
from fastppo.model.load import Base, first_line, load_base


def export_run(run: Path, to: Path, merged: bool, console: rich.console.Console) -> None:
    """Write the run's adapter and tokenizer, or a merged model, to a new folder that plain transformers and peft load.

    A merged model of a base in 4 bits has plain weights: the values that its 4 bits stand for, and the adapter.

    Raises:
        UserError: the run has no adapter yet, or it is damaged, or the base model cannot be loaded, or not in plain weights
            for a merged model.
    """
    config, adapter = open_run(run, console)
    read_adapter(adapter)
    base = load_base(config)
    if merged and nf4.in_4_bits(base.model):
        base = _in_plain_weights(base, config)
    try:
        with warnings.catch_warnings():  # of peft's own calls into transformers
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base.model, str(adapter))
    except Exception as error:  # peft and torch raise kinds of their own
        raise UserError(f"{adapter}: the adapter cannot be loaded: {first_line(error)}") from None
    with files.write_folder(Path(os.path.abspath(to))) as fresh:  # "." has no name that a folder could be renamed to
        if merged:
            model.merge_and_unload().save_pretrained(str(fresh))
        else:
            for path in sorted(adapter.iterdir()):
                shutil.copyfile(path, fresh / path.name)
        base.tokenizer.save_pretrained(str(fresh))
    how = "transformers.AutoModelForCausalLM" if merged else "peft.AutoPeftModelForCausalLM"
    # Without the type, transformers loads the base in the type of its file, which need not be the one it was trained in.
    options = f"dtype={base.model.dtype}"
    if config.dtype == "nf4" and not merged:
        quantised = f"load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype={base.model.dtype}"
        options += f", quantization_config=transformers.BitsAndBytesConfig({quantised})"
    call = f"{how}.from_pretrained({str(to)!r}, {options})"
    console.print(Text(f"wrote {to}; load it with {call}"), soft_wrap=True)
    rows = [] if merged else nf4.rows_wrong_on_cpu(base.model)
    if rows:
        instead = "" if base.model.hf_quantizer.pre_quantized else ", or export with --merged"
        wrong = f"rows of {', '.join(map(str, rows))} entries, no multiples of 64"
        console.print(Text(f"on a GPU: on a CPU bitsandbytes gets {wrong}, wrong{instead}"), soft_wrap=True)


def _in_plain_weights(base: Base, config: Config) -> Base:
    """The base with plain weights of the values that it was trained with, not of those it had before they were quantised."""
    dense = load_base(dataclasses.replace(config, dtype=str(base.model.dtype).removeprefix("torch.")))
    if nf4.in_4_bits(dense.model):
        raise UserError(
            f"--merged: the base {base.name!r} is stored in 4 bits and has no plain weights; export without --merged"
        )
    nf4.copy_dequantised(base.model, dense.model)
    return dense
