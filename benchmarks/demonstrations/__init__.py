"""What each method claims, tried on the smallest problem that can show it, beside plain GRPO.

    python -m benchmarks.demonstrations               all of them
    python -m benchmarks.demonstrations bnpo tempo    some

A module here is named after its method and has `CLAIM`, what the paper says would happen, in a line, and
`demonstrate(seeds)`, which returns rows of numbers, one per seed, for plain GRPO and for the method. The outcome is
printed whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A metric of plain GRPO and of the method, one number per seed, and what the paper expects of the two.

    expected: ">" or "<", the method's mean against plain GRPO's; "=" equal within the spread; "" nothing is claimed.
    baseline: what stands in plain GRPO's place where the claim is against something else.
    """

    metric: str
    plain: Sequence[float]
    method: Sequence[float]
    expected: str = ""
    baseline: str = "grpo"
