"""The commands together, as a user has them: an own model, an own folder of images."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import serialization
from PIL import Image

from ssvq_jax.cli.main import main

MODEL = """
import flax.linen as nn

class Net(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(16, (3, 3), strides=2, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8, name="norm")(x))
        x = nn.relu(nn.Dense(32, name="hidden")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="head")(x)

def net(classes=3):
    return Net(classes)

def two():
    return Net(2)

class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2))), x

def pair():
    return Pair()

class Moody(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        if train:
            raise ValueError("not today")
        return nn.Dense(3)(x.mean((1, 2)))

def moody():
    return Moody()

def leaves():
    raise SystemExit(0)
"""
RECIPE = {
    "format": 1,
    "rules": [
        {"pattern": "conv/kernel", "quantizer": {"method": "uniform", "bits": 8}},
        {
            "pattern": "(hidden|head)/kernel",
            "quantizer": {"method": "sign_split", "codewords": 4, "dim": 4, "pad": True},
        },
        {"pattern": ".*", "quantizer": None},
    ],
}


@pytest.fixture(autouse=True)
def users_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A working folder with a model, a recipe and pictures in which one colour is the brightest."""
    root = tmp_path_factory.mktemp("project")
    (root / "own_model.py").write_text(MODEL)
    (root / "recipe.json").write_text(json.dumps(RECIPE))
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 16), ("test", 16)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def ssvq(project, monkeypatch, capsys):
    """Runs a command in the working folder; returns what it printed."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


IMAGES = ["--model", "own_model:net", "--data", "./pictures", "--batch-size", "16"]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(project):
    """A run of `ssvq train`, made once."""
    before = Path.cwd()
    os.chdir(project)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            main(["train", *IMAGES, "--out", "runs/float", "--steps", "60", "--learning-rate",
                  "0.02", "--augment", "cifar"])  # fmt: skip
    finally:
        os.chdir(before)
    return project / "runs" / "float"


def test_train_writes_everything(trained):
    found = results(trained)
    assert found["after"]["accuracy"] > 0.9
    assert found["after"]["examples"] == 48
    assert found["eval_split"] == "validation"
    assert found["best_step"] in range(6, 61, 6)
    assert {"config", "versions", "commit", "seconds", "before"} <= set(found)
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines if "validation_loss" in x] == list(range(6, 60, 6))
    assert (trained / "accuracy.png").stat().st_size > 0


def test_compress_finetune_eval_analyze(trained, ssvq, project):
    printed = ssvq("compress", "--weights", trained, "--recipe", "recipe.json",
                   "--batch-norm-batches", "4", "--out", "runs/small")  # fmt: skip
    small = results(project / "runs/small")
    assert small["float"]["accuracy"] == results(trained)["after"]["accuracy"]
    assert small["after"]["loss"] > small["float"]["loss"]
    assert f"{small['bits_per_weight']:.3f} bits" in printed
    assert {leaf["path"] for leaf in small["leaves"]} == {
        "conv/kernel", "hidden/kernel", "head/kernel",
    }  # fmt: skip
    tuned_options = ["finetune", "--weights", "runs/small", "--out", "runs/tuned", "--steps", "40",
                     "--optimizer.dense", "1e-2", "--optimizer.codebook", "1e-2"]  # fmt: skip
    ssvq(*tuned_options)
    tuned = results(project / "runs/tuned")
    # It begins where compress ended, to the bit.
    assert tuned["before"]["accuracy"] == small["after"]["accuracy"]
    assert tuned["after"]["loss"] < small["after"]["loss"]
    assert tuned["bits_per_weight"] == small["bits_per_weight"]
    assert tuned["config"]["model"] == "own_model:net"
    assert (project / "runs/tuned/signs.png").exists()

    printed = ssvq("eval", "--weights", "runs/tuned", "--split", "validation")
    again = json.loads((project / "runs/tuned/eval-validation-last.json").read_text())
    assert again["after"]["accuracy"] == tuned["after"]["accuracy"]
    assert again["after"]["loss"] == pytest.approx(tuned["after"]["loss"], rel=1e-6)
    ssvq("eval", "--weights", "runs/tuned", "--which", "best", "--split", "test")
    best = json.loads((project / "runs/tuned/eval-test-best.json").read_text())
    assert best["after"]["examples"] == 48
    assert best["stored_bytes"] == tuned["stored_bytes"]

    # The packed file holds the statistics that it was judged with, and tells model and data.
    packed = "runs/tuned/model.safetensors"
    ssvq("eval", "--weights", packed, "--split", "validation", "--out", "runs/judged")
    judged = json.loads((project / "runs/judged/eval-validation-last.json").read_text())
    assert judged["after"]["loss"] == pytest.approx(tuned["after"]["loss"], rel=1e-6)
    assert judged["file_ratio"] == tuned["file_ratio"]
    ssvq("export", packed, "--to", "stablehlo", "--out", "runs/net.hlo")
    program = jax.export.deserialize(bytearray((project / "runs/net.hlo").read_bytes()))
    assert program.call(jnp.zeros((7, 12, 12, 3))).shape == (7, 3)
    ssvq("export", packed, "--to", "safetensors", "--out", "runs/plain.safetensors")
    ssvq("eval", *IMAGES, "--weights", "runs/plain.safetensors", "--split", "validation",
         "--out", "runs/judged")  # fmt: skip
    judged = json.loads((project / "runs/judged/eval-validation-last.json").read_text())
    assert judged["after"]["loss"] == pytest.approx(tuned["after"]["loss"], rel=1e-6)
    ssvq("pack", "--weights", "runs/tuned", "--which", "best", "--out", "runs/best.safetensors")
    ssvq("eval", "--weights", "runs/best.safetensors", "--split", "test", "--out", "runs/judged")
    judged = json.loads((project / "runs/judged/eval-test-last.json").read_text())
    assert judged["after"]["loss"] == pytest.approx(best["after"]["loss"], rel=1e-6)
    # Training goes on from it as from the run.
    ssvq(*tuned_options[:1], "--weights", packed, "--out", "runs/on", "--steps", "4")
    assert results(project / "runs/on")["before"]["accuracy"] == tuned["after"]["accuracy"]

    # What it begins with is never written over.
    before = (project / packed).read_bytes()
    for out in ("runs/tuned", "runs"):
        with pytest.raises(SystemExit, match=f"out={out} is where the weights are"):
            ssvq("finetune", "--weights", packed, "--out", out, "--no-resume")
    assert (project / packed).read_bytes() == before
    with pytest.raises(SystemExit, match="which=best is for the folder of a run"):
        ssvq("eval", "--weights", packed, "--which", "best")

    # A finished run is read back, and another configuration is refused.
    ssvq(*tuned_options)
    assert results(project / "runs/tuned")["after"] == tuned["after"]
    with pytest.raises(SystemExit, match="steps: 40 there, 50 now"):
        ssvq(*tuned_options, "--steps", "50")


def test_the_best_state_is_judged_as_it_was_in_the_run(ssvq, project):
    generator = np.random.default_rng(1)
    for split in ("train", "validation"):  # nothing to learn: the loss on others' labels rises
        for name in "ab":
            folder = project / "noise" / split / name
            folder.mkdir(parents=True)
            for i in range(24):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out = project / "runs/best"
    ssvq("train", *IMAGES[:2], "--data", "./noise", "--out", out, "--steps", "20",
         "--validate-every", "4", "--batch-norm-batches", "3", "--batch-size", "24",
         "--learning-rate", "1", "--augment", "cifar", "--warmup-share", "1")  # fmt: skip
    losses = {
        record["step"]: record["validation_loss"]
        for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "validation_loss" in record
    }
    # The number of classes is that of the data, also for who gets the file alone.
    ssvq("export", out / "model.safetensors", "--to", "stablehlo", "--out", project / "two.hlo")
    program = jax.export.deserialize(bytearray((project / "two.hlo").read_bytes()))
    assert program.call(jnp.zeros((4, 12, 12, 3))).shape == (4, 2)
    best = results(out)["best_step"]
    assert best in losses  # and not the last
    ssvq("eval", "--weights", out, "--which", "best", "--split", "validation")
    found = json.loads((out / "eval-validation-best.json").read_text())
    assert found["after"]["loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_weights_in_bfloat16_stay_so(trained, ssvq, project):
    step = results(trained)["steps"]
    state = ocp.load_checkpointables(str(trained / "checkpoints/model" / str(step)))["state"]
    tree = {"params": {}, "batch_stats": {"norm": {}}}
    for name, leaf in state.items():
        match name.split("/"):
            case ["params", "params", module, leaf_name]:
                tree["params"].setdefault(module, {})[leaf_name] = leaf.astype(jnp.bfloat16)
            case ["model_state", "batch_stats", module, leaf_name]:
                tree["batch_stats"][module][leaf_name] = leaf.astype(jnp.bfloat16)
    (project / "half.msgpack").write_bytes(serialization.to_bytes(tree))
    ssvq("compress", *IMAGES[:4], "--weights", "half.msgpack", "--recipe", "recipe.json", "--out",
         "runs/half")  # fmt: skip
    plan = json.loads((project / "runs/half/plan.json").read_text())
    assert {leaf["dtype"] for leaf in plan["leaves"]} == {"bfloat16"}
    ssvq("eval", "--weights", "runs/half", "--split", "validation")
    again = json.loads((project / "runs/half/eval-validation-last.json").read_text())
    assert again["after"] == pytest.approx(results(project / "runs/half")["after"], rel=1e-6)


def test_no_resume_deletes_nothing_before_the_command_is_known_to_work(trained, ssvq):
    before = results(trained)
    with pytest.raises(SystemExit, match="images of 3 channels"):
        ssvq("train", *IMAGES, "--out", trained, "--no-resume", "--normalization", "mnist")
    assert results(trained) == before


def test_analyze_tells_leaf_by_leaf_and_goes_on(trained, ssvq, project):
    command = ["analyze", "--weights", trained, "--recipe", "recipe.json", "--out", "runs/look"]
    printed = ssvq(*command)
    assert "hidden/kernel" in printed
    found = results(project / "runs/look")
    rows = {row["path"]: row for row in found["sensitivities"] if row["scope"] == "leaf"}
    assert set(rows) == {"conv/kernel", "hidden/kernel", "head/kernel"}
    assert rows["hidden/kernel"]["loss_increase"] > rows["conv/kernel"]["loss_increase"]
    assert (project / "runs/look/analysis.png").stat().st_size > 0
    metrics = project / "runs/look/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]) + lines[2][:10])  # cut off in the third row
    ssvq(*command)
    assert results(project / "runs/look")["sensitivities"] == found["sensitivities"]
    assert len([json.loads(line) for line in metrics.read_text().splitlines()]) == 5
    # It shows what compress makes.
    ssvq("compress", "--weights", trained, "--recipe", "recipe.json", "--out", "runs/same")
    both = next(row for row in found["sensitivities"] if row["scope"] == "all")
    assert both["loss"] == pytest.approx(results(project / "runs/same")["after"]["loss"], rel=1e-5)


def test_a_terminated_run_saves_and_goes_on(trained, project):
    program = "import sys; from ssvq_jax.cli.main import main; main(sys.argv[1:])"
    arguments = ["finetune", "--weights", str(trained), "--recipe", "recipe.json", "--out",
                 "runs/cut", "--steps", "3000", "--save-seconds", "3600"]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = project / "runs/cut/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    message = "ssvq: interrupted; the same command, without --no-resume, goes on"
    assert errors.decode().strip() == message
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    saved = [int(x.name) for x in (project / "runs/cut/checkpoints/model").iterdir()]
    assert last <= max(saved) < last + 10  # saved where it stopped, not an hour before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "runs/x"], "no model: give --model NAME"),
        (["train", "--model", "own_model:net", "--out", "runs/x"], "no data: give --data"),
        (["train", *IMAGES, "--out", "runs/x", "--steps", "0"], "steps=0: give at least 1"),
        (["train", *IMAGES, "--out", "runs/x", "--augment", "loud"], "loud"),
        (["train", *IMAGES, "--out", "runs/x", "--devices", "99"], "devices=99: there are"),
        (
            ["train", *IMAGES[:2], "--data", "./nowhere", "--out", "runs/x"],
            "no image folder nowhere",
        ),
        (
            ["train", *IMAGES[:2], "--data", "cifar10", "--data-dir", "empty", "--out", "runs/x"],
            "no data set 'cifar10' in empty",
        ),
        (["compress", *IMAGES, "--out", "runs/x"], "comes without weights: give --weights"),
        (["compress", *IMAGES, "--weights", "gone", "--out", "runs/x"], "no weights at gone"),
        (["finetune", *IMAGES, "--weights", "runs/float", "--out", "runs/x"], "no recipe: give"),
        (
            ["finetune", "--weights", "runs/float", "--recipe", "ssvq-21x", "--out", "runs/x"],
            "match no leaf",
        ),
        (["eval", "--weights", "runs/float", "--split", "trial"], "split 'trial'"),
        (
            ["eval", "--weights", "runs/float", "--model", "deit_digits", "--image-size", "28"],
            "float is a run of another model: leaf 'conv/kernel'",
        ),
        (["analyze", *IMAGES[:4], "--out", "runs/x", "--examples", "0"], "examples=0: give at"),
        (["train", *IMAGES, "--out", "runs/x", "--save-seconds", "-1"], "save_seconds=-1.0: give"),
        (["train", *IMAGES, "--out", "runs/x", "--batch-norm-batches", "-1"], "give at least 0"),
        (["train", *IMAGES, "--out", "runs/x", "--normalization", "mnist"], "images of 3 channels"),
        (
            ["train", *IMAGES, "--out", "runs/x", "--accumulate", "7"],
            "accumulate=7 does not divide",
        ),
        (["train", *IMAGES, "--out", "runs/x", "--remat"], "remat: model 'own_model:net' has no"),
        (["train", *IMAGES, "--out", "runs/x", "--eval-split", "train[90%:]"], "in common"),
        (["train", *IMAGES, "--out", "recipe.json/x"], "out=recipe.json/x cannot be made, since"),
        (
            ["train", "--model", "own_model:two", *IMAGES[2:], "--out", "runs/x"],
            "gives 2 logits, but ./pictures has 3: blue, green, red",
        ),
        (
            ["train", "--model", "own_model:pair", *IMAGES[2:], "--out", "runs/x"],
            "returns tuple for 2 images: return logits [b, classes]",
        ),
        (
            ["compress", "--weights", "runs/float", "--out", "runs/float"],
            "is where the weights are",
        ),
        (["plan", "--model", "own_model:net", "--image-size", "-3"], "images of size -3"),
        (
            ["train", *IMAGES, "--out", "runs/x", "--classes", "2"],
            "--classes 2, but ./pictures has 3: blue, green, red",
        ),
        (["train", *IMAGES, "--out", "runs/x", "--image-size", "100000"], "100000 x 100000"),
        (["eval", "--weights", "runs/float", "--out", "recipe.json"], "recipe.json is a file"),
        (
            ["plan", "--model", "deit_tiny", "--out", "runs"],
            "out=runs is a folder: give a file",
        ),
        (
            ["train", "--model", "own_model:moody", *IMAGES[2:], "--out", "runs/x"],
            "in training (ValueError: not today)",
        ),
        (
            ["train", "--model", "own_model:leaves", *IMAGES[2:], "--out", "runs/x"],
            "the function failed (SystemExit",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(trained, ssvq, project, arguments, message):
    with pytest.raises(SystemExit) as stop:
        ssvq(*arguments)
    text = str(stop.value.code)
    assert text.startswith("ssvq: error: ")
    assert message in text
    assert "\n" not in text
    assert not (project / "runs/x").exists()


# The data of a run are part of it


def test_a_renamed_class_is_no_lower_accuracy(trained, ssvq, project):
    shutil.copytree(project / "pictures", project / "renamed")
    for split in ("train", "validation", "test"):
        (project / "renamed" / split / "blue").rename(project / "renamed" / split / "violet")
    message = (
        "classes of ./renamed are green, red, violet, and runs/float was trained on blue, green"
    )
    with pytest.raises(SystemExit, match=message):
        ssvq("eval", "--weights", "runs/float", "--data", "./renamed")
    with pytest.raises(SystemExit, match=message):
        ssvq("compress", "--weights", "runs/float", "--data", "./renamed", "--out", "runs/violet")
    with pytest.raises(SystemExit, match="green, red, violet, and .* was trained on others"):
        ssvq("eval", "--weights", "runs/float/model.safetensors", "--data", "./renamed")


def test_classes_that_change_places_are_noticed(ssvq, project):
    shutil.copytree(project / "pictures", project / "swapped")
    data = ["--model", "own_model:net", "--data", "./swapped", "--batch-size", "16"]
    train = ["train", *data, "--steps", "2", "--out", "runs/swapped"]
    ssvq(*train)
    folder = project / "swapped" / "train"
    (folder / "red").rename(folder / "x")
    (folder / "green").rename(folder / "red")
    (folder / "x").rename(folder / "green")
    with pytest.raises(SystemExit, match=r"runs/swapped holds a run of another .*data_fingerprint"):
        ssvq(*train)
    with pytest.warns(UserWarning, match=r"files of ./swapped are not those that runs/swapped was"):
        ssvq("eval", "--weights", "runs/swapped", "--out", "runs/swapped-judged")
    with pytest.warns(UserWarning, match=r"not those that runs/swapped/model.safetensors was"):
        ssvq("eval", "--weights", "runs/swapped/model.safetensors", "--data", "./swapped")


def test_an_unfinished_run_says_so(trained, ssvq, project):
    ssvq("compress", "--weights", trained, "--recipe", "recipe.json", "--out", "runs/begun")
    shutil.rmtree(project / "runs/begun/checkpoints")
    (project / "runs/begun/model.safetensors").unlink()
    with pytest.raises(SystemExit, match="begun is unfinished: run `ssvq compress` again"):
        ssvq("eval", "--weights", "runs/begun")


@pytest.mark.parametrize("damage", ["key", "gone", "text"])
def test_a_run_with_a_damaged_config_is_no_folder_of_tensors(trained, ssvq, project, damage):
    folder = project / "runs" / f"config-{damage}"
    shutil.copytree(trained, folder)
    file = folder / "config.json"
    if damage == "gone":
        file.unlink()
    elif damage == "key":
        file.write_text(file.read_text().replace('"command"', '"commanc"'))
    else:
        file.write_text("{")
    with pytest.raises(SystemExit, match="config.json|config-gone") as stop:
        ssvq("compress", "--weights", folder, "--recipe", "uniform-8bit", "--out", "runs/x")
    assert "dense.float32" not in str(stop.value.code)
    assert not (project / "runs/x").exists()


@pytest.mark.parametrize("victim", ["state/d/*", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_one_line(trained, ssvq, project, victim, capsys):
    shutil.copytree(trained, project / "runs" / "damaged", dirs_exist_ok=True)
    for step in (project / "runs" / "damaged" / "checkpoints" / "model").iterdir():
        for file in step.glob(victim):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"checkpoint runs/damaged\S* is .*damaged") as stop:
        ssvq("eval", "--weights", "runs/damaged")
    assert "\n" not in str(stop.value.code)
    gc.collect()
    assert capsys.readouterr().err == ""
    shutil.rmtree(project / "runs" / "damaged")


# Training recipes and distillation


def test_a_preset_fills_in_what_is_left_out(ssvq, project):
    ssvq("train", *IMAGES, "--preset", "cifar-deit", "--weight-decay", "0.1", "--steps", "4",
         "--out", "runs/preset")  # fmt: skip
    found = results(project / "runs/preset")
    assert found["objective"]["label_smoothing"] == 0.1
    assert found["optimizer"]["dense"] == 1e-3
    assert found["optimizer"]["weight_decay"] == 0.1
    config = found["config"]
    assert (config["augment"], config["average_decay"]) == ("cifar-deit", 0.999)
    # The average over the run so far is what is judged, here and by others.
    judged = ssvq("eval", "--weights", "runs/preset", "--split", "validation", "--json")
    assert json.loads(judged)["after"]["loss"] == pytest.approx(found["after"]["loss"], rel=1e-5)


def test_sgd_trains(ssvq, project):
    ssvq("train", *IMAGES, "--preset", "sgd", "--learning-rate", "0.05", "--steps", "60", "--out",
         "runs/sgd")  # fmt: skip
    found = results(project / "runs/sgd")
    assert (found["optimizer"]["rule"], found["optimizer"]["momentum"]) == ("sgd", 0.9)
    for file in ("config.json", "results.json"):  # unclipped, and still JSON
        assert "Infinity" not in (project / "runs/sgd" / file).read_text()
    assert found["after"]["accuracy"] > 0.8


def test_finetune_learns_from_the_float_model(trained, ssvq, project):
    common = ["--weights", trained, "--recipe", "recipe.json", "--steps", "20"]
    ssvq("finetune", *common, "--distill", "1", "--temperature", "2", "--features", "hidden",
         "--out", "runs/taught")  # fmt: skip
    found = results(project / "runs/taught")
    assert found["objective"] == {
        "label_smoothing": 0.0, "distill": 1.0, "temperature": 2.0, "feature_weight": 1.0,
    }  # fmt: skip
    lines = [
        json.loads(x) for x in (project / "runs/taught/metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["teacher_loss"] < lines[0]["teacher_loss"]
    assert lines[-1]["feature_loss"] < lines[0]["feature_loss"]
    # From a compressed model on, the teacher has to be named.
    ssvq("compress", "--weights", trained, "--recipe", "recipe.json", "--out", "runs/untaught")
    resumed = ["--weights", "runs/untaught", "--steps", "2", "--distill", "0.5"]
    with pytest.raises(SystemExit, match="is compressed, and no teacher: give --teacher"):
        ssvq("finetune", *resumed, "--out", "runs/again")
    assert not (project / "runs/again").exists()
    ssvq("finetune", *resumed, "--teacher", trained, "--out", "runs/again")
    ssvq("train", *IMAGES, "--steps", "1", "--seed", "7", "--out", "runs/other")
    with pytest.raises(SystemExit, match="teacher: "):  # another teacher makes another run
        ssvq("finetune", *resumed, "--teacher", "runs/other", "--out", "runs/again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "2"], "temperature is for distillation: give --distill"),
        (["--feature-weight", "2"], "feature_weight is for distillation: give --features"),
        (["--teacher", "runs/float"], "teacher is for distillation: give --distill 0.5"),
        (["--distill", "1.5"], "distill=1.5"),
        (
            ["--distill", "1", "--label-smoothing", "0.1"],
            "label_smoothing=0.1: with a distill of 1",
        ),
        (["--features", "nothing"], "the pattern matches no inner module"),
        (["--features", "["], "features: '[' is not a regular expression"),
        (["--features", "hidden", "--feature-weight", "0"], "feature_weight=0"),
        (["--average-decay", "1"], "average_decay=1"),
        (["--label-smoothing", "1"], "label_smoothing=1"),
        (["--optimizer.momentum", "1"], "momentum=1"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_there_is_a_folder(
    trained, ssvq, project, options, message
):
    with pytest.raises(SystemExit, match=re.escape(message)):
        ssvq("finetune", "--weights", trained, "--recipe", "recipe.json", "--out", "runs/refused",
             *options)  # fmt: skip
    assert not (project / "runs/refused").exists()


def test_an_unknown_preset(ssvq):
    with pytest.raises(SystemExit, match="preset='adam': choose one of adamw, sgd, deit"):
        ssvq("train", *IMAGES, "--preset", "adam", "--out", "runs/refused")
