"""Language models of the Llama family (Touvron et al., arXiv 2302.13971; arXiv 2407.21783)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ssvq_jax.models.rope import llama3_factors, rope_frequencies, rotate


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama.

    Attributes:
        vocab: number of tokens.
        width: features of a token.
        depth: number of layers.
        heads: attention heads of queries; divides ``width`` into features of an even number.
        kv_heads: attention heads of keys and values, each for ``heads / kv_heads`` heads of queries
            (grouped-query attention, Ainslie et al., arXiv 2305.13245).
        hidden: hidden features of the MLP.
        context: tokens that it was trained to see; nothing is allocated for them.
        rope_theta: base of the rotary embeddings' wavelengths.
        rope_factors: what the rotary frequencies are divided by, one number for each of
            ``width / heads / 2``; empty for 1. `llama3_factors` gives those of Llama 3.
        norm_epsilon: added to the mean square in the norms.
        tied: the embedding is the output kernel, too.
    """

    vocab: int = 49_152
    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3
    hidden: int = 1536
    context: int = 8192
    rope_theta: float = 100_000.0
    rope_factors: tuple[float, ...] = ()
    norm_epsilon: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "depth", "heads", "kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width} into an even number of "
                "features a head"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if len(self.rope_factors) not in (0, self.head_dim // 2):
            raise ValueError(
                f"rope_factors has {len(self.rope_factors)} numbers: give {self.head_dim // 2}, "
                "one for each pair of a head's features, or none"
            )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads


CONFIGS: dict[str, LlamaConfig] = {
    "smollm2_135m": LlamaConfig(),
    "llama3_2_1b": LlamaConfig(
        vocab=128_256,
        width=2048,
        depth=16,
        heads=32,
        kv_heads=8,
        hidden=8192,
        context=131_072,
        rope_theta=500_000.0,
        rope_factors=llama3_factors(
            64,
            500_000.0,
            factor=32.0,
            low_frequency=1.0,
            high_frequency=4.0,
            trained_length=8192,
        ),
    ),
}


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(features, use_bias=False, kernel_init=init, dtype=dtype, name=name)


def _rms_norm(tokens: Float[Array, "b t w"], epsilon: float, name: str) -> Float[Array, "b t w"]:
    norm = nn.RMSNorm(epsilon, name=name)
    return norm(tokens.astype(jnp.float32)).astype(tokens.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions.

    With a collection ``cache``, of `empty_cache`, it writes the tokens' keys and values there and
    looks at all that is there; without, the tokens are all there is.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t w"], positions: Int[Array, " t"]
    ) -> Float[Array, "b t w"]:
        """Mixes the tokens, which are at ``positions``, one after another."""
        cfg = self.config
        frequencies = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_factors)

        def project(name: str, heads: int) -> Float[Array, "b t n d"]:
            features = _dense(heads * cfg.head_dim, self.dtype, name)(tokens)
            return features.reshape(*tokens.shape[:2], heads, cfg.head_dim)

        queries = rotate(project("q", cfg.heads), positions, frequencies)
        keys = rotate(project("k", cfg.kv_heads), positions, frequencies)
        values = project("v", cfg.kv_heads)
        if self.has_variable("cache", "keys"):
            keys = self._append("keys", keys, positions[0])
            values = self._append("values", values, positions[0])
            seen = jnp.arange(keys.shape[1])[None, :] <= positions[:, None]
            mixed = jax.nn.dot_product_attention(queries, keys, values, mask=seen[None, None])
        else:
            mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return _dense(cfg.width, self.dtype, "o")(mixed.reshape(tokens.shape))

    def _append(
        self, name: str, new: Float[Array, "b t n d"], start: Int[Array, ""]
    ) -> Float[Array, "b s n d"]:
        cache = self.get_variable("cache", name)
        cache = lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)
        self.put_variable("cache", name, cache)
        return cache


class Mlp(nn.Module):
    """Gated MLP with SiLU (SwiGLU; Shazeer, arXiv 2002.05202)."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        """Transforms each token."""
        gate = nn.silu(_dense(self.config.hidden, self.dtype, "gate")(tokens))
        up = _dense(self.config.hidden, self.dtype, "up")(tokens)
        return _dense(self.config.width, self.dtype, "down")(gate * up)


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t w"], positions: Int[Array, " t"]
    ) -> Float[Array, "b t w"]:
        """Adds attention and MLP to the tokens."""
        epsilon = self.config.norm_epsilon
        attention = Attention(self.config, self.dtype, name="attn")
        mlp = Mlp(self.config, self.dtype, name="mlp")
        tokens = tokens + attention(_rms_norm(tokens, epsilon, "attn_norm"), positions)
        tokens = tokens + mlp(_rms_norm(tokens, epsilon, "mlp_norm"))
        self.sow("intermediates", "tokens", tokens)
        return tokens


class Llama(nn.Module):
    """Llama: embedding, layers, norm, output kernel.

    Leaf paths: ``embed/embedding``, ``layers_0/attn/q/kernel``, ``layers_0/mlp/gate/kernel``,
    ``layers_0/attn_norm/scale``, ``norm/scale``, and ``lm_head/kernel`` unless it is tied.

    Attributes:
        config: sizes.
        dtype: dtype of activations; parameters and logits are float32.
        scan: stack the layers' parameters on a leading axis (``layers/attn/q/kernel``) and scan
            over them: compile time no longer grows with depth.
        remat: for the backward pass keep only the layers' inputs and compute the rest again.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Predicts each next token from all up to there.

        With a collection ``cache``, of `ssvq_jax.models.generate.empty_cache`, the tokens go on
        from those that are in the cache; apply with ``mutable=["cache"]`` to get the longer one.

        Args:
            tokens: token numbers.

        Returns:
            Logits of the next tokens, float32.
        """
        cfg = self.config
        embed = nn.Embed(
            cfg.vocab,
            cfg.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="embed",
        )
        positions = jnp.arange(tokens.shape[1])
        if self.has_variable("cache", "length"):
            length = self.get_variable("cache", "length")
            positions = positions + length
            self.put_variable("cache", "length", length + tokens.shape[1])
        hidden = embed(tokens)
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scan:
            layers = nn.scan(
                lambda layer, carry, positions: (layer(carry, positions), None),
                variable_axes={"params": 0, "cache": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=cfg.depth,
            )
            hidden, _ = layers(layer(cfg, self.dtype, name="layers"), hidden, positions)
        else:
            for i in range(cfg.depth):
                hidden = layer(cfg, self.dtype, name=f"layers_{i}")(hidden, positions)
        hidden = _rms_norm(hidden.astype(jnp.float32), cfg.norm_epsilon, "norm")
        if cfg.tied:
            return jnp.einsum("btw,vw->btv", hidden, embed.embedding)
        return _dense(cfg.vocab, jnp.float32, "lm_head")(hidden)
