"""fastppo: PPO and LoRA for language models on one GPU."""

__version__ = "0.1.0"
