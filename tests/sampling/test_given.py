"""Given decisions are read some columns at a time, however many there are."""

import jax
import numpy as np
import pytest

from grpo_jax.models import TransformerConfig, create
from grpo_jax.sampling import decoding, draw
from tests.sampling.test_decoding import CONTEXT, V, cells, log_softmax, next_logits, run, sizes, stop_table

LONG = 27


@pytest.mark.parametrize("longest", [7, 8, 17, LONG])
def test_many_are_scored_in_several_passes_as_in_float64(monkeypatch, longest):
    """Passes of eight columns; the last of them ends with the last column, whether or not that is a multiple of it."""
    monkeypatch.setattr(decoding, "READ", 8 * LONG)
    rng = np.random.default_rng(longest)
    lengths = rng.integers(0, longest + 1, (2, 4)).astype(np.int32)
    lengths[1, 2] = longest
    given = rng.integers(0, V, (2, 4, LONG)).astype(np.int32)
    nothing_more = {"budget": lengths, "stops": stop_table(), "stops_apply": np.zeros((2, 4, 4), bool)}
    jax.clear_caches()  # of what another number of columns at a time was compiled for
    got = run(cells(2, 4, LONG, given=given, given_lengths=lengths, **nothing_more), has_given=True)
    jax.clear_caches()
    np.testing.assert_array_equal(got.lengths, lengths)
    for c, g in np.ndindex(2, 4):
        row = [int(token) for token in given[c, g, : lengths[c, g]]]
        wanted = [log_softmax(next_logits([[*CONTEXT, *row[:t]]])[0])[token] for t, token in enumerate(row)]
        np.testing.assert_allclose(got.sampler_logps[c, g], [*wanted, *[0.0] * (LONG - len(row))], atol=2e-5)


def test_of_2048_given_decisions_a_sixteenth_is_in_hand_at_a_time():
    """No array of the compiled program holds a layer's activations of all of them."""
    c, g, t, width = 2, 3, 2048, 37
    config = TransformerConfig(
        vocab_size=V, hidden_size=16, intermediate_size=width, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8
    )
    graphdef, params = create(config, jax.random.key(0))
    lowered = draw.lower(graphdef, params, cells(c, g, t), jax.random.key(0), restricts=(), has_given=True)
    found = {size // (c * g * width) for size in sizes(lowered.compile().as_text()) if size % (c * g * width) == 0}
    assert 1 < max(found) <= t // 16
