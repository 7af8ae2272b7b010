"""The two experiments with networks of ImageNet, without their weights and data."""

import json

import efficientnet_float
import efficientnet_lite0 as lite
import imagenet_deit_tiny as deit
import jax
import numpy as np
import pytest
from search import SEED

from ssvq_jax.models import create, param_shapes
from ssvq_jax.recipe import PRESETS

LITE, DEIT = lite.Config(), deit.Config()


@pytest.fixture(scope="module")
def lite_shapes():
    return param_shapes(create(lite.MODEL))


def lite_units():
    tuning = [lite.unit(LITE, "tuning", m, SEED, i) for m in LITE.methods for i in range(4)]
    return tuning + [lite.unit(LITE, "report", m, s, 0) for m in LITE.methods for s in LITE.seeds]


def deit_units(tmp_path):
    return [deit.unit(DEIT, m, s, tmp_path) for m in DEIT.methods for s in (0, 1)]


@pytest.mark.parametrize("method", lite.QUANTIZERS)
def test_lite_has_1_75_bits_and_a_little_for_codebooks(method, lite_shapes):
    bits = lite.plan_of(method, lite_shapes).bits()
    assert lite.BITS < bits.main.bits_per_weight < 1.03 * lite.BITS
    assert bits.main.weights == 3_146_112  # all pointwise kernels


def test_lite_keeps_the_same_leaves_for_all_methods(lite_shapes):
    kept = set()
    for method in lite.QUANTIZERS:
        rows = lite.plan_of(method, lite_shapes).bits().rows
        others = [row for row in rows if row.name not in lite.SHARES]
        assert {row.method for row in others} == {"uniform", "dense"}
        kept.add(tuple((row.name, row.stored_bytes) for row in others))
    assert len(kept) == 1


def test_lite_codebooks_are_used_by_200_000_to_450_000_weights(lite_shapes):
    rows = lite.plan_of("vq", lite_shapes).bits().rows
    sizes = {row.name: row.weights for row in rows if row.name in lite.SHARES}
    assert sizes.keys() == lite.SHARES.keys()
    assert 200_000 < min(sizes.values()) <= max(sizes.values()) < 450_000


def test_units_have_names_of_their_own_and_plain_settings(tmp_path):
    for units in (lite_units(), deit_units(tmp_path)):
        assert len({unit.name for unit in units}) == len(units)
        for unit in units:
            assert json.loads(json.dumps(unit.settings))["method"] == unit.settings["method"]


def test_trials_have_equal_rates_for_all_methods():
    first, *others = (lite.optimizer_of(method, 2, 4, 100) for method in lite.QUANTIZERS)
    assert all((x.dense, x.codebook) == (first.dense, first.codebook) for x in others)
    freeze = lite.optimizer_of("ssvq-freeze", 2, 4, 100).freeze
    assert freeze is not None
    assert freeze.every == 5


def test_evened_out_layer_is_the_same_function():
    make = np.random.default_rng(0)
    kernel = make.normal(size=(1, 1, 4, 3)).astype(np.float32) * np.float32([0.01, 1.0, 9.0])
    bias, scale, mean, var = make.uniform(0.5, 2.0, (4, 3)).astype(np.float32)
    params = {"final": {"conv": {"kernel": kernel}, "bn": {"scale": scale, "bias": bias}}}
    params["stem"] = {"conv": {"kernel": kernel}}
    state = {"batch_stats": {"final": {"bn": {"mean": mean, "var": var}}}}
    inputs = make.normal(size=(5, 4))

    def layer(params, state):
        leaves, stats = params["final"], state["batch_stats"]["final"]
        leaves, stats = (jax.tree.map(lambda x: np.asarray(x, float), y) for y in (leaves, stats))
        found = inputs @ leaves["conv"]["kernel"][0, 0] - stats["bn"]["mean"]
        normalized = found / np.sqrt(stats["bn"]["var"] + 1e-3)
        return normalized * leaves["bn"]["scale"] + leaves["bn"]["bias"]

    new, new_state = efficientnet_float.even_out(params, state, 1e-3)
    np.testing.assert_allclose(layer(new, new_state), layer(params, state), rtol=1e-5)
    evened = np.asarray(new["final"]["conv"]["kernel"])
    size = np.sqrt(np.mean(evened**2, (0, 1, 2)))
    np.testing.assert_allclose(size, efficientnet_float.RMS, rtol=1e-5)
    np.testing.assert_array_equal(new["stem"]["conv"]["kernel"], kernel)


def test_parts_of_a_folder_have_no_image_in_common(tmp_path):
    folder = efficientnet_float.make_up_images(tmp_path / "images", 10)
    parts = efficientnet_float.folder_parts(folder)
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len({file for part in parts for file in part.files}) == 10
    assert parts[0].files == efficientnet_float.folder_parts(folder)[0].files


def lite_row(method, stage, trial, seed, divergence, agreement=0.5):
    sizes = {"bits_per_weight": 1.76, "compression_ratio": 18.2, "stored_ratio": 7.9}
    settings = {"stage": stage, "trial": trial, "steps": 100, "batch_size": 16}
    shares = {f"agreement_{part}": agreement for part in ("before", "validation", "test")}
    apart = {"divergence_validation": divergence, "divergence_test": divergence}
    told = {"method": method, "seed": seed, "examples": 100, "settings": settings}
    return {**told, **sizes, **shares, **apart}


def test_table_of_lite_is_of_the_reported_rows():
    rows = [
        lite_row("vq", "tuning", 0, 100, 9.0),
        lite_row("vq", "report", 0, 0, 1.0, 0.4),
        lite_row("vq", "report", 0, 1, 3.0, 0.6),
    ]
    text = lite.tables(rows)["efficientnet_lite0 table"]
    share = "50.00 ± 14.14"
    assert f"| VQ | 1.760 | 18.2x | 7.9x | {share} | {share} | {share} | 2.000 ± 1.414 |" in text
    assert "of 2 seeds" in text
    assert "9.0" not in text
    assert "| MVQ" not in text


def test_deit_runs_ten_epochs_and_freezes_every_500_updates():
    assert deit.steps_of(DEIT) == 12_511
    freeze = deit.optimizer_of(DEIT, "ssvq-freeze").freeze
    assert freeze is not None
    assert freeze.every == 500
    assert deit.optimizer_of(DEIT, "ssvq").freeze is None
    assert {recipe for recipe, _ in deit.METHODS.values()} <= PRESETS.keys()
    assert deit.METHODS.keys() == deit.LABELS.keys()


def test_proof_has_other_settings_than_the_experiment(tmp_path):
    proof = deit.unit(deit.proof(DEIT), "ssvq-freeze", 0, tmp_path).settings
    assert proof["weights"] is None
    assert proof["steps"] == 20
    assert proof["optimizer"]["freeze"]["every"] == 5


def test_table_of_deit():
    row = {"method": "mvq", "bits_per_weight": 1.6, "compression_ratio": 20.0, "accuracy": 0.25}
    text = deit.tables([{**row, "accuracy_before": 0.125}])["imagenet_deit_tiny table"]
    assert text.splitlines()[2] == "| MVQ | 1.600 | 20.0x | 12.50 | 25.00 |"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [lite, deit])
def test_quick(experiment, tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        experiment.main(experiment.Config(quick=True, out=tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["method"] for row in rows} <= experiment.LABELS.keys()
    assert all(row["settings"]["steps"] == 2 for row in rows)
