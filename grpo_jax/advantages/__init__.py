"""Rewards and ids in, advantages out: pure functions over plain arrays, for any trainer.

    adv = advantages.group_z_score(rewards, group_ids)                        # [N]
    adv = advantages.per_decision(adv, mask)                                  # [N, T]

The classical estimators are in `group`, `baselines`, `whitening` and `returns`; other ways to compare in `median`,
`beta`, `virtual`, `strata`, `tree`, `ranks`, `channels`, `constraints` and `pairing`; what is known of prompts, and
where completions go, in `tracker`, `shrunk`, `success`, `allocation`, `values`, `novelty` and `diversity`; rewards
before they are compared in `shaping`, `lengths`, `gates`, `mixing`, `preferences`, `unlikely` and `asymmetry`.
docs/library.md has tables of all.
"""

from grpo_jax.advantages.allocation import (
    contrast_allocation,
    contrast_value,
    exploration_allocation,
    half_width,
    knapsack_allocation,
    knapsack_value,
    mixed_group_cost,
)
from grpo_jax.advantages.asymmetry import anchored, asymmetric
from grpo_jax.advantages.baselines import length_weighted, over_greedy, signal_scaled
from grpo_jax.advantages.beta import beta_normalized, beta_parameters, beta_weights
from grpo_jax.advantages.channels import decoupled, decoupled_over_decisions, decoupled_over_rows, gate
from grpo_jax.advantages.constraints import constrained, dual_init, dual_update
from grpo_jax.advantages.diversity import ngram_diversity
from grpo_jax.advantages.gates import posterior_process, posterior_reward, serial_decay, top_groups
from grpo_jax.advantages.group import batch_scaled, group_centered, group_z_score, keep_singletons, leave_one_out
from grpo_jax.advantages.lengths import (
    band_length,
    brevity,
    budget_at,
    exponential_budgets,
    format_length,
    peaked_length,
    spaced_budgets,
    triangular_length,
)
from grpo_jax.advantages.median import compensated, median_centered
from grpo_jax.advantages.mixing import rubric_mixed
from grpo_jax.advantages.novelty import novelty_sharpened
from grpo_jax.advantages.pairing import pair_advantages, pair_z_score, success_bands
from grpo_jax.advantages.preferences import tournament, win_rates
from grpo_jax.advantages.ranks import item_ids, per_rank, rank_rewards, rank_z_scores, with_length_terms
from grpo_jax.advantages.returns import at_last, discounted_returns
from grpo_jax.advantages.shaping import combine, per_decision, soft_overlong
from grpo_jax.advantages.shrunk import another_is_worth_it, shrinkage, shrunk_mean
from grpo_jax.advantages.strata import stratified
from grpo_jax.advantages.success import SuccessWindow, success_rates, success_window
from grpo_jax.advantages.tracker import (
    Tracker,
    completion_drift,
    forgetting,
    prompt_weights,
    single_stream,
    success_rate,
    tracker_init,
    tracker_update,
)
from grpo_jax.advantages.tree import prefix_gains, prefix_tree
from grpo_jax.advantages.unlikely import discount_likely
from grpo_jax.advantages.values import staged_reward, task_values, value_counts, value_sampled
from grpo_jax.advantages.virtual import weighted_signs, with_virtual_best
from grpo_jax.advantages.whitening import reinforce_plus_plus, reinforce_plus_plus_baseline, whiten_rows, whiten_tokens

__all__ = [
    "SuccessWindow",
    "Tracker",
    "anchored",
    "another_is_worth_it",
    "asymmetric",
    "at_last",
    "band_length",
    "batch_scaled",
    "beta_normalized",
    "beta_parameters",
    "beta_weights",
    "brevity",
    "budget_at",
    "combine",
    "compensated",
    "completion_drift",
    "constrained",
    "contrast_allocation",
    "contrast_value",
    "decoupled",
    "decoupled_over_decisions",
    "decoupled_over_rows",
    "discount_likely",
    "discounted_returns",
    "dual_init",
    "dual_update",
    "exploration_allocation",
    "exponential_budgets",
    "forgetting",
    "format_length",
    "gate",
    "group_centered",
    "group_z_score",
    "half_width",
    "item_ids",
    "keep_singletons",
    "knapsack_allocation",
    "knapsack_value",
    "leave_one_out",
    "length_weighted",
    "median_centered",
    "mixed_group_cost",
    "ngram_diversity",
    "novelty_sharpened",
    "over_greedy",
    "pair_advantages",
    "pair_z_score",
    "peaked_length",
    "per_decision",
    "per_rank",
    "posterior_process",
    "posterior_reward",
    "prefix_gains",
    "prefix_tree",
    "prompt_weights",
    "rank_rewards",
    "rank_z_scores",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rubric_mixed",
    "serial_decay",
    "shrinkage",
    "shrunk_mean",
    "signal_scaled",
    "single_stream",
    "soft_overlong",
    "spaced_budgets",
    "staged_reward",
    "stratified",
    "success_bands",
    "success_rate",
    "success_rates",
    "success_window",
    "task_values",
    "top_groups",
    "tournament",
    "tracker_init",
    "tracker_update",
    "triangular_length",
    "value_counts",
    "value_sampled",
    "weighted_signs",
    "whiten_rows",
    "whiten_tokens",
    "win_rates",
    "with_length_terms",
    "with_virtual_best",
]
