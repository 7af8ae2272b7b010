import json
import re
import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names: dict = {}
        exec(code, names)
    assert names["logits"].shape == (64, 10)
    assert names["plan"].bits().main.compression_ratio > 20


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_table_is_generated_from_the_results_files(page):
    script = runpy.run_path(str(ROOT / "experiments" / "quickstart_seeds.py"))
    files = sorted((ROOT / "experiments" / "results").glob("quickstart_seed*.json"))
    assert len(files) >= 3
    text = (ROOT / page).read_text()
    table = script["table"]([json.loads(file.read_text()) for file in files])
    assert script["insert"](text, table) == text
    assert table in text


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
