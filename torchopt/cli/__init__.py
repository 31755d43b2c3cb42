"""The command line: one function a command, and how results and mistakes meet the terminal."""

from torchopt.cli.commands import main

__all__ = ["main"]
