"""Headers and numbers that no encoder writes, under right checksums."""

import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from forging import changed, forge, refused, take_apart
from packed_models import pack, weight
from random_models import randomly_packed

from ssvq_jax import Uniform, Vector, save


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "format version 2, and this release reads version 1: inst"),
        (lambda h: h.pop("version"), "its header is no JSON of a packed model .*version"),
        (lambda h: h.pop("structure"), "its header does not hold together: 'structure'"),
        (lambda h: h["recipe"].update(format=9), "not a recipe"),
        (lambda h: h["recipe"]["rules"][3]["quantizer"].update(bits=9), "bits=9: .* 2 to 8"),
        (lambda h: h["recipe"]["rules"][3]["quantizer"].update(method="x"), "method 'x' is unk"),
        (lambda h: h["leaves"][0].__setitem__(2, 9), "its header does not hold together"),
        (lambda h: h["leaves"].append(h["leaves"][0]), "leaf 'blocks/0/bias' twice"),
        (lambda h: h["leaves"][1][1].__setitem__(1, -16), "has -16 where leaf 'blocks/0/kernel'"),
        (lambda h: h["leaves"][1].__setitem__(1, [8, 15]), "'blocks/0/kernel' .*dim=4 does not"),
        (lambda h: h["shares"].clear(), "no checksum of 'pairs'"),
        (lambda h: h.update(dtypes=["int8"] * 9), "names a dtype 'int8'"),
        (lambda h: h.update(dtypes=["complex64"] * 9), "names a dtype 'complex64'"),
        (lambda h: h.update(coded={"head": {"step": 1}}), "'head' has no field 'step' to be coded"),
        (lambda h: h.update(metrics=[1]), "model or metrics that are no mappings"),
    ],
)  # fmt: skip
def test_headers_that_do_not_hold_together(change, message, file):
    changed(file, change)
    refused(file, message)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"list": [0, 1]}, "has other leaves than the plan"),
        ({"list": [0, 0, 1, 2, 3, 4, 5, 6]}, "has other leaves than the plan"),
        ({"list": [*range(7), 8]}, "the structure of the tree has a part 8"),
        ({"set": [*range(8)]}, "the structure of the tree has a part"),
        ({"list": [*range(8)]}, "has other leaves than the plan"),
        ({"x": [[]]}, "the structure of the tree has a part"),
        ({"dict": [[0, 0], ["b", {"list": [*range(1, 8)]}]]}, "keys"),  # JAX cannot sort these
        (json.loads("[" * 300 + "]" * 300), "the structure of the tree has a part"),
        (json.loads('{"list":[' * 300 + "]}" * 300), "nested deeper than 200"),
    ],
)  # fmt: skip
def test_structures_of_other_trees(structure, message, file):
    changed(file, lambda header: header.update(structure=structure))
    refused(file, message, lambda opened: opened.decode())
    refused(file, message, lambda opened: opened.read())


def test_swapped_leaves_in_the_structure_are_noticed(tmp_path):
    """The checksums hold; the names in the structure are not those of the leaves."""
    params = {0: weight(), 1: weight(1)}
    save(tmp_path / "x", pack(params, [(".*", None)]))
    changed(tmp_path / "x", lambda h: h.update(structure={"dict": [[0, 1], [1, 0]]}))
    refused(tmp_path / "x", "has other leaves than the plan", lambda opened: opened.decode())


@pytest.mark.parametrize(
    ("tensor", "content", "owner", "message"),
    [
        ("codes", b"\xff" * 8 + b"\xff" * 8 + b"\xff" * 99, "stack", "codes go up to 3, .* are 3"),
        ("codes", b"\xff" * 999, "pairs", "its codes go up to 7, and there are 5"),
        ("codebook_scale.bfloat16", b"\x80\x7f" * 9, "pairs", "its codebook_scale is not finite"),
        ("codebook.float16", b"\x00\x7e" * 99, "stack", "its codebook is not finite"),
        ("step.bfloat16", b"\xc0\xff" * 99, "head", "its step is not finite"),
        # Finite, and a weight that is not:
        ("codebook_scale.bfloat16", b"\x7f\x7f" * 9, "pairs", "larger than a float32"),
        ("step.bfloat16", b"\x7f\x7f" * 99, "head", "larger than a float32"),
    ],
)  # fmt: skip
def test_numbers_that_no_encoder_gives_are_named(tensor, content, owner, message, file):
    raw = file.read_bytes()
    _, header, tensors = take_apart(raw)
    assert tensor in tensors
    file.write_bytes(forge(raw, header, tensors | {tensor: content}))
    path = "pair/a" if owner == "pairs" else owner
    refused(file, f"'{owner}' is damaged: .*{message}", lambda opened: opened.leaf(path))


@pytest.mark.parametrize("row", range(8))
@pytest.mark.parametrize("shape", [[2**20, 2**20], [2**62, 2**62, 4], [10**3000] * 2, [1] * 99])
def test_headers_that_claim_terabytes_cost_no_memory(row, shape, file):
    changed(file, lambda header: header["leaves"][row].__setitem__(1, shape))
    tracemalloc.start()
    refused(file, "tensor|leaf", lambda opened: opened.read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * file.stat().st_size


@pytest.mark.parametrize("size", [2**33, 2**44, 2**62])
def test_coded_fields_that_claim_terabytes_cost_no_memory(size, tmp_path):
    """A value that is certain costs no bits: eight bytes could be any number of weights."""
    zeros = jnp.zeros(4096).at[0].set(1.0)
    packed = pack({"w": zeros}, [(".*", Uniform(bits=2, per_channel=False))])
    save(tmp_path / "x", packed, codec="entropy")
    changed(tmp_path / "x", lambda header: header["leaves"][0].__setitem__(1, [size]))
    tracemalloc.start()
    refused(tmp_path / "x", "'w'.*", lambda opened: opened.verify())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18  # nothing near what is claimed; other tests decide what is imported here


def test_a_codebook_that_blows_up_is_refused(tmp_path):
    """A kilobyte of one-bit codes of long codewords is a gigabyte of weights."""
    rules, rng = [(".*", Vector(2, 64))], np.random.default_rng(0)
    save(tmp_path / "x", randomly_packed({"w": weight(0, (8, 64))}, rules, rng))

    def blow_up(header):
        header["recipe"]["rules"][0]["quantizer"].update(dim=2**15)
        header["leaves"][0][1] = [2**14, 2**15]

    changed(tmp_path / "x", blow_up)
    assert (tmp_path / "x").stat().st_size < 2**17
    refused(tmp_path / "x", "'w'", lambda opened: opened.verify())
