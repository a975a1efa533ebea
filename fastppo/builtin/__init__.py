"""What fastppo runs on without a hub: an acceptability corpus made by its own grammar, and a tiny pretrained base model."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
