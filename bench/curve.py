"""Learning curves of finished or running runs, as one picture.

    python -m bench.curve RUN [RUN ...] --out FILE.svg

Solid: mean reward of the sampled answers of each PPO iteration. Marked: MCC on the held-out part of the train set. The
dashed line is the mean dev MCC of the runs after SFT.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path

from fastppo.files import read_json_lines

from .plots import COLORS, OTHERS, picture


def draw(runs: list[Path], out: Path) -> None:
    """Draw the runs' curves to ``out`` (its suffix names the format)."""
    starts = []
    with picture(out, 7.5, 4) as figure:
        axes = figure.axes[0]
        for color, run in zip(cycle([*COLORS.values(), *OTHERS]), runs, strict=False):
            rows = [row for row in read_json_lines(run / "metrics.jsonl") if row["stage"] == "PPO"]
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            axes.plot([r["step"] for r in rows], [r["reward"] for r in rows], color=color, alpha=0.35, linewidth=1)
            marked = [(r["step"], r["valid_mcc"]) for r in rows if "valid_mcc" in r]
            axes.plot(*zip(*marked, strict=True), color=color, marker="o", markersize=4, label=f"seed {summary['seed']}")
            if "sft" in summary["stages"]:
                starts.append(summary["stages"]["sft"]["mcc"])
        if starts:
            axes.axhline(sum(starts) / len(starts), color="0.4", linestyle="--", linewidth=1, label="dev MCC after SFT (mean)")
        axes.set_xlabel("PPO iteration")
        axes.set_ylabel("reward (thin), held-out MCC (marked)")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args.runs, args.out)


if __name__ == "__main__":
    main()
