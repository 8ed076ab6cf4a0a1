"""Rows that one launch of the sampler left unfinished, because there was no room for them, and another goes on with.

What they have so far is given, and read again. Host only, numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from grpo_jax.sampling.decoding import Drawn
from grpo_jax.sampling.requests import Rows


class SoFar(NamedTuple):
    """What is drawn of all rows."""

    rows: Rows
    drawn: Drawn | None = None

    def left(self) -> np.ndarray:
        """Numbers of the rows that are not done."""
        if self.drawn is None:
            return np.arange(len(self.rows))
        return np.flatnonzero(~self.drawn.finished & (self.drawn.lengths < self.rows.budget))

    def asked(self, which: np.ndarray) -> Rows:
        """These rows, with what is drawn of them given."""
        rows = self.rows.take(which)
        if self.drawn is None:
            return rows
        given, tokens = self.drawn.lengths[which], self.drawn.tokens[which]
        least = np.maximum(rows.options["min_new"] - (given - rows.given_lengths), 0)
        return rows.replace(given=tokens, given_lengths=given, options={**rows.options, "min_new": least})

    def and_of(self, which: np.ndarray, drawn: Drawn) -> SoFar:
        """With what was drawn of these rows from where they were. Log-probs stay those with which a token was drawn."""
        if self.drawn is None:
            return self._replace(drawn=drawn)
        old = self.drawn
        new = np.arange(old.tokens.shape[1]) >= old.lengths[which, None]

        def put(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
            whole = whole.copy()
            whole[which] = np.where(new, part, whole[which]) if part.ndim == 2 else part
            return whole

        return self._replace(drawn=Drawn(*map(put, old, drawn)))
