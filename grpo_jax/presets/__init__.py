"""What other stacks compute, under their own names and defaults, from the functions of this library.

    presets.trl.loss(logps, old_logps, advantages, mask, loss_type="dapo", beta=0.04, ref_logps=ref_logps)
    presets.verl.advantages("rloo", rewards, group_ids, mask)

Each `advantages` takes one reward per row and group ids, each `loss` log-probs [N, T] and returns the scalar to
differentiate. Where stacks give different numbers under one name, this is where to look:

                          TRL           verl               Tunix           NeMo RL          OpenRLHF
    std, epsilon          n - 1, 1e-4   n - 1, 1e-6        n - 1, 1e-6     others', 1e-6    n - 1, 1e-9
    group of one          0             the reward itself  not allowed     0                0
    equal rewards         0             0                  0               0                0
    KL, default weight    k3, 0         k3, 0.001          k3, 0.04        k3, 0.01         k3, 0
    dual clip             delta, none   3                  none            none             none
    default aggregation   tokens of     tokens             sequences       tokens           tokens
                          the step
    CISPO's upper bound   the weight    1 + epsilon_high
    Dr. GRPO's            N * length    length, and not N
    denominator

Each module says what of this was not compared with its stack's source. Exactly equal rewards give exactly 0 here, where
float32 sums in other stacks may leave a rounding error over epsilon. Denominators are those of the rows given; where a
loss is to be cut into micro-batches or over a mesh, build it from `losses`, whose weights are made once for all rows.
"""

from grpo_jax.presets import nemo_rl, openrlhf, trl, tunix, verl

__all__ = ["nemo_rl", "openrlhf", "trl", "tunix", "verl"]
