"""Problems and their grading: splits, prompts, generators, benchmark files and answer comparison.

Knows no models. `load_task` turns a task spec into a `Task`; everything else is what tasks are made of.
"""

from s2t.tasks.graders import canonical_answer, extract_answer, grade_math
from s2t.tasks.problems import (
    PROMPTS,
    SPLITS,
    Task,
    check_disjoint,
    heldout_templates,
    load_task,
    question_hash,
    split_digest,
    split_fraction,
    split_of,
)

__all__ = [
    "PROMPTS",
    "SPLITS",
    "Task",
    "canonical_answer",
    "check_disjoint",
    "extract_answer",
    "grade_math",
    "heldout_templates",
    "load_task",
    "question_hash",
    "split_digest",
    "split_fraction",
    "split_of",
]
