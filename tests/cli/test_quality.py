import jax
import pytest

from ssvq_jax.cli.quickstart import QuickstartCommand, compare


@pytest.mark.slow
def test_learned_signs_reach_a_lower_loss_than_vq_at_fewer_bits(tmp_path, data_dir):
    methods = ("vq-26x-shared", "ssvq-fixed-26x-shared", "ssvq-26x-shared")
    command = QuickstartCommand(
        out=tmp_path, data_dir=data_dir, methods=methods, float_steps=8000, steps=1000
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam multiplies integers with floats
        results, _ = compare(command)
    rows = results["methods"]
    assert results["float"]["accuracy"] > 0.94
    assert rows["ssvq-26x"]["bits_per_weight"] < rows["vq-26x"]["bits_per_weight"]
    assert rows["ssvq-26x"]["loss_after"] < rows["vq-26x"]["loss_after"]
    assert rows["ssvq-26x"]["loss_after"] < rows["ssvq-fixed-26x"]["loss_after"]
