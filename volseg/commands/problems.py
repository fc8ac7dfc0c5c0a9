"""A problem as `volseg check` lists it."""

from __future__ import annotations

from volseg.errors import VolsegError

Problem = dict[str, str]  # where, code, problem, fix


def problem_at(where: str, code: str, problem: str, fix: str = "") -> Problem:
    """Return a problem; its code tells error, warning and note apart."""
    return {"where": where, "code": code, "problem": problem, "fix": fix}


def problem_of(where: str, error: VolsegError) -> Problem:
    """Return the problem that an error states."""
    return problem_at(where, error.code, error.problem, error.fix)
