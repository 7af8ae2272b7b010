"""The notebook is what its script says, and runs from top to bottom."""

import json
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

COLAB = Path(__file__).parents[2] / "colab"


def sources(file):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]


def test_the_notebook_is_paired_with_its_script():
    assert sources(COLAB / "quickstart.ipynb") == sources(COLAB / "quickstart.py"), (
        "run `jupytext --sync colab/quickstart.py`"
    )


def test_no_outputs_are_kept():
    cells = nbformat.read(COLAB / "quickstart.ipynb", as_version=4).cells
    assert not any(cell.get("outputs") for cell in cells)


def notebook():
    return nbformat.read(COLAB / "quickstart.ipynb", as_version=4)


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        ({"jax": "0.9.0", "jaxlib": "0.9.0", "libtpu": "0.0.30"}, ["jax==0.9.0", "jaxlib==0.9.0"]),
        ({"jax": "0.11.0.dev20261101", "numpy": "2.0.2"}, ["jax==0.11.0.dev20261101"]),
        ({"jax": "0.8.3", "libtpu": "0.0.30"}, "jax[tpu]"),
        ({"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2"}, "jax[cuda12]"),
        ({"jax": "0.7.2"}, "jax"),
        ({}, "jax"),
    ],
)
def test_a_jax_that_is_new_enough_is_kept(have, expected):
    (cell,) = (cell for cell in notebook().cells if "def pip_arguments" in cell.source)
    names = {"SOURCE": "", "FOLDER": "here"}
    exec(cell.source, names)  # the package is there: nothing is installed
    found = names["pip_arguments"]("the.whl", have)
    assert found[0] == "the.whl"
    if isinstance(expected, str):
        assert found[1:] == [expected]
    else:
        assert found[1] == "-c"
        assert Path(found[2]).read_text().split() == expected
    floor = re.search(r"^jax>=(.*)$", (COLAB.parent / "requirements.txt").read_text(), re.MULTILINE)
    assert names["FLOOR"] == tuple(map(int, floor[1].split(".")))


STOP = """
import signal
from ssvq_jax.data import image_data

made = image_data.train_batches

class Stopping:
    def __init__(self, batches):
        self.batches, self.count = batches, 0
    def __iter__(self):
        return self
    def __next__(self):
        self.count += 1
        if self.count == 25:  # batch statistics take 20
            signal.raise_signal(signal.SIGINT)  # as the stop button
        return next(self.batches)
    def __getattr__(self, name):
        return getattr(self.batches, name)

image_data.train_batches = lambda *args, **kwargs: Stopping(made(*args, **kwargs))
"""


def execute(folder, *, before_compression=""):
    found = notebook()
    parameters = [
        i for i, x in enumerate(found.cells) if "parameters" in x.metadata.get("tags", ())
    ]
    small = f"FOLDER = {str(folder)!r}\nFLOAT_STEPS, STEPS = 60, 30"
    found.cells.insert(parameters[0] + 1, nbformat.v4.new_code_cell(small))
    (where,) = (i for i, cell in enumerate(found.cells) if cell.source.startswith("## 4."))
    found.cells.insert(where, nbformat.v4.new_code_cell(before_compression))
    nbclient.NotebookClient(
        found, timeout=300, resources={"metadata": {"path": str(folder.parent)}}
    ).execute()
    return [output for cell in found.cells for output in cell.get("outputs", ())]


def records(folder):
    lines = (folder / "ssvq" / "metrics.jsonl").read_text().splitlines()
    timeless = {"steps_per_second": None, "checksum": None}
    return [json.loads(line) | timeless for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_and_goes_on_after_a_stop(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    outputs = execute(tmp_path / "whole")
    text = "".join(output.get("text", "") for output in outputs)
    assert len([x for x in outputs if "image/png" in x.get("data", {})]) == 2
    assert "fine-tuned" in text
    assert "logits (1, 10)" in text
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="KeyboardInterrupt"):
        execute(tmp_path / "cut", before_compression=STOP)
    assert (tmp_path / "cut" / "ssvq" / "checkpoints" / "25").is_dir()
    execute(tmp_path / "cut")
    assert (tmp_path / "cut" / "ssvq" / "checkpoints" / "30").is_dir()
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
