"""What fastppo is measured against: which of it is installed here, and how to install the rest."""

from __future__ import annotations

import importlib.util

# Module, and what to give pip.
_PEERS = {
    "TRL": ("trl", "-c constraints.txt -e .[peers]"),
    "Liger-Kernel": ("liger_kernel", "-c constraints.txt -e .[peers]"),
    "peft": ("peft", "-c constraints.txt -e ."),
    "flash-attn": ("flash_attn", "-e .[flash]"),
    "xformers": ("xformers", "-e .[xformers]"),
}


def missing(peer: str) -> str | None:
    """None where the peer is installed, else one line that says how to install it."""
    module, install = _PEERS[peer]
    return None if importlib.util.find_spec(module) else f"{peer} is not installed: pip install {install}"
