"""What ``visexpert try`` does: load a model in each role that the package has, and hold it against its own library."""

from visexpert.commands.trial.attempt import ROLES, Asked, Attempt, Comparison, Role
from visexpert.commands.trial.roles import attempts

__all__ = ["ROLES", "Asked", "Attempt", "Comparison", "Role", "attempts"]
