"""The report floor: a finished eval run becomes one self-contained HTML page and a few pictures.

It reads run folders only; it knows neither models nor tasks.
"""

from __future__ import annotations

from s2t.report.build import write_report

__all__ = ["write_report"]
