"""From a recipe to its result, in one folder; a killed run goes on where it was."""

from torchopt.run.pipeline import final_model as final_model
from torchopt.run.pipeline import matched as matched
from torchopt.run.pipeline import read_report as read_report
from torchopt.run.pipeline import run as run
