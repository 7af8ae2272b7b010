"""The weights that a command begins with: of a run, a file, or the model itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.packed import PACKED, packed_config
from ssvq_jax.cli.run_folder import is_run, read_config
from ssvq_jax.problems import ProblemsError
from ssvq_jax.training.average import start_average
from ssvq_jax.training.checkpoint import Checkpoints, Which
from ssvq_jax.training.identity import checksum
from ssvq_jax.tree import leaf_path, split

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from ssvq_jax.models import LoadedModel
    from ssvq_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where a command begins.

    Attributes:
        params: float parameters of a model that is not compressed, else their shapes.
        model_state: the model's other collections.
        plan: of a compressed run, else None.
        variables: of a compressed run, else None.
        origin: where they are from, and a checksum: a run is not resumed with other weights.
    """

    params: Any
    model_state: Any
    plan: "Plan | None"
    variables: Mapping[str, Any] | None
    origin: dict[str, Any]


def run_config(weights: Path | None) -> dict[str, Any] | None:
    """Configuration of the run that weights are taken from, or what a packed file says of it.

    Raises:
        ValueError: for the folder of several runs, or what cannot be read.
    """
    from ssvq_jax.models import is_tensors

    if weights is None or not weights.is_dir():
        return packed_config(weights)
    if is_tensors(weights) and not is_run(weights):  # a Hugging Face folder has a config.json too
        return None
    config = read_config(weights)
    if config is None and is_run(weights):
        raise ValueError(
            f"{weights} is a run that has lost its config.json: give a file in it, e.g. "
            f"{weights / PACKED}"
        )
    if config is not None and config["command"] == "quickstart":
        files = sorted(str(file) for file in (weights / "packed").glob("*.safetensors"))
        raise ValueError(f"{weights} holds several models: give one of its files, {files}")
    return config


def initial_weights(model: "LoadedModel", image_shape: tuple[int, int, int], seed: int) -> Weights:
    """Random weights, the same for a seed."""
    import jax

    state = model.init(jax.random.split(jax.random.key(seed))[0], image_shape)
    params = state.pop("params")
    origin = {"from": f"seed {seed}", "crc32": checksum((params, state))}
    return Weights(params, state, None, None, origin)


def open_weights(
    path: Path | None,
    model: "LoadedModel",
    image_shape: tuple[int, int, int],
    which: Which = "last",
    *,
    new_head: bool = False,
) -> Weights:
    """Takes weights from a run, a file, an orbax checkpoint, or what the model came with.

    Args:
        path: a run's folder, a packed file, what `ssvq_jax.models.load_weights` reads, or weights
            of another implementation; None for the model's, or what `ssvq models fetch` brought.
        model: the model.
        image_shape: ``(h, w, c)``.
        which: which checkpoint of a run.
        new_head: begin with an untrained classifier; for weights of another implementation.

    Raises:
        ValueError: if there are none, or they do not fit the model.
    """
    from ssvq_jax.models import PUBLISHED, fetched, fit_weights, is_foreign, load_weights

    shapes = model.shapes(image_shape)
    if path is None and model.variables is None and model.name in PUBLISHED:
        path = fetched(model.name)
    if path is not None and run_config(path) is not None:
        return _from_run(path, shapes, which) if path.is_dir() else from_packed(path, shapes)
    foreign = path is not None and is_foreign(path)
    if new_head and path is not None and not foreign:
        raise ValueError(
            "new_head is for published weights of another implementation: leave it out"
        )
    if path is not None and foreign:
        found, source = model.import_weights(path, image_shape, new_head=new_head), str(path)
    elif path is not None:
        found, source = load_weights(path), str(path)
    elif model.variables is not None:
        found, source = model.variables, f"model '{model.name}'"
    else:
        raise ValueError(
            f"model '{model.name}' comes without weights: give --weights with a run's folder, a "
            ".safetensors, .pth or msgpack file or an orbax checkpoint, or "
            + (
                f"bring published ones with `ssvq models fetch {model.name}`"
                if model.name in PUBLISHED
                else "train it with `ssvq train`"
            )
        )
    variables = fit_weights(model, found, shapes, source)
    params = variables.pop("params")
    origin = {"from": source, "crc32": checksum((params, variables))}
    return Weights(params, variables, None, None, origin)


def _from_run(path: Path, shapes: Mapping[str, Any], which: Which) -> Weights:
    """Reads what a run has come to."""
    import jax

    folder = path / "checkpoints" / "model"
    command = (read_config(path) or {}).get("command")
    if not any(step.name.isdigit() for step in folder.glob("*")):
        if (path / PACKED).is_file():
            return from_packed(path / PACKED, shapes)
        if command not in ("train", "compress", "finetune"):
            raise ValueError(
                f"{path} is a run of `ssvq {command}`, which has no model: give others"
            )
        raise ValueError(
            f"{path} is unfinished: run `ssvq {command}` again with the same options to go on"
        )
    params, others = shapes["params"], {k: v for k, v in shapes.items() if k != "params"}
    with Checkpoints(folder, read_only=True) as checkpoints:  # the run may be going on
        plan = checkpoints.plan(which)
        params = _with_dtypes(params, plan)
        try:
            learned, fixed = split(jax.eval_shape(plan.init, jax.random.key(0), params))
        except ProblemsError as error:
            first, *others = error.problems
            more = f" (and {len(others)} more problems)" if others else ""
            raise ValueError(f"{path} is a run of another model: {first}{more}") from error
        template = {"params": learned, "fixed": fixed, "model_state": others}
        if checkpoints.holds("average", which):  # by which the run is judged
            average = jax.eval_shape(start_average, learned, others)
            template = {"average": average, "fixed": fixed}
        state = checkpoints.restore(template, plan, which, partial=True).state
    if "average" in state:
        found = state["average"].read((learned, others))
        state |= dict(zip(("params", "model_state"), found, strict=True))
    variables = {**state["params"], **state["fixed"]}
    origin = {"from": str(path), "which": which, "crc32": checksum(state)}
    return _encoded(params, state["model_state"], plan, variables, origin)


def from_packed(path: Path, shapes: Mapping[str, Any]) -> Weights:
    """Reads a packed file.

    Args:
        path: the file.
        shapes: of the model's variables.

    Raises:
        ValueError: if it is damaged, or of another model.
    """
    import jax

    from ssvq_jax.packing import load

    others = {name: tree for name, tree in shapes.items() if name != "params"}
    try:
        with load(path, like=shapes["params"]) as file:
            file.check_fits(shapes["params"])
            params = _with_dtypes(shapes["params"], file.plan)
            plan, variables, state = file.plan, file.read().variables(), file.state() or {}
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    if jax.tree.structure(state) != jax.tree.structure(others):
        raise ValueError(f"{path} has the collections {sorted(state)}, the model {sorted(others)}")
    state = jax.tree.map(jax.numpy.asarray, state)
    origin = {"from": str(path), "crc32": checksum((variables, state))}
    return _encoded(params, state, plan, variables, origin)


def _with_dtypes(params: Any, plan: "Plan") -> Any:
    """Shapes of a model's parameters, in the dtypes of a plan."""
    import jax

    dtypes = {leaf.path: leaf.dtype for leaf in plan.leaves}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, dtypes.get(leaf_path(path), leaf.dtype)
        ),
        params,
    )


def _encoded(
    params: Any, state: Any, plan: "Plan", variables: Mapping[str, Any], origin: dict[str, Any]
) -> Weights:
    """Compressed weights; those of a plan that compresses nothing are float weights."""
    if plan.entries:
        return Weights(params, state, plan, variables, origin)
    return Weights(plan.decode(variables), state, None, None, origin)


def open_plan(recipe: str | None, weights: Weights) -> "Plan":
    """The plan of compressed weights, or a recipe bound to float ones.

    Raises:
        ValueError: without a recipe, for one that is not that of the weights, or that compresses
            nothing.
    """
    from ssvq_jax.plan import make_plan
    from ssvq_jax.recipe import load_recipe

    if recipe is None and weights.plan is None:
        raise ValueError("no recipe: give --recipe with a preset, e.g. ssvq-21x, or a JSON file")
    if recipe is None and weights.plan is not None:
        return weights.plan
    plan = make_plan(weights.params, load_recipe(recipe or ""))
    if weights.plan is not None and plan != weights.plan:
        raise ValueError(
            f"recipe '{recipe}' is not the one that {weights.origin['from']} was compressed by: "
            "leave --recipe out, or begin with float weights"
        )
    if not plan.entries:
        raise ValueError(f"recipe '{recipe}' compresses nothing: give one with a quantizer")
    return plan
