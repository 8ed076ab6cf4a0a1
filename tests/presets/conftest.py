"""The batch that every stack is tried on."""

from types import SimpleNamespace

import numpy as np
import pytest
from transcriptions import GROUPS


@pytest.fixture(scope="session")
def data():
    """Rows of several lengths, one empty, one with a hole; garbage under the mask; groups of 4, 3, 1, 2."""
    draw = np.random.default_rng(0)
    n, t = len(GROUPS), 5
    mask = np.arange(t) < np.array([5, 3, 0, 2, 5, 4, 1, 3, 5, 2, 3])[:, None]
    mask[0, 2] = False
    logps = -draw.exponential(1.0, (n, t))
    old = logps + draw.normal(0, 0.35, (n, t))
    ref = logps + draw.normal(0, 0.5, (n, t))
    sampler = old + draw.normal(0, 0.4, (n, t))
    advantages = draw.choice([-1.3, 0.4, 1.1, -0.2], n)
    junk = np.where(mask, 0, draw.choice([np.nan, np.inf, -np.inf], (n, t)))
    dirty = {k: np.float32(v + junk) for k, v in {"logps": logps, "old": old, "ref": ref, "sampler": sampler}.items()}
    return SimpleNamespace(
        mask=mask, logps=logps, old=old, ref=ref, sampler=sampler, a=advantages, dirty=SimpleNamespace(**dirty)
    )
