"""``ssvq generate``: how a language model goes on from a text."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a text by a language model, float or compressed.

    The prompt is continued as plain text: smollm2_135m is an instruct model, and no chat template
    is put around what you say.
    """

    prompt: str
    """Text to go on from."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Language model from the registry (smollm2_135m)."""
    weights: Path | None = None
    """The folder of a run, a packed file, a GGUF file or a Hugging Face folder; by default the
    published weights that `ssvq models fetch` brought."""
    tokenizer: Path | None = None
    """tokenizer.json, model folder or GGUF file; by default what lies with the weights, or with the
    published ones."""
    scan: bool | None = None
    """Stack the layers: compiled sooner, and slower a token."""
    steps: int = 50
    """Tokens to add, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn, the more evenly the higher."""
    seed: int | None = None
    """Decides what is drawn; by default 0."""

    def run(self) -> None:
        """Prints the prompt and what follows."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from ssvq_jax.cli.language import is_language, open_language
        from ssvq_jax.cli.language_text import open_tokenizer
        from ssvq_jax.models.generate import generate

        if self.seed is not None and not self.temperature:
            raise ValueError("seed is for drawing: give --temperature, e.g. 0.7, too")
        if not 0 <= (self.seed or 0) < 2**31:
            raise ValueError(f"seed={self.seed}: give 0 to 2**31 - 1")
        if (self.model or self.weights) and not is_language(self.model, self.weights):
            raise ValueError(
                f"{self.model or self.weights} is no language model: give --model smollm2_135m, or "
                "--weights of one"
            )
        language = open_language(self.model, self.weights, scan=self.scan)
        tokenizer = open_tokenizer(language, self.tokenizer)
        prompt = tokenizer.encode(self.prompt)
        added = generate(
            language.module,
            language.params(),
            jnp.asarray([prompt], jnp.int32),
            self.steps,
            temperature=self.temperature,
            key=jax.random.key(self.seed or 0),
            end=tokenizer.end,
        )
        tokens = np.asarray(added[0]).tolist()
        if tokenizer.end in tokens:
            tokens = tokens[: tokens.index(tokenizer.end)]
        print(self.prompt + tokenizer.decode(tokens))
