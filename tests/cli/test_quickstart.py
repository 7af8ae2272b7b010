"""The files and the table of a short quickstart."""

import json

import pytest


def test_quickstart_writes_everything(quickstart):
    printed = (quickstart.parent / "printed.txt").read_text()
    results = json.loads((quickstart / "results.json").read_text())
    assert list(results["methods"]) == ["vq-26x", "ssvq-26x"]
    assert results["float"]["examples"] == 1500
    for row in results["methods"].values():
        assert {
            "bits_per_weight", "compression_ratio", "file_ratio", "accuracy_before",
            "accuracy_after", "steps", "seconds",
        } <= set(row)  # fmt: skip
        assert f"{row['bits_per_weight']:.3f}" in printed
        assert row["compression_ratio"] == pytest.approx(32 / row["bits_per_weight"])
    methods = results["methods"]
    assert methods["ssvq-26x"]["bits_per_weight"] <= methods["vq-26x"]["bits_per_weight"]
    assert {"versions", "commit", "config", "seconds"} <= set(results)
    records = [json.loads(line) for line in (quickstart / "metrics.jsonl").read_text().splitlines()]
    assert {record["run"] for record in records} == {"float", *methods}
    for name in ("accuracy.png", "signs.png", "tradeoff.png", "ssvq-26x.plan.json"):
        assert (quickstart / name).stat().st_size > 0
