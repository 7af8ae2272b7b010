import json

from ssvq_jax import load_recipe, make_plan
from ssvq_jax.models import create, param_shapes
from ssvq_jax.report import plot_accuracy, plot_signs, print_bits, provenance

RECORDS = [{"step": 10, "accuracy": 0.5}, {"step": 20, "accuracy": 0.75}]


def test_bits_table_shows_the_plans_figures(capsys):
    table = make_plan(param_shapes(create("deit_digits")), load_recipe("vq-26x-shared")).bits()
    print_bits("digits", table)
    printed = capsys.readouterr().out
    assert f"{table.main.bits_per_weight:.4f}" in printed
    assert f"{table.file_ratio:.2f}x" in printed
    assert "blocks_codebook" in printed


def test_pictures_with_and_without_signs(tmp_path):
    signs = [{**record, "flipped": 0.1, "frozen": 0.0} for record in RECORDS]
    for name, runs in {"no": {"vq": RECORDS}, "some": {"vq": RECORDS, "ssvq": signs}}.items():
        plot_signs(runs, tmp_path / f"{name}-signs.png")
        plot_accuracy(runs, tmp_path / f"{name}-accuracy.png")
    sizes = {file.stem: file.stat().st_size for file in tmp_path.iterdir()}
    assert len(sizes) == 4
    assert sizes["some-signs"] > sizes["no-signs"]  # the lines are drawn


def test_provenance_is_plain_data_with_versions():
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["jax"]
    assert found["devices"] >= 1
