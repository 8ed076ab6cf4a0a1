"""What a run takes of a slice of TPUs, found by compiling it for chips that nobody needs to have."""

from grpo_jax.planning.chips import CHIPS, Chip, Slice, open_slice
from grpo_jax.planning.mesh_search import Found, search
from grpo_jax.planning.plan import Plan, make_plan, to_json
from grpo_jax.planning.tables import show

__all__ = ["CHIPS", "Chip", "Found", "Plan", "Slice", "make_plan", "open_slice", "search", "show", "to_json"]
