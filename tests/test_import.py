"""What importing costs: the command line answers without PyTorch, and the kernels need nothing of the engine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "scipy", "sklearn", "pandas"}
SITE_CODE = """
import sys
before = set(sys.modules)
{code}
print("LOADED", *sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


def loaded_by(code: str) -> set[str]:
    path = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", SITE_CODE.format(code=code)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import fastppo",
        "from fastppo.cli import main; assert main(['--help']) == 0",
        "from fastppo.cli import main; assert main(['train', '--help']) == 0",
        "from fastppo.cli import main; assert main(['train', '--ppo-lr', '0']) == 2",
        "import fastppo.track",
        "import fastppo.report",
    ],
)
def test_the_command_line_loads_nothing_heavy(code):
    assert loaded_by(code) & HEAVY == set()


def test_kernels_need_only_torch_and_triton():
    # Whatever torch loads by itself is torch's; the question is what the kernels add.
    with_kernels = loaded_by("import fastppo_kernels")
    allowed = loaded_by("import torch") | set(sys.stdlib_module_names) | {"fastppo_kernels", "triton"}
    assert "torch" in with_kernels
    assert with_kernels - allowed == set()


def test_the_engine_takes_only_public_names_of_the_kernels():
    taken = []
    for path in sorted((REPO / "fastppo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastppo_kernels":
                taken += [f"{path.name}: {node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                taken += [f"{path.name}: {each.name}" for each in node.names if each.name.startswith("fastppo_kernels")]
    assert len(taken) > 20 and [name for name in taken if "._" in name] == []


# What each part may import: what stands before it.
LEVELS = (("batch", "tasks"), ("model",), ("rollout", "rewards"), ("algorithms",), ("trainer",), ("cli",))


def test_the_engine_imports_downwards():
    """By way of whatever lies between: `model` imports the plan of memory, which knows how the sampler decodes."""
    taken: dict[str, set[str]] = {}
    for path in sorted((REPO / "fastppo").rglob("*.py")):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        found = taken[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # of modules: what is loaded with them
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                found |= {node.module} | {f"{node.module}.{each.name}" for each in node.names}
            elif isinstance(node, ast.Import):
                found |= {each.name for each in node.names}
    above: set[str] = {each for level in LEVELS for each in level}
    upwards = []
    for level in LEVELS:
        above -= set(level)
        seen = {name for name in taken if name.split(".")[1:2] and name.split(".")[1] in level}
        assert seen, level
        ahead = sorted(seen)
        while ahead:
            name = ahead.pop()
            for other in sorted(taken[name] & set(taken) - seen):
                seen.add(other)
                ahead.append(other)
                if other.split(".")[1:2] and other.split(".")[1] in above:
                    upwards.append(f"{name} imports {other}")
    assert upwards == []


def test_no_package_named_kernels():
    # A package of that name would shadow the public one that transformers looks for.
    assert not (REPO / "kernels" / "__init__.py").exists()
