"""The language experiments on a made-up model, and what they share."""

import json

import jax
import language_activations
import language_curve
import language_finetuning
import numpy as np
import pytest
from search import best_trial, reported, spread
from units import conduct

from ssvq_jax.models.llama import LlamaConfig


@pytest.fixture(autouse=True)
def as_users_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("other", ["vq", "gptq"])
def test_a_quick_curve(other, tmp_path):
    out = tmp_path / "rows.json"
    config = language_curve.Config(quick=True, methods=("rtn", other), bits=(4.0,), out=out)
    conduct(
        "language_curve", language_curve.units, language_curve.tables, language_curve.plot, config
    )
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"float", "rtn", other}
    assert rows["float"]["agreement_test"] == 1
    assert rows["rtn"]["bits_per_weight"] > 4
    assert rows["rtn"]["perplexity_test"] != rows[other]["perplexity_test"]
    if other == "gptq":
        assert rows["gptq"]["bits_per_weight"] == rows["rtn"]["bits_per_weight"]
        assert rows["gptq"]["damping_most"] >= 0.0099  # 0.01 as a float32
    text = language_curve.tables(list(rows.values()))["language_curve table"]
    assert len(text.splitlines()) == 2 + 3
    assert (tmp_path / "language_curve.png").exists()


@pytest.mark.slow
def test_a_quick_curve_with_blocks_fine_tuned(tmp_path):
    out = tmp_path / "rows.json"
    config = language_curve.Config(
        quick=True, methods=("gptvq", "gptvq-blocks"), bits=(3.0,), out=out
    )
    conduct(
        "language_curve", language_curve.units, language_curve.tables, language_curve.plot, config
    )
    _, plain, tuned = sorted(json.loads(out.read_text())["rows"], key=lambda row: row["method"])
    assert all(after < before for before, after in tuned["block_errors"])
    assert tuned["perplexity_test"] != plain["perplexity_test"]
    assert tuned["seconds_blocks"] > plain["seconds_blocks"] == 0


@pytest.mark.slow
def test_a_quick_finetuning(tmp_path):
    out = tmp_path / "rows.json"
    language_finetuning.main(language_finetuning.Config(quick=True, methods=("ssvq",), out=out))
    (row,) = json.loads(out.read_text())["rows"]
    assert row["perplexity_test"] > 1
    assert row["seconds_by_part"]["train"] > 0


@pytest.mark.slow
def test_quick_activations(tmp_path):
    out = tmp_path / "rows.json"
    config = language_activations.Config(
        quick=True, bits=(32.0,), activations=(32.0, 3.0), windows=1, out=out
    )
    module = language_activations
    conduct("language_activations", module.units, module.tables, module.plot, config)
    coded, plain = sorted(
        json.loads(out.read_text())["rows"], key=lambda row: row["activation_bits"]
    )
    assert plain["agreement_test"] == 1
    assert coded["perplexity_test"] != plain["perplexity_test"]
    assert len(module.tables([plain, coded])["language_activations table"].splitlines()) == 2 + 2


def test_bits_of_activations_are_those_of_a_layers_four_inputs():
    # 16 dimensions in 4 bits: 64 a group, of which 4 are the amplitude's; 16 more a token.
    bits = language_activations.bits_of(LlamaConfig(), 4.0)
    assert bits == pytest.approx(4 + 4 * 16 / (3 * 576 + 1536))
    with pytest.raises(SystemExit, match="bits=.5.0.: choose of"):
        language_activations.units(language_activations.Config(bits=(5.0,)))
    with pytest.raises(SystemExit, match="activations: .*one pulse takes"):
        language_activations.units(language_activations.Config(activations=(0.25,)))


def test_every_rate_of_a_method_is_a_unit_once():
    found = language_curve.units(language_curve.Config(seeds=(0, 1)))
    names = [unit.name for unit in found]
    assert len(names) == len(set(names))
    assert "smollm2_135m vq 2 bits seed 1" in names
    assert "smollm2_135m rtn 2 bits seed 1" not in names  # nothing is drawn there
    with pytest.raises(SystemExit, match="methods=.*choose of"):
        language_curve.units(language_curve.Config(methods=("none",)))


def test_without_a_text_nothing_begins():
    with pytest.raises(SystemExit, match="give --wikipedia"):
        language_curve.open_model(language_curve.Config())


def test_rates_are_spread_over_their_range():
    rates = np.log10(spread("codebook", (1e-4, 1e-2), 8))
    assert sorted(np.floor((rates + 4) * 4).astype(int)) == list(range(8))
    assert spread("codebook", (1e-4, 1e-2), 8) != spread("sign", (1e-4, 1e-2), 8)


def test_the_best_draw_is_known_when_all_were_run():
    def row(stage, trial, loss):
        return {"method": "vq", "loss": loss, "settings": {"stage": stage, "trial": trial}}

    rows = [row("tuning", 0, 2.0), row("tuning", 1, 1.0), row("report", 1, 0.5)]
    assert best_trial(rows, "vq", 2, "loss") == 1
    assert best_trial(rows, "vq", 3, "loss") is None
    assert reported(rows, "vq") == rows[2:]
