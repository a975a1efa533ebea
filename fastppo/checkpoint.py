"""Checkpoints of a run: everything that training changes, written whole or not at all.

All randomness is drawn from (seed, stage, step), so a checkpoint holds no generator state: a run that goes on from any
checkpoint computes what the unbroken run computed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppo import files
from fastppo.errors import UserError

KEEP = 2
TENSORS = ("model", "optimizer", "best")


class Checkpoint(NamedTuple):
    """state: plain values. model: adapters and value head. optimizer: its moments. best: ``model`` at the best validation."""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]


def save_checkpoint(run: Path, number: int, checkpoint: Checkpoint) -> None:
    """Write ``checkpoints/NUMBER`` and remove all but the last ``KEEP``."""
    folder = run / "checkpoints"
    with files.write_folder(folder / f"{number:06d}") as fresh:
        for name in TENSORS:
            save_file(getattr(checkpoint, name), fresh / f"{name}.safetensors")
        held = {"state": checkpoint.state, "sha256": {name: _digest(fresh, name) for name in TENSORS}}
        (fresh / "state.json").write_text(json.dumps(held, indent=1), encoding="utf-8")
    for old in _numbered(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint, or None before the first.

    Raises:
        UserError: it is damaged.
    """
    folders = _numbered(run / "checkpoints")
    if not folders:
        return None
    try:
        held = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
        if held["sha256"] != {name: _digest(folders[-1], name) for name in TENSORS}:
            raise ValueError
        return Checkpoint(held["state"], *(load_file(folders[-1] / f"{name}.safetensors") for name in TENSORS))
    except Exception as error:  # safetensors raises kinds of its own
        raise UserError(
            f"checkpoint {folders[-1]}: damaged ({type(error).__name__}); remove that folder to go on from the one before"
        ) from None


def _digest(folder: Path, name: str) -> str:
    with open(folder / f"{name}.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []


def save_adapter(run: Path, tensors: dict[str, Tensor], peft_config: LoraConfig) -> None:
    """Write ``adapter/`` in PEFT's format; ``tensors`` by PEFT's names."""
    ordered = copy.copy(peft_config)
    if isinstance(ordered.target_modules, set):  # whose order differs from process to process
        ordered.target_modules = sorted(ordered.target_modules)
    with files.write_folder(run / "adapter") as fresh:
        ordered.save_pretrained(str(fresh))
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
