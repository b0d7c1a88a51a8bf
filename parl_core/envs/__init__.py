"""Environments: robot and tabular tasks behind one small interface, and tabular MDPs with exact solutions
(`envs.tabular`).

Simulators are imported when a task of theirs is made, not before.
"""

from .interface import Environment, Step
from .registry import environment_names, make_env
from .vector import Environments, Steps, make_environments

__all__ = ["Environment", "Environments", "Step", "Steps", "environment_names", "make_env", "make_environments"]
