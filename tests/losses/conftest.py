"""A random ragged batch, and finite differences in float64."""

import numpy as np
import pytest


class Ragged:
    """Rows of different lengths, an empty one, weights of 0, 2 and 0.5, a hole in the mask, decisions in no unit."""

    def __init__(self, seed: int, rows: int = 8, length: int = 7):
        draw = np.random.default_rng(seed)
        self.lengths = np.concatenate([[0, length, 1], draw.integers(1, length + 1, rows - 3)])
        self.mask = np.arange(length) < self.lengths[:, None]
        self.mask[1, 2] = False  # a hole: a given token inside the completion
        self.logps = -draw.exponential(1.0, (rows, length))
        self.old_logps = self.logps + draw.normal(0, 0.3, (rows, length))
        self.ref_logps = self.logps + draw.normal(0, 0.8, (rows, length))
        self.sampler_logps = self.old_logps + draw.normal(0, 0.5, (rows, length))
        self.advantages = np.repeat(draw.normal(0, 1, (rows, 1)), length, 1)
        self.weights = np.array([1.0, 1.0, 2.0, 0.0, 0.5] + [1.0] * (rows - 5))
        self.unit_ids = np.sort(draw.integers(-1, 3, (rows, length)), 1)

    def garbage(self, name: str, seed: int = 0) -> np.ndarray:
        """The array with NaN and infinities wherever the mask is off or the row's weight is 0."""
        fill = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf], self.mask.shape)
        return np.where(self.mask & (self.weights > 0)[:, None], getattr(self, name), fill)


@pytest.fixture
def ragged():
    return Ragged(0)


@pytest.fixture
def slope():
    """Central differences of a scalar function of a float64 array."""

    def differentiate(function, x, step=1e-6):
        x = np.asarray(x, np.float64)
        result = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[place] += step
            down[place] -= step
            result[place] = (function(up) - function(down)) / (2 * step)
        return result

    return differentiate
