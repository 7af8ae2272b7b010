"""Weights from the Hugging Face hub, where there is a network."""

import importlib
from pathlib import Path

_WANTED = ["*.json", "*.safetensors", "*.gguf", "pytorch_model*.bin", "tokenizer.model"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's: owner/name, with @revision or without.

    Example:
        >>> is_hub_id("facebook/deit-tiny-patch16-224"), is_hub_id("efficientnet_lite0")
        (True, False)
    """
    parts = name.split("/")
    return len(parts) == 2 and all(parts)


def fetch_from_hub(name: str) -> Path:
    """Brings the weights, configuration and tokenizer of a repository into the hub's own cache.

    Args:
        name: ``owner/name`` or ``owner/name@revision``. Without a network, what was fetched before
            is found again.

    Returns:
        Their folder, for ``load_llama_folder``; one for image models has a file for `load_tensors`.

    Raises:
        ValueError: without the package ``huggingface_hub``, or if it cannot bring them.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"'{name}' is on the Hugging Face hub, which needs a package: "
            "pip install huggingface_hub"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        folder = hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_WANTED
        )
    except Exception as error:  # of many kinds, those of its network library among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the Hugging Face hub cannot bring '{name}' ({reason}): check the name, the network "
            "and the access token, or give a local file with --weights"
        ) from error
    return Path(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, those to prefer first.

    Raises:
        ValueError: if there are none.
    """
    for pattern in ("*.safetensors", "*.gguf", "*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise ValueError(f"{folder} holds no .safetensors, .gguf or .bin file: give another repository")
