"""What other stacks compute, under their own names and defaults, from the functions of this library.

    presets.trl.loss(logps, old_logps, advantages, mask, loss_type="dapo", beta=0.04, ref_logps=ref_logps)
    presets.verl.advantages("rloo", rewards, group_ids, mask)

Each `advantages` takes one reward per row and group ids, each `loss` log-probs [N, T] and returns the scalar to
differentiate. Where stacks give different numbers under one name, this is where to look:

                          TRL           verl               Tunix           NeMo RL          OpenRLHF
    version               1.9.0 + 26    0.7.0 + 125        0.1.7 + 326     2026-08-22       0.11.0
    std, epsilon          n - 1, 1e-4   n - 1, 1e-6        n - 1, 1e-6     others', 1e-6    n - 1, 1e-9
    group of one          0             the reward itself  refused         0                refused
    whitening, variance   n - 1, 1e-4   n - 1, + 1e-8      none            n, max 1e-8      n, max 1e-8
    KL, default weight    k3, 0         k3, 0.001, if on   k1, 0.04        k3, 0.01         k1, 0.01, in the reward
    KL bounded by         nothing       10                 nothing         10               10
    gradient of k3        1 - exp(-d)   1 - exp(-d)        1 - exp(-d)     d                1 - exp(-d)
    dual clip             delta, none   3                  none            none             none
    default aggregation   tokens of     tokens             sequences       tokens           tokens
                          the step
    GSPO averages over    as loss_type  sequences          as agg. mode    sequences        sequences, KL tokens
    CISPO's bounds        the weight,   1 - low, 1 + high  no CISPO        1 - low,         no CISPO
                          above only                                       1 + high
    Dr. GRPO's            N * length    length, and not N  rows * width    no such mode     no such mode
    denominator

d is logps - ref_logps. Each module says what it was compared with and what it leaves out. Exactly equal rewards give
exactly 0 here, where float32 sums in other stacks may leave a rounding error over epsilon. Denominators are those of
the rows given; where a loss is to be cut into micro-batches or over a mesh, build it from `losses`, whose weights are
made once for all rows.
"""

from grpo_jax.presets import nemo_rl, openrlhf, trl, tunix, verl

__all__ = ["nemo_rl", "openrlhf", "trl", "tunix", "verl"]
