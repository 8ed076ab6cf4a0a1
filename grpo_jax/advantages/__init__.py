"""Rewards and ids in, advantages out: pure functions over plain arrays, for any trainer.

`group_z_score` (GRPO), `group_centered` (Dr. GRPO) and `leave_one_out` (RLOO) compare within groups; `combine` and
`soft_overlong` shape the reward; `per_decision` spreads the advantage over a completion.
"""

from grpo_jax.advantages.group import group_centered, group_z_score, leave_one_out
from grpo_jax.advantages.shaping import combine, per_decision, soft_overlong

__all__ = ["combine", "group_centered", "group_z_score", "leave_one_out", "per_decision", "soft_overlong"]
