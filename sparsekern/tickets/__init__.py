"""Experiments with lottery tickets that run offline: one file a task, and what all of them are run and shown by."""

from sparsekern.tickets import digits, text
from sparsekern.tickets.problem import Problem

# by name, as the command line has them: the networks of a task, each with its data
TASKS = {"digits": digits.problems, "text": text.problems}

__all__ = ["TASKS", "Problem"]
