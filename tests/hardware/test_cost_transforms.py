"""Costs under vmap, swept, and differentiated in the smooth mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import FORMATS, INT8, TINY, formats

from ssvq_jax.hardware import Accelerator, cost, merge_equal, presets, stack_formats, sweep


@pytest.mark.parametrize("overlap", ["ideal", "one_ahead", "serial"])
def test_vmap_over_accelerators_and_recipes_is_the_loop(overlap):
    a = dataclasses.replace(presets["edge-ews-64"], overlap=overlap)
    names = ("ssvq", "vq", "uniform")
    stacked = merge_equal(stack_formats([FORMATS[name] for name in names]))
    bandwidth = np.array([1e8, 1e9, 1e10])

    @jax.jit
    def grid(stacked, bandwidth):
        def one(layers, bytes_per_s):
            faster = dataclasses.replace(a, dram_bytes_per_s=bytes_per_s)
            return cost(layers, faster).network.latency_s

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(stacked, bandwidth)

    with jax.enable_x64(True):
        found = np.asarray(grid(stacked, bandwidth))
    for i, name in enumerate(names):
        each = [
            cost(FORMATS[name], dataclasses.replace(a, dram_bytes_per_s=x)).network.latency_s
            for x in bandwidth
        ]
        np.testing.assert_allclose(found[i], each, rtol=1e-12)
        swept = sweep(FORMATS[name], a, dram_bytes_per_s=bandwidth)
        np.testing.assert_allclose(swept.latency_s, each, rtol=1e-12)
    for other in (INT8, formats(9)["ssvq"], merge_equal(FORMATS["ssvq"])):
        with pytest.raises(ValueError, match="of different workloads"):
            stack_formats([FORMATS["ssvq"], other])
    with pytest.raises(ValueError, match="no formats to stack"):
        stack_formats([])


def test_sweep_goes_over_every_combination():
    found = sweep(INT8, TINY, rows=[1, 2, 4], lookups_per_cycle=[1, 2])
    assert found.latency_s.shape == (3, 2)
    assert found.compute_cycles.dtype == np.float64
    by_itself = cost(INT8, dataclasses.replace(TINY, rows=4)).network
    assert found.compute_cycles[2].tolist() == [by_itself.compute_cycles] * 2
    assert found.bound.tolist() == [["compute"] * 2, ["dram"] * 2, ["dram"] * 2]


SWEPT = ("rows", "columns", "clock_hz", "dram_bytes_per_s", "lookups_per_cycle", "mac_pj")


@pytest.mark.parametrize("dataflow", ["ws", "is", "os", "ews"])
def test_gradients_agree_with_finite_differences(dataflow):
    """Of the smooth mode, in sign and, as everything is computed in float64, in size."""
    a = Accelerator("any", 24.0, 40.0, dataflow, dram_bytes_per_s=3e8, vector_ops_per_cycle=4)

    def value(values, sharpness):
        found = cost(FORMATS["ssvq"], dataclasses.replace(a, **values), sharpness=sharpness)
        return found.network.latency_s * 1e6 + found.network.energy_j * 1e6

    values = {name: np.float64(getattr(a, name)) for name in SWEPT}
    with jax.enable_x64(True):
        gradient = jax.grad(value)(jax.tree.map(jnp.asarray, values), 0.8)
    assert any(abs(float(x)) > 0 for x in gradient.values())
    for name, slope in gradient.items():
        step = 1e-5 * values[name]
        up, down = (float(value(values | {name: values[name] + x}, 0.8)) for x in (step, -step))
        assert float(slope) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-12), name


def test_larger_arrays_help_by_gradient_and_in_truth():
    """Where computing is the limit, the smooth slope for rows has the sign of the exact change."""
    a = Accelerator("any", 8.0, 8.0, "ws", dram_bytes_per_s=1e12)

    def latency(rows, sharpness=None):
        found = cost(FORMATS["int8"], dataclasses.replace(a, rows=rows), sharpness=sharpness)
        return found.network.latency_s

    with jax.enable_x64(True):
        slope = jax.grad(lambda rows: latency(rows, 0.5))(jnp.asarray(8.0))
    assert slope < 0
    assert latency(16.0) < latency(8.0)


def test_smooth_rounding_approaches_the_ceiling():
    exact = cost(FORMATS["ssvq"], presets["edge-ews-64"]).network.latency_s
    errors = [
        abs(
            cost(FORMATS["ssvq"], presets["edge-ews-64"], sharpness=r).network.latency_s / exact - 1
        )
        for r in (0.9, 0.99, 0.9999)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


@pytest.mark.usefixtures("as_installed")
def test_what_is_refused():
    with pytest.raises(ValueError, match="sharpness=1: give 0 to below 1"):
        cost(INT8, TINY, sharpness=1)
    with pytest.raises(ValueError, match="accelerator 'tiny': clock_hz=0: give more than 0"):
        cost(INT8, dataclasses.replace(TINY, clock_hz=0))
    two = dataclasses.replace(TINY, rows=np.array([2.0, 4.0]))
    with pytest.raises(ValueError, match=r"\['rows'\] of accelerator 'tiny' have an axis too many"):
        cost(INT8, two)
    with pytest.raises(ValueError, match="the layers have an axis too many: use sweep, or jax.vm"):
        cost(stack_formats([INT8, INT8]), TINY)
    with pytest.raises(ValueError, match=r"cannot sweep over \['bandwidth'\]"):
        sweep(INT8, TINY, bandwidth=[1.0])
    with pytest.raises(ValueError, match="rows=.*give at least 1"):
        sweep(INT8, TINY, rows=[0, 1])
    with pytest.raises(ValueError, match="rows: give a list of values"):
        sweep(INT8, TINY, rows=[])
