"""The notebook is what its script says, and runs from top to bottom."""

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    notebook = nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    (where,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    small = f"FOLDER = {str(tmp_path / 'run')!r}\nFLOAT_STEPS, STEPS = 60, 30"
    notebook.cells.insert(where + 1, nbformat.v4.new_code_cell(small))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    text = "".join(out.get("text", "") for out in outputs)
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2
    assert "fine-tuned" in text
    assert "logits (1, 10)" in text
    assert (tmp_path / "run" / "ssvq" / "checkpoints" / "30").is_dir()
