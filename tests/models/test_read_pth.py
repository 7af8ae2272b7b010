import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvq_jax.models.read_pth import read_pth

torch = pytest.importorskip("torch", reason="writes the files: pip install -e '.[parity]'")


def tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 8, generator=generator)
    return {
        "whole": whole,
        "part": whole[1:4, ::2],  # views of one storage
        "turned": whole.T,
        "half": whole.half(),
        "brain": whole.bfloat16(),
        "double": whole.double(),
        "steps": torch.tensor(7),
        "flags": whole > 0,
        "small": torch.arange(5, dtype=torch.int8),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole[0].clone()),
    }


def check(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            assert found[name].dtype.name == "bfloat16"
            assert np.array_equal(found[name].astype(np.float32), tensor.float().numpy())
        else:
            assert found[name].dtype == tensor.numpy().dtype
            assert np.array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, lambda x: {"state_dict": x, "epoch": 3}, "ordered"])
def test_reads_what_torch_saves(tmp_path, zipped, wrap):
    file = tmp_path / "model.pth"
    if wrap == "ordered":
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        torch.save(module.state_dict(), file, _use_new_zipfile_serialization=zipped)
        check(read_pth(file), module.state_dict())
    else:
        torch.save(wrap(tensors()), file, _use_new_zipfile_serialization=zipped)
        check(read_pth(file), tensors())


class Evil:
    """What a pickle may do to those who trust it."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [Evil(), {"a": Evil()}, torch.nn.Linear(2, 2), [1, 2], {}])
def test_code_is_not_run(tmp_path, capsys, zipped, content):
    file = tmp_path / "model.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.pth cannot be read as a PyTorch state dict \("):
        read_pth(file)
    assert "executed" not in capsys.readouterr().out


@given(
    cut=st.booleans(), place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255),
    zipped=st.booleans(),
)  # fmt: skip
def test_damage_is_one_error(tmp_path_factory, cut, place, bits, zipped):
    file = tmp_path_factory.mktemp("pth") / "model.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, file, _use_new_zipfile_serialization=zipped)
    content = bytearray(file.read_bytes())
    at = int(place * len(content))  # files differ in length: old ones hold memory addresses
    if cut:
        content = content[:at]
    else:
        content[at] ^= bits
    file.write_bytes(content)
    found, message = {}, ""
    try:
        found = read_pth(file)
    except ValueError as error:
        message = str(error)
    assert not message or message.startswith(f"{file} cannot be read")
    # What is read all the same was changed in numbers, names, or bytes that nobody reads.
    assert all(array.size <= 6 for array in found.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (8, 1, "encrypted"),
        (10, 8, "invalid"),
        (10, 256, "compression method is not supported"),
    ],
    ids=["encrypted", "deflated", "unknown compression"],
)
def test_damaged_directory_of_a_zip_file(tmp_path, field, value, message):
    file = tmp_path / "model.pth"
    torch.save({"a": torch.arange(6.0)}, file)
    content = bytearray(file.read_bytes())
    at = content.index(b"PK\x01\x02") + field  # the entry of the first member, data.pkl
    content[at : at + 2] = value.to_bytes(2, "little")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.pth cannot be read .*{message}"):
        read_pth(file)


def test_a_view_beyond_its_storage(tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"a": torch.arange(6.0)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (pickled,) = [name for name in members if name.endswith("data.pkl")]
    members[pickled] = members[pickled].replace(b"K\x06\x85", b"K\xff\x85")  # the shape, (6,)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="a tensor reaches beyond its storage"):
        read_pth(file)
    (tmp_path / "none.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="does not begin as such a file does"):
        read_pth(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="No such file"):
        read_pth(tmp_path / "nothing.pth")
