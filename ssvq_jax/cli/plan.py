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

    model: Annotated[str, tyro.conf.arg(metavar="NAME_OR_MODULE:FUNCTION")]
    """Model from the registry (deit_tiny), or module:function of your own code, which returns a
    flax.linen module, or (module, variables)."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME_OR_FILE")] = "ssvq-21x"
    """Preset (e.g. ssvq-21x, vq-21x, uniform-8bit) or a recipe in a JSON file."""
    classes: int | None = None
    """Number of classes, if not the model's own."""
    scan: bool = False
    """Stack the blocks for a scan; every layer still gets its own codebooks."""
    image_size: int | None = None
    """Height and width of the images; by default what the model says."""
    channels: int = 3
    """Channels of the images, if the model does not say."""
    out: Path | None = None
    """Write the plan as JSON to this file."""

    def run(self) -> None:
        """Prints the table."""
        from ssvq_jax.cli.language import is_language
        from ssvq_jax.models import create, load_model, param_shapes
        from ssvq_jax.plan import make_plan
        from ssvq_jax.recipe import load_recipe
        from ssvq_jax.report import print_bits

        if is_language(self.model, None):
            if self.classes is not None or self.image_size is not None:
                raise ValueError(f"model '{self.model}' has neither classes nor an image size")
            params = param_shapes(create(self.model, scan=self.scan))
        else:
            model = load_model(self.model, classes=self.classes, scan=self.scan)
            variables = model.variables
            if variables is None:
                variables = model.shapes(model.image_shape(self.image_size, self.channels))
            params = variables["params"]
        plan = make_plan(params, load_recipe(self.recipe))
        print_bits(f"{self.model} with {self.recipe}", plan.bits())
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
            print(f"plan written to {self.out}")
