"""Names of slices, and what is said of those that there are not."""

import sys

import pytest

from grpo_jax.planning.chips import CHIPS, open_slice, parse_topology


def test_a_slice_is_a_chip_and_its_sides():
    chip, shape = parse_topology("v5e:4x8")
    assert (chip.name, shape) == ("v5e", (4, 8))
    assert parse_topology("V5P:8x8x8")[1] == (8, 8, 8)


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5x:4x4", "no TPU 'v5x'; did you mean v5"),
        ("v5e:3x3", r"no slice '3x3'; the nearest are (2x4|4x4), (2x4|4x4), 2x2 \(written v5e:2x2\)"),
        ("v5p:8x8", "no slice '8x8'; the nearest are 4x4x4"),
        ("v6e", "no slice ''"),
        ("v6e:4,4", "no slice '4,4'; the nearest are 4x4"),
    ],
)
def test_an_unknown_slice_is_an_error_that_names_the_nearest(name, said):
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r"pip install 'grpo_jax\[tpu\]'"):
        open_slice("v5e:2x2")


def test_less_than_one_slice_is_an_error():
    with pytest.raises(ValueError, match="--slices is the number of slices, 1 or more, got 0"):
        open_slice("v5e:2x2", 0)


@pytest.mark.parametrize("name", CHIPS)
def test_published_figures_of_a_chip_hang_together(name):
    chip = CHIPS[name]
    assert 100e12 < chip.peak < 1000e12
    assert chip.hbm < chip.hbm_bandwidth < chip.peak / 100  # an arithmetic intensity of hundreds of FLOPs per byte
    assert chip.dcn < chip.link < chip.hbm_bandwidth
    assert chip.ports == 2 * (2 if name in ("v5e", "v6e") else 3)
