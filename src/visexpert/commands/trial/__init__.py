"""Load a model in each role for ``visexpert try``, and compare it with its own library."""

from visexpert.commands.trial.attempt import ROLES, Attempt, Comparison, Request, Role
from visexpert.commands.trial.roles import attempts

__all__ = ["ROLES", "Request", "Attempt", "Comparison", "Role", "attempts"]
