"""Channels: which indices of which weights belong together, which of them matter least, and a network without those."""

from torchopt.prune.channels.arguments import Arguments, Examples
from torchopt.prune.channels.macs import count_macs
from torchopt.prune.channels.note import Shrunken, shrunken_of, skipped_of
from torchopt.prune.channels.remove import Channels, remove_channels

__all__ = ["Arguments", "Channels", "Examples", "Shrunken", "count_macs", "remove_channels", "shrunken_of", "skipped_of"]
