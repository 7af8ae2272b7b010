"""Language models as commands open them: sizes and weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssvq_jax.cli.packed import PACKED
from ssvq_jax.cli.weights import Weights, from_packed, run_config
from ssvq_jax.training.identity import checksum

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from jaxtyping import Array

    from ssvq_jax.models.gguf_file import GgufFile
    from ssvq_jax.models.llama import Llama, LlamaConfig
    from ssvq_jax.tree import PyTree

_OF_NO_NAME = "llama"  # a model whose sizes are those of its file


@dataclasses.dataclass(frozen=True)
class Language:
    """A language model with its weights.

    Attributes:
        name: in the registry, or 'llama'.
        config: its sizes.
        scan: whether its layers are stacked.
        weights: float or compressed.
        path: where they are.
        gguf: the file that they are of, open, if it is of that kind.
        run: what a run or packed file says of itself; empty for other weights.
        note: what a report on the model must say.
    """

    name: str
    config: "LlamaConfig"
    scan: bool
    weights: Weights
    path: Path
    gguf: "GgufFile | None" = None
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def module(self) -> "Llama":
        """The model."""
        from ssvq_jax.models.llama import Llama

        return Llama(self.config, scan=self.scan)

    @property
    def float_crc32(self) -> str | None:
        """Checksum of the float weights: its own, or what was compressed."""
        own = self.weights.plan is None
        return self.weights.origin["crc32"] if own else self.run.get("float_crc32")

    @property
    def told(self) -> dict[str, Any]:
        """What a run or packed file says so that it can be opened by itself."""
        return {
            "model": self.name,
            "scan": self.scan or None,
            "task": "language",
            "sizes": dataclasses.asdict(self.config),
            "float_crc32": self.float_crc32,
        }

    def params(self) -> "PyTree":
        """The weights that the model computes with; compressed ones are decoded."""
        weights = self.weights
        if weights.plan is None or weights.variables is None:
            return weights.params
        return weights.plan.finalize(weights.variables).decode()

    def forward(self, params: "PyTree", tokens: "Array") -> "Array":
        """The model as `ssvq_jax.training.perplexity` calls it."""
        return self.module.apply({"params": params}, tokens)  # pyright: ignore[reportReturnType]


def is_language(model: str | None, weights: Path | None) -> bool:
    """Whether a command works on a language model.

    Args:
        model: what ``--model`` says.
        weights: what ``--weights`` says.

    Raises:
        ValueError: if the weights are a run or packed file that cannot be read.
    """
    from ssvq_jax.models import REGISTRY

    if model is not None and model != _OF_NO_NAME:
        return model in REGISTRY and REGISTRY[model].task == "language"
    if weights is None:
        return False
    if weights.suffix == ".gguf" or _is_hub_folder(weights):
        return True
    return (run_config(weights) or {}).get("task") == "language"


def open_language(model: str | None, weights: Path | None, *, scan: bool | None = None) -> Language:
    """Opens a language model.

    Args:
        model: name in the registry; None for that of the weights.
        weights: a GGUF file, a Hugging Face folder, the folder of a run, a packed file, or other
            weights of the model ``model``; None for the published ones that were fetched.
        scan: stack the layers; None for as the weights have them, or not at all.

    Raises:
        ValueError: if something is missing or does not fit.
    """
    name = None if model == _OF_NO_NAME else model
    path = _published(name) if weights is None else weights
    if not path.exists():
        raise ValueError(
            f"no weights at {path}: give a GGUF file, a Hugging Face folder, a packed file or the "
            "folder of a run"
        )
    stacked = bool(scan)
    if _is_hub_folder(path):
        from ssvq_jax.models.import_llama import load_llama_folder

        config, variables = load_llama_folder(path, scan=stacked)
        found = Language("", config, stacked, _float_weights(variables, path), path)
    elif path.suffix == ".gguf":
        from ssvq_jax.models.gguf_file import GgufFile
        from ssvq_jax.models.import_gguf import gguf_model

        file = GgufFile(path)
        read = gguf_model(file, scan=stacked)
        own = _float_weights(read.variables, path)
        found = Language("", read.config, stacked, own, path, file, note=read.note)
    elif (run := run_config(path)) is not None:
        found = _from_run(run, path, scan)
        name = name or found.name
    else:
        config = _sizes_of(name, f"{path} does not say of which model it is")
        found = Language("", config, stacked, _named_weights(path, config, stacked), path)
    if name not in (None, _OF_NO_NAME):
        _check_sizes(found, name or "")
    return dataclasses.replace(found, name=name or _OF_NO_NAME)


def find_float(language: Language, given: Path | None) -> Language | None:
    """Finds the float weights that compressed ones came from.

    Args:
        language: the compressed model.
        given: where they are, if the user says.

    Returns:
        The float model; None if nobody knows where, or what is there is not what was compressed.

    Raises:
        ValueError: if what the user gave is no float model of these sizes.
    """
    from ssvq_jax.models import PUBLISHED, fetched

    if given is not None:
        found = open_language(language.name, given, scan=language.scan)
        if found.weights.plan is not None or found.config != language.config:
            raise ValueError(f"reference {given} is no float model of the same sizes")
        return found
    origin = language.run.get("weights")  # of a run, not of a file by itself
    places = [Path(origin["from"])] if isinstance(origin, Mapping) else []
    kept = fetched(language.name) if language.name in PUBLISHED else None
    if kept is not None and kept not in places:
        places.append(kept)
    for place in places:
        if place.exists():
            try:
                found = open_language(language.name, place, scan=language.scan)
            except (ValueError, ImportError):  # changed meanwhile: nobody has asked for it
                continue
            if found.weights.plan is None and found.float_crc32 == language.float_crc32:
                return found
    return None


def _published(name: str | None) -> Path:
    from ssvq_jax.models import PUBLISHED, fetched

    if name is None:
        raise ValueError(
            "no model: give --model smollm2_135m, or --weights with a GGUF file, a Hugging Face "
            "folder, a packed file or the folder of a run"
        )
    kept = fetched(name) if name in PUBLISHED else None
    if kept is None:
        bring = f", or bring published ones with `ssvq models fetch {name}`"
        raise ValueError(
            f"model '{name}' comes without weights: give --weights with a GGUF file or a Hugging "
            "Face folder" + (bring if name in PUBLISHED else "")
        )
    return kept


def _is_hub_folder(path: Path) -> bool:
    """Whether a folder is a model as on the Hugging Face hub, and not one of our runs."""
    from ssvq_jax.json_files import read_json

    try:
        told = read_json(path / "config.json")
    except ValueError:
        return False
    return isinstance(told, dict) and "model_type" in told


def _shapes(config: "LlamaConfig", scan: bool) -> dict[str, Any]:
    from ssvq_jax.models.import_llama import llama_shapes

    return dict(llama_shapes(config, scan=scan))


def _float_weights(variables: Mapping[str, Any], path: Path) -> Weights:
    import jax

    params = jax.tree.map(jax.numpy.asarray, variables["params"])
    return Weights(params, {}, None, None, {"from": str(path), "crc32": checksum(params)})


def _named_weights(path: Path, config: "LlamaConfig", scan: bool) -> Weights:
    """Weights without their sizes: of `LlamaForCausalLM`, or under the names of our leaves."""
    from ssvq_jax.models import LoadedModel, fit_weights, is_foreign, load_tensors, load_weights
    from ssvq_jax.models.import_llama import import_llama
    from ssvq_jax.models.llama import Llama

    shapes = _shapes(config, scan)
    if is_foreign(path):
        variables = import_llama(load_tensors(path), shapes, config, source=str(path))
    else:
        variables = load_weights(path)
    model = LoadedModel(_OF_NO_NAME, Llama(config, scan=scan))
    return _float_weights(fit_weights(model, variables, shapes, str(path)), path)


def _from_run(run: Mapping[str, Any], path: Path, scan: bool | None) -> Language:
    """A packed file, or the folder of a run that has one."""
    from ssvq_jax.models.llama import LlamaConfig

    if run.get("task") != "language":
        raise ValueError(f"{path} is of a model for images: leave --model out")
    file = path / PACKED if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} holds no {PACKED}: its run did not come to an end")
    try:
        sizes = dict(run["sizes"])
        config = LlamaConfig(**{**sizes, "rope_factors": tuple(sizes["rope_factors"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} tells sizes that are none of a Llama ({error})") from error
    stacked = bool(run.get("scan"))
    if scan not in (None, stacked):
        how = "stacked" if stacked else "not stacked"
        raise ValueError(f"scan={scan}: the layers in {path} are {how}: leave it out")
    weights = from_packed(file, _shapes(config, stacked))
    return Language(str(run["model"]), config, stacked, weights, path, run=run)


def _sizes_of(name: str | None, problem: str) -> "LlamaConfig":
    from ssvq_jax.models.llama import CONFIGS

    if name not in CONFIGS:
        raise ValueError(f"{problem}: give --model with one of {sorted(CONFIGS)}")
    return CONFIGS[name]


def _check_sizes(language: Language, name: str) -> None:
    """Raises ValueError if these are not the sizes of a model of the registry."""
    wanted = _sizes_of(name, f"model '{name}' is unknown")
    for field in dataclasses.fields(wanted):
        here, there = (getattr(config, field.name) for config in (language.config, wanted))
        if not _alike(here, there):
            raise ValueError(
                f"{language.path} has {field.name}={here}, and model '{name}' {there}: leave "
                "--model out"
            )


def _alike(first: Any, second: Any) -> bool:
    """Files round numbers to 32 bits."""
    import numpy as np

    pair = [np.asarray(x, np.float32) for x in (first, second)]
    return pair[0].shape == pair[1].shape and bool(np.allclose(*pair, rtol=1e-5, atol=0))
