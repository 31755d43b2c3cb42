"""Channels: which indices of which weights belong together, which of them matter least, and a network without those."""

from torchopt.prune.channels.macs import count_macs
from torchopt.prune.channels.remove import Channels, remove_channels, skipped_of

__all__ = ["Channels", "count_macs", "remove_channels", "skipped_of"]
