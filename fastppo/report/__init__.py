"""Reports: one self-contained HTML page of a run (`run`), and the building blocks of such pages (`blocks`)."""

from fastppo.report.run import NAME, run_report, write_report

__all__ = ["NAME", "run_report", "write_report"]
