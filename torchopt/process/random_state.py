"""Random state that stays the caller's: Python's, numpy's and torch's generators, as they were before.

Whatever runs a network for its own purposes (a proof, a trace, a count) must not change what the user draws next. Importing libraries
counts too: some draw a number while they are imported.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Put back the state of every random generator at the end.

    Args:
        seed: what all of them are set to at the beginning; None leaves them as they are.

    Example:
        >>> before = torch.get_rng_state()
        >>> with random_state_kept(seed=0):
        ...     a = torch.rand(3)
        >>> with random_state_kept(seed=0):
        ...     b = torch.rand(3)
        >>> torch.equal(a, b), torch.equal(torch.get_rng_state(), before)
        (True, True)
    """
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
