"""The compressed product: the reference against numpy, the kernels against the reference.

The kernels run in interpret mode here and are lowered for TPUs and GPUs. Lowering is not
compilation: it says nothing of what the compilers of these devices accept, of memory or of speed.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssvq_jax import LeafSpec, SignSplit, Uniform, Vector
from ssvq_jax.inference import PackedLeaf
from ssvq_jax.inference.gpu_kernel import gpu_matmul
from ssvq_jax.inference.matmul import matmul
from ssvq_jax.quantizers.streams import pack_fields


@functools.cache
def packed(quantizer, shape, dtype="float32"):
    """A leaf of random fields: nothing is clustered."""
    spec, rng = LeafSpec("block/kernel", shape, dtype), np.random.default_rng(0)
    if isinstance(quantizer, Uniform):
        learned = {
            "latent": rng.normal(size=shape).astype("float32"),
            "step": rng.uniform(0.1, 0.2, quantizer._steps(spec)).astype("float32"),
        }
        fields = quantizer.pack(learned, {}, spec)
        return PackedLeaf(arrays(pack_fields(quantizer, fields, spec)), quantizer, spec)
    codebook = rng.normal(size=(quantizer.codewords, quantizer.dim)).astype("float32")
    learned = {"codebook": codebook}
    if quantizer.channel_scale:
        scale = rng.uniform(0.5, 2.0, shape[quantizer.channel_axis])
        learned["scale"] = scale.astype("float32")
    if isinstance(quantizer, SignSplit):
        learned["sign_latent"] = rng.normal(size=shape).astype("float32")
    codes = rng.integers(0, quantizer.codewords, quantizer.layout(spec).count)
    fields = quantizer.pack(learned, {"codes": codes.astype("uint32")}, spec)
    return PackedLeaf(arrays(pack_fields(quantizer, fields, spec)), quantizer, spec)


def arrays(streams):
    return {name: jnp.asarray(stream) for name, stream in streams.items()}


def activations(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


@jax.jit
def interpreted(x, leaf):
    return matmul(x, leaf, implementation="pallas", interpret=True)


def of_streams(leaf, **options):
    """The product as a function of x and of the arrays in a leaf."""
    return jax.jit(lambda x, streams: matmul(x, replace(leaf, streams=streams), **options))


def dense(x, leaf):
    """The product in float64, of the weight as x's dtype sees it."""
    return np.float64(x) @ np.float64(leaf.decode().astype(x.dtype))


def assert_close(product, x, leaf):
    """To float32 rounding of sums, and to the rounding of the result."""
    assert product.dtype == x.dtype
    expected = dense(x, leaf)
    scale = np.abs(np.float64(x)) @ np.abs(np.float64(leaf.decode().astype(x.dtype)))
    bound = 4 * np.finfo("float32").eps * scale
    if x.dtype != jnp.float32:
        bound = bound + float(jnp.finfo(x.dtype).eps) / 2 * np.abs(expected)
    assert product.shape == expected.shape
    assert np.all(np.abs(np.float64(product) - expected) <= bound)


MATRIX = packed(SignSplit(16, 8), (40, 64))
TILED = {
    "signs": (SignSplit(16, 8), (700, 1024)),
    "rows that begin within bytes": (SignSplit(5, 3), (601, 1023)),
    "padded": (Vector(7, 4, pad=True), (530, 1030)),
    "wide codes": (Vector(2000, 2), (300, 1026)),
    "more codewords than a tile has": (Vector(2500, 16), (257, 2576)),
    "scaled": (SignSplit(16, 8, channel_scale=True), (520, 1024)),
    "scaled, axes as in Equinox": (Vector(8, 4, channel_scale=True, channel_axis=0), (513, 1028)),
    "uniform": (Uniform(bits=3), (601, 1001)),
    "uniform, axes as in Equinox": (Uniform(bits=4, channel_axis=-2), (601, 1000)),
    "uniform a tensor": (Uniform(bits=8, per_channel=False), (520, 1024)),
    "another axis": (SignSplit(16, 8, axis=0), (64, 50)),
    "float16": (Vector(16, 4, codebook_dtype="float16"), (1, 64)),
}


@pytest.mark.parametrize("case", TILED)
def test_the_reference_is_the_dense_product(case):
    leaf = packed(*TILED[case])
    x = activations(3, leaf.spec.shape[0])
    assert_close(matmul(x, leaf), x, leaf)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_in_half_precision(dtype):
    for leaf_dtype in ("float32", dtype):
        leaf = packed(SignSplit(16, 8), (700, 1024), leaf_dtype)
        x = activations(3, 700, dtype=dtype)
        assert_close(matmul(x, leaf), x, leaf)


def test_the_reference_never_holds_the_whole_weight():
    leaf = packed(SignSplit(16, 8), (1200, 1024))
    x = activations(1, 1200)
    program = of_streams(leaf).lower(x, leaf.streams).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.6 * 4 * leaf.spec.size


KERNEL = {
    "default": (SignSplit(16, 8), (40, 64), (3,)),
    "more than one block of everything": (SignSplit(16, 8), (130, 2064), (520,)),
    "one row": (SignSplit(3, 2), (1, 10), (1,)),
    "2 bits, leading axes": (SignSplit(4, 4), (130, 36), (2, 1, 3)),
    "no leading axis": (SignSplit(4, 4), (9, 36), ()),
    "3 bits": (Vector(6, 2), (129, 258), (129,)),
    "3 bits of 8": (SignSplit(8, 8), (20, 72), (3,)),
    "4 bits of 16, scaled": (Vector(16, 16, channel_scale=True), (33, 48), (3,)),
    "5 bits": (SignSplit(31, 4), (150, 132), (1,)),
    "6 bits": (Vector(64, 4), (30, 100), (3,)),
    "6 bits, scaled": (SignSplit(64, 4, channel_scale=True), (30, 100), (3,)),
    "7 bits, odd dim": (SignSplit(100, 3), (51, 33), (2,)),
    "8 bits, two tables": (Vector(200, 2), (41, 70), (129,)),
    "8 bits, scaled rows": (
        SignSplit(256, 8, channel_scale=True, channel_axis=0), (140, 72), (3,),
    ),
    "float32 codebook": (SignSplit(16, 4, codebook_dtype="float32"), (40, 60), (3,)),
    "float16 codebook, two tables": (Vector(130, 2, codebook_dtype="float16"), (40, 60), (3,)),
    "single weights": (Vector(4, 1), (17, 13), (3,)),
}  # fmt: skip
NIGHTLY = (
    "default", "one row", "3 bits", "4 bits of 16, scaled", "6 bits", "8 bits, two tables",
    "float32 codebook",
)  # fmt: skip


CASES = [pytest.param(c, marks=[pytest.mark.slow] if c in NIGHTLY else []) for c in KERNEL]


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_reference(case):
    quantizer, shape, batch = KERNEL[case]
    leaf, x = packed(quantizer, shape), activations(*batch, shape[0])
    assert_close(interpreted(x, leaf), x, leaf)


@pytest.mark.parametrize("leaf_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_in_half_precision(dtype, leaf_dtype):
    leaf = packed(SignSplit(16, 8, channel_scale=True), (150, 72), leaf_dtype)
    x = activations(5, 150, dtype=dtype)
    assert_close(interpreted(x, leaf), x, leaf)


OTHERS = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((4, 16), (6, 8))]


@pytest.mark.parametrize(("width", "dim"), [(2, 8), (3, 4), (5, 2), (8, 4), *OTHERS])
def test_the_kernel_decodes_every_bit(width, dim):
    # A row of the identity takes a row of W: no sum, so no rounding.
    leaf = packed(SignSplit(2**width, dim), (3, (2**width + 1) * dim))
    product = interpreted(jnp.eye(3), leaf)
    np.testing.assert_array_equal(product, leaf.decode())


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_for_gpus_is_the_reference(case):
    check_kernel_for_gpus(case, "float32")


def test_the_kernel_for_gpus_in_half_precision():
    check_kernel_for_gpus("6 bits, scaled", "bfloat16")


def check_kernel_for_gpus(case, dtype):
    quantizer, shape, _ = KERNEL[case]
    leaf, x = packed(quantizer, shape, dtype), activations(70, shape[0], dtype=dtype)
    product = jax.jit(functools.partial(gpu_matmul, interpret=True))(x, leaf)
    assert_close(product.astype(dtype), x, leaf)


def exported(platform, implementation, leaf, dtype="float32", checks=()):
    function = of_streams(leaf, implementation=implementation)
    x = jax.ShapeDtypeStruct((8, leaf.spec.shape[0]), dtype)
    export = jax.export.export(function, platforms=(platform,), disabled_checks=checks)
    return export(x, leaf.streams).mlir_module()


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowered_for_tpus_it_is_the_kernel(dtype, implementation):
    """Lowering alone: whether Mosaic's compiler takes the kernel is not seen here."""
    leaf = packed(SignSplit(16, 8, channel_scale=True), (200, 320), dtype)
    assert "tpu_custom_call" in exported("tpu", implementation, leaf, dtype)


@pytest.mark.parametrize("case", KERNEL)
def test_every_kernel_is_lowered_for_tpus(case):
    quantizer, shape, _ = KERNEL[case]
    assert "tpu_custom_call" in exported("tpu", "pallas", packed(quantizer, shape))


def test_lowered_for_tpus_what_the_kernel_does_not_take_is_the_reference():
    leaf = packed(Uniform(bits=4), (200, 320))
    assert "custom_call" not in exported("tpu", "auto", leaf)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lowered_for_gpus_the_kernel_is_asked_for(dtype):
    leaf = packed(SignSplit(16, 8, channel_scale=True), (200, 320))
    target = "__gpu$xla.gpu.triton"
    checks = (jax.export.DisabledSafetyCheck.custom_call(target),)
    assert target in exported("cuda", "pallas", leaf, dtype, checks)
    assert "custom_call" not in exported("cuda", "auto", leaf, dtype)


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
def test_no_rows(implementation):
    assert matmul(activations(2, 0, 40), MATRIX, implementation=implementation).shape == (2, 0, 64)


def test_slices_of_a_stacked_leaf():
    leaf = packed(SignSplit(16, 8, channel_scale=True), (40, 64))
    stack = jax.tree.map(lambda stream: jnp.stack([stream, stream]), leaf)
    x = activations(2, 3, 40)
    expected = matmul(x, leaf)
    _, scanned = jax.lax.scan(lambda _, each: (None, matmul(*each)), None, (x, stack))
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(matmul)(x, stack), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((3, 64)), r"x of shape \(3, 64\) .*'block/kernel' of shape \(40, 64\).* 40 elem"),
        (jnp.float32(1), r"x of shape \(\) does not fit leaf 'block/kernel'"),
        (jnp.ones((3, 40), "int32"), r"x has dtype int32.*'block/kernel'.*x\.astype"),
    ],
)
def test_x_that_does_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        matmul(x, MATRIX)


def test_leaves_that_are_no_matrix():
    stack = jax.tree.map(lambda stream: stream[None, None], MATRIX)
    with pytest.raises(ValueError, match=r"'block/kernel' still has stacked axes \(1, 1\).*scan"):
        matmul(jnp.ones((3, 40)), stack)
    with pytest.raises(ValueError, match=r"'block/kernel' of shape \(2, 2, 8, 16\).*decode\(\)"):
        matmul(jnp.ones((3, 16)), packed(SignSplit(4, 8), (2, 2, 8, 16)))


@pytest.mark.parametrize(
    ("leaf", "dtype", "message"),
    [
        (packed(Uniform(), (8, 8)), "float32", "its method is 'uniform'"),
        (packed(Vector(4, 4, axis=0), (8, 8)), "float32", "run along axis 0"),
        (packed(Vector(4, 3, pad=True), (8, 8)), "float32", "dim=3 does not divide its 8 columns"),
        (packed(Vector(300, 2), (8, 200)), "float32", "codewords=300"),
        (packed(Vector(8, 64), (8, 64)), "float32", "every 512 columns"),
        (packed(SignSplit(16, 8), (40, 64), "float16"), "float32", "it has dtype float16"),
        (packed(SignSplit(16, 8), (8, 128)), "float16", "x has dtype float16"),
    ],
)
def test_what_the_kernel_does_not_take(leaf, dtype, message):
    x = activations(3, leaf.spec.shape[0], dtype=dtype)
    with pytest.raises(ValueError, match=rf"'block/kernel'.*{message}.*use 'xla', or 'auto'"):
        matmul(x, leaf, implementation="pallas")
    assert_close(matmul(x, leaf), x, leaf)


@pytest.mark.usefixtures("as_installed")
def test_arguments():
    x = jnp.ones((3, 40))
    with pytest.raises(ValueError, match="implementation='triton': choose one of"):
        matmul(x, MATRIX, implementation="triton")
    with pytest.raises(ValueError, match="interpret=True is for implementation='pallas'"):
        matmul(x, MATRIX, interpret=True)


def test_gradients_are_for_the_reference():
    x = activations(3, 40)

    def total(x, implementation):
        return matmul(x, MATRIX, implementation=implementation).sum()

    rows = np.broadcast_to(MATRIX.decode().sum(axis=1), x.shape)
    np.testing.assert_allclose(jax.grad(total)(x, "xla"), rows, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="gradients with implementation='xla' only"):
        jax.grad(total)(x, "auto")


def test_no_kernel_for_this_platform():
    with pytest.raises(ValueError, match="interpret mode"):
        matmul(activations(3, 40), MATRIX, implementation="pallas")
