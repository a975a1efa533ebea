"""Run the small form of cases once on the GPU, and nothing else: what compute-sanitizer looks at.

python -m bench.gpu_checks.once NAME [NAME ...]
"""

import sys

import torch

from . import cases
from .case import evaluate
from .checks import SEED


def main(names: list[str]) -> None:
    device, by_name = torch.device("cuda"), {case.name: case for case in cases()}
    for name in names:
        print(f"== {name}", flush=True)
        case = by_name[name]
        for dtype in dict.fromkeys((case.main_dtype, case.dtypes[0])):
            evaluate(case, case.inputs(device, dtype, SEED, small=True), "triton", dtype)
        torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
