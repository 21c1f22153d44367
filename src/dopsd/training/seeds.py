"""Seeds of the random numbers that training draws.

An image is generated from `torch.Generator().manual_seed(seed)`, whose stream depends on the lowest
32 bits of the seed. Training takes its seeds from the upper half of them, so that it never draws
the noise of a preview, of a sample, of a class image or of a health check, whose seeds lie in the
lower half.
"""

_NOISE, _ADAPTER, _COUNT = 2**31, 3 * 2**30, 2**30  # first seed of each range, and its length


def noise_seed(seed: int, index: int) -> int:
    """Of the noise and times of micro-batch `index` in a run with this seed; the same number only
    where (seed, index) is the same, or far apart (2^30 micro-batches)."""
    return _NOISE + (seed * 1_000_003 + index) % _COUNT


def adapter_seed(seed: int) -> int:
    """Of the start of the adapters in a run with this seed."""
    return _ADAPTER + seed % _COUNT
