"""Random orders that are the same for ever.

They come from raw 64-bit words of a counter-based generator, whose stream NumPy guarantees across versions and machines
(that of `Generator.permutation` it does not).
"""

import numpy as np


def permutation(n: int, *stream: int) -> np.ndarray:
    """A random permutation of range(n), int64 [n], the same for the same `stream` (non-negative integers) for ever."""
    words = np.random.Philox(np.random.SeedSequence(stream)).random_raw(n)
    return np.argsort(words, kind="stable")
