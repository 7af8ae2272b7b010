"""The protocol: equal bits, equal draws, equal treatment; and the tables that are made of it."""

import dataclasses
import json

import ablation_freezing
import compression_curve
import compression_tuning
import gradient_dominance
import jax
import numpy as np
import pytest
from ablation_freezing import TUNED, variants
from ablation_freezing import tables as ablation_tables
from compression_curve import LABELS, rates, tables
from compression_tuning import RATES, SEED, TRIALS, USED, draw, ranking, tuned
from methods import METHODS
from protocol import NETWORKS, plan_of, run_method
from tables import differences, mean_and_deviation, percent, signed
from units import Results

from ssvq_jax.models import create, param_shapes
from ssvq_jax.training.optimizer import FreezeConfig, OptimizerConfig


@pytest.mark.parametrize("model", ["vit_cifar", "resnet20_cifar"])
def test_rates_are_what_they_are_called_and_equal_for_all_methods(model):
    shapes = param_shapes(create(model))
    found: dict[float, dict[str, float]] = {}
    for method in LABELS:
        for bits in rates(model, method):
            table = plan_of(NETWORKS[model], METHODS[method][bits], shapes).bits()
            found.setdefault(bits, {})[method] = table.main.bits_per_weight
    for bits, by_method in found.items():
        steps = by_method.pop("uniform", None)  # a step of 16 bits a channel
        assert steps is None or bits < steps < bits + 0.2
        for actual in by_method.values():
            assert bits < actual < 1.04 * bits
        if by_method:
            assert max(by_method.values()) < 1.03 * min(by_method.values())


@pytest.mark.parametrize("model", NETWORKS)
def test_every_kernel_is_compressed_or_an_end(model):
    plan = plan_of(NETWORKS[model], METHODS["vq"][1.25], param_shapes(create(model)))
    dense = {leaf.path for leaf in plan.leaves} - set(plan.compressed)
    assert not [path for path in dense if path.endswith("kernel")]


def test_a_trial_has_the_same_rates_for_all_methods():
    for trial in range(TRIALS):
        draws = {method: draw(method, trial) for method in USED}
        for name in ("dense", "codebook"):
            assert len({getattr(draws[m], name) for m in USED if name in USED[m]}) == 1
        assert draws["ssvq"] == dataclasses.replace(draws["ssvq-freeze"], freeze=None)


def test_draws_fill_their_ranges():
    for name, (low, high) in RATES.items():
        method = "uniform" if name == "latent" else "ssvq-freeze"
        found = sorted(getattr(draw(method, trial), name) for trial in range(TRIALS))
        places = np.log(np.array(found) / low) / np.log(high / low)
        assert np.array_equal(np.floor(TRIALS * places), np.arange(TRIALS))


def test_the_least_validation_loss_wins():
    def row(trial, loss):
        return {"settings": {"model": "m", "method": "vq", "trial": trial}, "loss_validation": loss}

    found = ranking([row(0, 0.3), row(1, 0.1), row(2, 0.2)], "m", "vq")
    assert [r["settings"]["trial"] for r in found] == [1, 2, 0]


def _changes(one, other):
    return {key for key, value in dataclasses.asdict(one).items() if getattr(other, key) != value}


def test_the_ablation_changes_one_thing_at_a_time():
    base = OptimizerConfig(freeze=FreezeConfig(every=50, start=0.2, end=0.05, momentum=0.02))
    found = variants(base)
    assert found[TUNED] == (base, 1.0)
    assert "thresholds 0.2 to 0.05" not in found  # that is how it was tuned
    low = found["thresholds 0.05 to 0.01"][0].freeze
    average = found["low thresholds, to the sign of an average"][0].freeze
    assert average == dataclasses.replace(low, freeze_to="average")
    assert found["no freezing"] == (dataclasses.replace(base, freeze=None), 1.0)
    assert found["alpha 2"] == (base, 2.0)
    for name, (optimizer, alpha) in found.items():
        assert dataclasses.replace(optimizer, freeze=base.freeze) == base, name
        if optimizer.freeze is not None:
            start = low if name.startswith("low thresholds") else base.freeze
            changed = _changes(start, optimizer.freeze) - {"end"}
            assert len(changed) == (name != TUNED and not name.startswith("alpha")), name
        assert (alpha != 1.0) == name.startswith("alpha")


def test_a_search_that_was_not_finished_chooses_nothing(tmp_path):
    rows = [
        {"settings": {"model": "m", "method": "vq", "trial": 0, "trials": TRIALS, "seed": SEED},
         "loss_validation": 1.0, "unit": "a", "written": "0"}
    ]  # fmt: skip
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": rows}))
    with pytest.raises(SystemExit, match=f"has 1 of {TRIALS} draws of 'vq' for 'm'"):
        tuned(Results(file, tmp_path / "units"), "m", "vq")


@pytest.mark.parametrize(
    "experiment", [ablation_freezing, compression_curve, compression_tuning, gradient_dominance]
)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_has_its_units(experiment, quick):
    """The committed search has what the default settings ask for."""
    found = experiment.units(experiment.Config(quick=quick))
    assert len({unit.name for unit in found}) == len(found) > 1
    if not quick:
        assert json.loads(json.dumps([unit.settings for unit in found]))


@pytest.mark.parametrize("method", [pytest.param("uniform", marks=pytest.mark.slow), "ssvq-freeze"])
def test_a_run_gives_every_figure(method, data_dir):
    network = dataclasses.replace(NETWORKS["deit_digits"], steps=2)

    def weights(name):
        model = create(name)
        params = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 28, 28, 1)))["params"]
        return params, {}

    bits = 2.0 if method == "uniform" else 1.25
    # Optax mixes dtypes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        row, done = run_method(
            network,
            METHODS[method][bits],
            draw(method, 0),
            0,
            data_dir=data_dir,
            test=True,
            name="run",
            weights=weights,
        )
    assert done.state.step == 2
    assert row["compression_ratio"] == pytest.approx(32 / row["bits_per_weight"])
    for key in ("accuracy_before", "accuracy_validation", "accuracy_test"):
        assert 0 <= row[key] <= 1
    assert ("frozen" in row) == (method == "ssvq-freeze")


# Tables


def test_figures_as_text():
    rows = [{"seed": 0, "a": 0.5}, {"seed": 1, "a": 0.7}]
    assert percent(rows, "a") == "60.00 ± 14.14"
    assert percent(rows, "b") == ""
    assert mean_and_deviation([1.0]) == "1.00"
    others = [{"seed": 1, "a": 0.6}, {"seed": 0, "a": 0.5}]
    assert differences(rows, others, "a") == pytest.approx([0.0, 10.0])
    assert signed(differences(others, rows, "a")) == "-5.00 ± 7.07"
    assert signed([]) == "-"


def made_up(method, bits, seed, test):
    return {
        "model": "vit_cifar", "method": method, "bits": bits, "seed": seed,
        "bits_per_weight": bits, "compression_ratio": 32 / bits, "stored_ratio": 10.0,
        "accuracy_validation": test, "accuracy_test": test,
    }  # fmt: skip


def test_claims_are_differences_by_seed():
    rows = [made_up("float", 32.0, 0, 0.9)]
    for seed in (0, 1, 2):
        rows += [made_up("vq", 1.5, seed, 0.8), made_up("ssvq-freeze", 1.5, seed, 0.85)]
    found = tables(rows)
    claims = found["compression_curve vit_cifar claims"].splitlines()
    assert "| SSVQ less VQ | +5.00 ± 0.00 |" in claims
    assert not [line for line in claims if "learned" in line]  # neither was run
    assert "| share of VQ's loss recovered | 50 % |" in claims
    curve = found["compression_curve vit_cifar table"].splitlines()
    assert "| VQ | 1.500 | 21.3x | 10.0x | 80.00 ± 0.00 | 80.00 ± 0.00 | 3 |" in curve


def test_the_ablation_compares_with_what_was_tuned():
    def row(variant, test):
        return {"variant": variant, "seed": 0, "accuracy_validation": 0.5, "accuracy_test": test}

    table = ablation_tables([row(TUNED, 0.8), row("no freezing", 0.79)])["ablation_freezing table"]
    assert "| no freezing |  |  | 50.00 | 79.00 | -1.00 | 1 |" in table
    low, average = "thresholds 0.05 to 0.01", "low thresholds, to the sign of an average"
    rows = [row(TUNED, 0.8), row(low, 0.7), row(average, 0.75)]
    table = ablation_tables(rows)["ablation_freezing table"]
    assert f"| {low} |  |  | 50.00 | 70.00 | -10.00 | 1 |" in table
    assert f"| {average} |  |  | 50.00 | 75.00 | +5.00 | 1 |" in table
