"""Measurements: every module with a command of its own says in its docstring what it measures."""

import logging
import warnings

# As `fastppo.__main__`: bitsandbytes warns of a kernel that is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Of peft's own calls into transformers.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
