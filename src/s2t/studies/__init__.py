"""Studies: questions about a pair or an adapter, each answered by one resumable run with a table and a picture.

A study is made of the ordinary workflows; every one of them keeps a run folder of its own below the study's, so that a killed
study goes on from there. Knows no model and no loop.
"""

from __future__ import annotations

from s2t.studies.run import STUDIES, study

__all__ = ["STUDIES", "study"]
