"""Workloads read from shapes, and what they hold in a form to compare."""

import functools

import jax

from ssvq_jax.hardware.reader import read_workload
from ssvq_jax.models import create, param_shapes


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes(workload):
    """M, K, N and count of the products, by name."""
    return {x.name: (x.m, x.k, x.n, x.count * x.rounds) for x in workload.products}


def feeding(workload):
    return {x.name: x.leaves for x in workload.products}


def read_linen(model, *inputs, **kwargs):
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params, state = variables.pop("params"), variables
    apply = lambda params, state, *inputs: model.apply({"params": params, **state}, *inputs)  # noqa: E731
    return read_workload(apply, params, state, *inputs, **kwargs)


@functools.cache
def deit_tiny_shapes(scan=False):
    return param_shapes(create("deit_tiny", scan=scan))


@functools.cache
def deit_tiny(scan=False, batch=1):
    model = create("deit_tiny", scan=scan)
    apply = lambda params, images: model.apply({"params": params}, images)  # noqa: E731
    return read_workload(apply, deit_tiny_shapes(scan), array(batch, 224, 224, 3))


def matmul(params, x):
    return x @ params["w"]


WEIGHT = {"w": array(6, 4)}
