"""SmolLM2-135M and the texts by which the language experiments calibrate and judge.

Its published linear weights have 5 bits already (Q4_1), its embedding 8.5: "float" here means these
values in float32, and what is compared is what further compression costs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from ssvq_jax.data.text import token_windows
from ssvq_jax.data.wikipedia import read_articles
from ssvq_jax.models import fetch
from ssvq_jax.models.import_gguf import load_gguf
from ssvq_jax.models.import_llama import stack_layers
from ssvq_jax.models.llama import Llama, LlamaConfig
from ssvq_jax.models.tokenizer import load_tokenizer
from ssvq_jax.training.perplexity import Reading, make_reading
from ssvq_jax.tree import PyTree

MODEL = "smollm2_135m"
WINDOW = 512
EVERY = 5  # of the articles, one in so many is held out to report, and one to choose by
PARTS = {"calibration": (2, 3, 4), "training": (2, 3, 4), "validation": (1,), "test": (0,)}
BYTES = 256  # of the quick model's vocabulary

Window = Int32[np.ndarray, " t"]
Reader = Callable[[PyTree, list[Window]], Reading]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token windows by part.

    Parts are ``calibration``, ``training``, ``validation``, ``test`` and perhaps ``wikitext2``.

    Attributes:
        windows: int32 ``[t]`` each, as many as were asked for; to train on, all that there are.
    """

    windows: Mapping[str, list[Window]]


@dataclasses.dataclass(frozen=True, eq=False)  # known by identity: it holds arrays
class Language:
    """The float model and its texts.

    Attributes:
        module: the model, its layers stacked.
        params: its parameters, float32.
        texts: windows by part.
        note: how the published weights were stored.
    """

    module: Llama
    params: PyTree
    texts: Texts
    note: str

    def forward(self, params: PyTree, tokens: Array) -> Float[Array, "b t vocab"]:
        """Logits of the next tokens."""
        return self.module.apply({"params": params}, tokens)  # type: ignore[return-value]

    @functools.cached_property
    def _read(self) -> Reader:
        return make_reading(self.forward)

    @functools.cache  # noqa: B019  (as long as the process)
    def reading(self, part: str) -> Reading:
        """What the float model predicts."""
        return self._read(self.params, self.texts.windows[part])

    def judge(
        self, params: PyTree, parts: Iterable[str], read: Reader | None = None
    ) -> dict[str, float]:
        """How well a model predicts parts, of those there are, and how often as the float one.

        Args:
            params: parameters to judge.
            parts: of the texts.
            read: reads with other computations than the model's own.
        """
        row, read = {}, read or self._read
        for part in parts:
            if part in self.texts.windows:
                reading = read(params, self.texts.windows[part])
                row |= {
                    f"perplexity_{part}": reading.quality.perplexity,
                    f"accuracy_{part}": reading.quality.accuracy,
                    f"agreement_{part}": reading.agreement(self.reading(part)),
                }
        return row


def open_language(
    weights: Path | None, wikipedia: Path, wikitext: Path | None, windows: int
) -> Language:
    """Opens the published model and cuts the texts.

    Args:
        weights: GGUF file, or None for what was fetched.
        wikipedia: dump of articles; every fifth article is held out, the ones after it validate.
        wikitext: a plain text, WikiText-2's validation part.
        windows: of each part.

    Raises:
        SystemExit: if the text is too short.
    """
    file = fetch(MODEL) if weights is None else weights
    found = load_gguf(file)
    tokenizer = load_tokenizer(file)
    params = jax.device_put(stack_layers(found.variables)["params"])
    articles = list(read_articles(wikipedia))
    documents: dict[str, list[str]] = {
        part: [text for i, text in enumerate(articles) if i % EVERY in own]
        for part, own in PARTS.items()
    }
    if wikitext is not None:
        documents["wikitext2"] = [wikitext.read_text(encoding="utf-8")]
    cut = {}
    for part, own in documents.items():
        found_windows = token_windows(
            map(tokenizer.encode, own), WINDOW, separator=tokenizer.separator
        )
        most = None if part == "training" else windows
        cut[part] = list(itertools.islice(found_windows, most))
    for part, own in cut.items():
        if len(own) < windows:
            raise SystemExit(
                f"{part}: the text has {len(own)} windows of {WINDOW} tokens, not {windows}: "
                "give a longer one, or fewer --windows"
            )
    return Language(Llama(found.config, scan=True), params, Texts(cut), found.note)


def made_up_language(windows: int) -> Language:
    """A small random model and random texts, to see that an experiment runs."""
    config = LlamaConfig(vocab=BYTES, width=64, depth=2, heads=4, kv_heads=2, hidden=96, context=64)
    module = Llama(config, scan=True)
    random = np.random.default_rng(0)
    parts: Iterator[str] = iter(PARTS)
    cut = {part: list(random.integers(0, BYTES, (windows, 32)).astype(np.int32)) for part in parts}
    params = module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return Language(module, params, Texts(cut), "random weights")
