"""Channels: which indices of which weights belong together, which of them matter least, and a network without those."""

from torchopt.channels.arguments import Arguments, Examples
from torchopt.channels.macs import count_macs
from torchopt.channels.note import Shrunken, shrunken_of, skipped_of
from torchopt.channels.remove import Channels, remove_channels

__all__ = ["Arguments", "Channels", "Examples", "Shrunken", "count_macs", "remove_channels", "shrunken_of", "skipped_of"]
