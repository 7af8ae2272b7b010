"""The Hugging Face hub, with a stand-in for its package: there is no network in tests."""

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from ssvq_jax.cli.main import main
from ssvq_jax.models.hub import fetch_from_hub, is_hub_id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Its package; ``asked`` is what it was asked for, ``error`` what it raises."""
    stand_in = types.ModuleType("huggingface_hub")
    stand_in.asked, stand_in.error, folder = [], None, tmp_path / "snapshot"
    folder.mkdir()

    def snapshot_download(repository, *, revision, allow_patterns):
        stand_in.asked.append((repository, revision))
        assert "*.safetensors" in allow_patterns
        if stand_in.error is not None:
            raise stand_in.error
        return str(folder)

    stand_in.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_a_repository_is_brought(hub, tmp_path, capsys):
    file = tmp_path / "snapshot" / "model.safetensors"
    save_file({"a": np.ones(2, np.float32)}, file)
    (tmp_path / "snapshot" / "pytorch_model.bin").write_bytes(b"")  # not what is preferred
    main(["models", "fetch", "owner/name@v2"])
    printed = capsys.readouterr().out
    assert f"--weights {file}" in printed
    assert hub.asked == [("owner/name", "v2")]
    main(["models", "fetch", "owner/name", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "hub": "owner/name",
        "folder": str(tmp_path / "snapshot"),
        "files": [str(file)],
    }
    assert hub.asked[-1] == ("owner/name", None)


def test_without_a_network(hub):
    hub.error = FileNotFoundError("Got: ConnectError: name not known\nand more")
    with pytest.raises(SystemExit) as error:
        main(["models", "fetch", "owner/name"])
    assert "cannot bring 'owner/name' (Got: ConnectError: name not known): check" in str(
        error.value
    )


def test_a_repository_without_weights(hub):
    with pytest.raises(SystemExit, match="holds no .safetensors, .gguf or .bin file"):
        main(["models", "fetch", "owner/name"])


def test_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        fetch_from_hub("owner/name")


@pytest.mark.parametrize("name", ["/name", "owner/", "a/b/c", "name", "./a/b"])
def test_names_of_other_forms(name):
    assert not is_hub_id(name)
