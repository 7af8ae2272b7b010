import dataclasses
import json

import jax
import numpy as np
import pytest
import yaml

from ssvq_jax.hardware import (
    Product,
    Workload,
    load_accelerator,
    presets,
    save_accelerator,
)
from ssvq_jax.hardware.accelerator import NUMBERS

UNITS = ("_hz", "_bits", "_bytes", "_bytes_per_s", "_per_cycle", "_pj", "_pj_per_bit")
COUNTS = {"rows", "columns", "pe_rows", "pe_columns", "arrays"}


def test_every_number_has_its_unit_in_its_name():
    assert all(name.endswith(UNITS) for name in set(NUMBERS) - COUNTS)


@pytest.mark.parametrize("name", sorted(presets))
@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml"])
def test_files_give_back_what_was_saved(name, ending, tmp_path):
    file = tmp_path / f"accelerator{ending}"
    save_accelerator(presets[name], file)
    assert load_accelerator(file) == presets[name] == load_accelerator(name)
    assert presets[name].source


def test_presets_have_the_published_peaks():
    """Multiplications a byte at full use, int8."""

    def peak(name):
        a = presets[name]
        return a.rows * a.columns * a.arrays * a.clock_hz / a.dram_bytes_per_s

    assert round(peak("ethos-u55-256")) == 256
    assert round(peak("ethos-u65-512")) == 137
    assert round(peak("tpu-v5e")) == 240
    assert pytest.approx(393e12, rel=1e-3) == 2 * 128 * 128 * 8 * 1.5e9  # int8 operations a second


def test_yaml_reads_exponents_without_a_dot(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nrows: 8\ncolumns: 8\ndataflow: os\nclock_hz: 5e8\ndram_bytes_per_s: 1e9\n"
    )
    assert yaml.safe_load(file.read_text())["clock_hz"] == "5e8"
    assert load_accelerator(file).clock_hz == 5e8


def test_an_accelerator_is_a_tree_of_its_numbers():
    leaves = jax.tree.leaves(presets["tpu-v5e"])
    assert len(leaves) == len(NUMBERS)
    assert hash(presets["tpu-v5e"]) != hash(presets["scalesim"])


GOOD = {"name": "x", "rows": 8, "columns": 8, "dataflow": "ws", "clock_hz": 1e9,
        "dram_bytes_per_s": 1e9}  # fmt: skip


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "accelerator 'x': rows=0: give at least 1"),
        ({"rows": -3}, "rows=-3: give at least 1"),
        ({"rows": 2**54}, "at most 2\\^53"),
        ({"rows": "many"}, "rows='many': give a number"),
        ({"rows": True}, "rows=True: give a number"),
        ({"rows": None}, "rows=None: give a number"),
        ({"rows": [8, 16]}, "rows=\\[8, 16\\]: give a number"),
        ({"rows": "8"}, "rows='8': give a number"),
        ({"rows": 8.5}, "rows=8.5: give a whole number"),
        ({"rows": 10**400}, "rows=1000000"),
        ({"clock_hz": 0}, "clock_hz=0: give more than 0"),
        ({"clock_hz": float("nan")}, "clock_hz=nan: give a number"),
        ({"clock_hz": float("inf")}, "clock_hz=inf: give a number"),
        ({"mac_pj": -1}, "mac_pj=-1: give 0 or more"),
        ({"dataflow": "xs"}, "dataflow='xs': choose one of"),
        ({"overlap": "some"}, "overlap='some': choose one of"),
        ({"overlapped_load": 1}, "overlapped_load=1: give True or False"),
        ({"dataflow": "os", "overlapped_load": True}, "overlapped_load is for dataflows that load"),
        ({"pe_rows": 2}, "pe_rows=2 is for dataflow='ews', this one is 'ws'"),
        ({"clock": 1e9}, r"the key 'clock' is unknown; it needs its unit: \['clock_hz'\]"),
        ({"dram": 1}, "the key 'dram' is unknown; it needs its unit: .*dram_bytes_per_s"),
        ({"colour": "red"}, "the key 'colour' is unknown; known are"),
        ({"name": 3}, "name=3: give text"),
    ],
)
def test_what_a_file_may_not_say(changes, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_accelerator(file)
    assert str(error.value).startswith(f"accelerator file '{file}': ")


@pytest.mark.usefixtures("as_installed")
def test_other_files_that_describe_no_accelerator(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is neither a file nor a preset: choose one of"):
        load_accelerator("nowhere")
    for ending, text, message in (
        ("json", "{", "Expecting"),
        ("json", "[1]", "a list; give a mapping with"),
        ("yaml", "a: [", "not YAML"),
        ("yaml", "", "a NoneType; give a mapping with"),
        ("txt", "", "ends in .json, .yaml or .yml"),
        ("json", '{"name": "x"}', r"the keys \['clock_hz', .*\] are missing"),
    ):
        file = tmp_path / f"x.{ending}"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_accelerator(file)
    swept = dataclasses.replace(presets["scalesim"], rows=np.array([8.0, 16.0]))
    with pytest.raises(ValueError, match="rows has 2 values: only a single accelerator"):
        save_accelerator(swept, tmp_path / "x.json")
    with pytest.raises(ValueError, match="ends in .json, .yaml or .yml"):
        save_accelerator(presets["scalesim"], tmp_path / "x.toml")


def test_a_workload_written_by_hand_goes_through_json():
    layer = Product("conv", 196, 27, 32, leaves=("conv/kernel",), input_elements=3072)
    heads = Product("attention", 197, 64, 197, count=3)
    workload = Workload((layer, heads), {"elementwise": 5}, {"conv/kernel": 864})
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload
    assert layer.macs == 196 * 27 * 32
    assert heads.macs == 3 * 197 * 64 * 197
    assert (layer.inputs, heads.inputs) == (3072, 197 * 64)
    assert (layer.weights, heads.weights) == (864, 3 * 64 * 197)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("product", "message"),
    [
        ({"m": 0}, "product 'fc': m=0: give a whole number of at least 1"),
        ({"n": -2}, "product 'fc': n=-2"),
        ({"k": 1.5}, "product 'fc': k=1.5"),
        ({"count": True}, "product 'fc': count=True"),
        ({"m": 2**30, "k": 2**30}, "M·N·K·count·rounds=.* at most 2\\^53"),
        ({"kk": 3}, "product 0 of the workload: the key 'kk' is unknown"),
        ({"input_elements": 0}, "input_elements=0"),
    ],
)
def test_what_a_workload_may_not_say(product, message):
    data = {"products": [{"name": "fc", "m": 1, "k": 8, "n": 8} | product]}
    with pytest.raises(ValueError, match=message):
        Workload.from_json(data)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"products": 5}, "products must be a list"),
        ({"products": [], "leaves": [1]}, "leaves must be a mapping"),
        ({"products": [], "leaves": {"a": 0}}, "leaves of the workload: a=0"),
        ({"products": [], "gathered": {"a": 4}}, "4 of leaf 'a', which has no weights"),
        ({"products": [], "leaves": {"a": 3}, "gathered": {"a": 4}}, "which has 3 weights"),
        ({"products": [{"name": 3, "m": 1, "k": 1, "n": 1}]}, "product 3 with leaves"),
        ({"products": [{"name": "", "m": 1, "k": 1, "n": 1, "leaves": "w"}]}, "must be a list"),
        ([], "workload: a list; give a mapping"),
    ],
)
def test_a_workload_of_other_kinds(data, message):
    with pytest.raises(ValueError, match=message):
        Workload.from_json(data)


@pytest.mark.parametrize("name", ["64", "1e9", "nan", "yes", "a: b", "null"])
def test_any_name_comes_back_from_yaml(name, tmp_path):
    named = dataclasses.replace(presets["tpu-v5e"], name=name, source=name)
    save_accelerator(named, tmp_path / "x.yaml")
    assert load_accelerator(tmp_path / "x.yaml") == named


@pytest.mark.usefixtures("as_installed")
def test_a_workload_lacks_something():
    with pytest.raises(ValueError, match=r"workload: the keys \['products'\] are missing"):
        Workload.from_json({})
    with pytest.raises(ValueError, match=r"product 0 .* the keys \['k'\] are missing"):
        Workload.from_json({"products": [{"name": "fc", "m": 1, "n": 8}]})
    with pytest.raises(ValueError, match="operations of the workload: elementwise=-1"):
        Workload.from_json({"products": [], "operations": {"elementwise": -1}})
