import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ssvq_jax.cli.main import main
from ssvq_jax.hardware import load_accelerator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, word):
    """The README's one block of code that holds a word."""
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (code,) = [code for code in found if word in code]
    return code


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python", "freeze_signs")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names: dict = {}
        exec(code, names)
    assert names["logits"].shape == (64, 10)
    assert names["plan"].bits().main.compression_ratio > 20


@pytest.mark.parametrize(
    "word",
    [
        "packed_params",
        pytest.param("ssvq_jax.clustering", marks=pytest.mark.slow),
        "hardware.sweep",
    ],
)
def test_other_examples_run(word):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(blocks("python", word), {})


def test_the_hardware_page_s_examples_run(tmp_path):
    page = (ROOT / "docs/hardware.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    assert load_accelerator(tmp_path / "mine.yaml").weight_sram_bytes == 2**20


def test_the_calibration_page_s_example_runs():
    page = (ROOT / "docs/calibration.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, names)
    assert names["moments"].rows == {"hidden": 256, "last": 256}
    assert set(names["variables"]["vq"]) == {"hidden", "last"}


def commands(word):
    """The commands of a block, without the program's name and comments."""
    lines = [line.split("#")[0] for line in blocks("bash", word).splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.strip()]


@pytest.mark.slow
def test_own_model_and_images_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The commands as they stand there, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("flowers.py").write_text(blocks("python", "class Net"))
    Path("recipe.json").write_text(blocks("json", "sign_split"))
    generator = np.random.default_rng(0)
    for i, name in enumerate(("aster", "daisy", "lily", "rose", "tulip")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(30):
            height, width = generator.integers(60, 90, 2)
            pixels = generator.integers(0, 100, (height, width, 3), dtype=np.uint8)
            pixels[..., i % 3] += np.uint8(60 * (1 + i // 3))
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    of_runs, of_files = commands("ssvq finetune"), commands("ssvq inspect")
    assert [command[0] for command in of_runs] == [
        "train", "analyze", "compress", "finetune", "eval",
    ]  # fmt: skip
    assert [command[0] for command in of_files] == ["inspect", "eval", "pack", "export", "export"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for command in of_runs + of_files:
            short = ["--steps", "20", "--validate-every", "10"]
            main([*command, *(short if command[0] in ("train", "finetune") else ())])
    for run in ("float", "analysis", "small", "tuned"):
        for name in ("config.json", "metrics.jsonl", "results.json"):
            assert Path("runs", run, name).stat().st_size > 0
        assert list(Path("runs", run).glob("*.png"))
    found = json.loads(Path("runs/tuned/eval-test-best.json").read_text())
    assert found["after"]["examples"] == 15
    assert found["compression_ratio"] > 19
    program = jax.export.deserialize(bytearray(Path("model.hlo").read_bytes()))
    assert program.call(np.zeros((3, 64, 64, 3), np.float32)).shape == (3, 5)
    assert {"Conv_0/kernel", "Dense_0/bias"} <= {
        name.removeprefix("params/") for name in load_file("plain.safetensors")
    }
    assert "test" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_table_is_generated_from_the_results_files(page):
    script = runpy.run_path(str(ROOT / "experiments" / "quickstart_seeds.py"))
    files = sorted((ROOT / "experiments" / "results").glob("quickstart_seed*.json"))
    assert len(files) >= 3
    table = script["table"]([json.loads(file.read_text()) for file in files])
    assert (
        f"<!-- quickstart table: begin -->\n{table}\n<!-- quickstart table: end -->"
        in (ROOT / page).read_text()
    )


@pytest.mark.slow
def test_the_hardware_page_is_generated_from_its_run():
    script = runpy.run_path(str(ROOT / "experiments" / "hardware_regimes.py"))
    file = ROOT / "experiments" / "results" / "hardware_regimes.json"
    found = json.loads(file.read_text())
    page = (ROOT / "docs" / "hardware.md").read_text()
    for name, text in script["tables"](found).items():
        assert f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->" in page
    # And the run is that of this code.
    again = json.loads(json.dumps(script["measure"]()))
    for name, old in again.items():
        old, new = (jax.tree_util.tree_leaves_with_path(x) for x in (old, found[name]))
        assert [path for path, _ in old] == [path for path, _ in new]
        for (path, x), (_, y) in zip(old, new, strict=True):
            assert x == (y if isinstance(y, str) else pytest.approx(y, rel=1e-6)), path


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
