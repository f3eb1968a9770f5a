"""Federated prompt tuning over MPI: train soft prompts of a frozen language model, measure, attack.

from fedprompt_mpi import RunConfig, run, load_prompt
"""

from fedprompt_mpi.commands.predict import load_prompt
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.run import run

__all__ = ["RunConfig", "SettingsError", "load_prompt", "run"]
