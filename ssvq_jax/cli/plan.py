"""``ssvq plan``: what a recipe would do to a model, before anything is computed."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Show what a recipe makes of a model: a table of methods, bits and bytes for every weight.

    Only shapes are looked at; no weight is loaded or computed.
    """

    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Model from the registry, e.g. deit_tiny."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (e.g. ssvq-21x, vq-21x, uniform-8bit) or a recipe in a JSON file."""
    classes: int | None = None
    """Number of classes, if not the model's own."""
    scan: bool = False
    """Stack the blocks for a scan; every layer still gets its own codebooks."""
    out: Path | None = None
    """Write the plan as JSON to this file."""

    def run(self) -> None:
        """Prints the table."""
        from ssvq_jax.models import create, param_shapes
        from ssvq_jax.plan import make_plan
        from ssvq_jax.recipe import load_recipe
        from ssvq_jax.report import print_bits

        model = create(self.model, classes=self.classes, scan=self.scan)
        plan = make_plan(param_shapes(model), load_recipe(self.recipe))
        print_bits(f"{self.model} with {self.recipe}", plan.bits())
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
            print(f"plan written to {self.out}")
