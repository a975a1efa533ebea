"""Fixtures for every test: public data and small models that lie beside the repository on some machines."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in triton's interpreter. Triton looks when it is imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets; the test is skipped where there is none."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small public models; the test is skipped where there is none."""
    return _shared("models")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {name} folder in a folder 'shared' beside the repository")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny model and a small data folder; see ``small.World``."""
    from small import World

    return World.make(tmp_path_factory.mktemp("world"))
