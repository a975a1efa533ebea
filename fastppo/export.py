"""``fastppo export``: the trained adapter in PEFT's format, or the whole model with the adapter merged in."""

from __future__ import annotations

import shutil
from pathlib import Path

import rich.console
from peft import PeftModel
from rich.text import Text

from fastppo import files
from fastppo.evaluate import open_run
from fastppo.model.load import load_base


def export_run(run: Path, to: Path, merged: bool, console: rich.console.Console) -> None:
    """Write the run's adapter and tokenizer, or a merged model, to a new folder that plain transformers and peft load."""
    config, adapter = open_run(run)
    base = load_base(config)
    with files.write_folder(to) as fresh:
        if merged:
            model = PeftModel.from_pretrained(base.model, str(adapter)).merge_and_unload()
            model.save_pretrained(str(fresh))
        else:
            for path in sorted(adapter.iterdir()):
                shutil.copyfile(path, fresh / path.name)
        base.tokenizer.save_pretrained(str(fresh))
    how = "AutoModelForCausalLM.from_pretrained" if merged else "peft.AutoPeftModelForCausalLM.from_pretrained"
    console.print(Text(f"wrote {to}; load it with {how}({str(to)!r})"), soft_wrap=True)
