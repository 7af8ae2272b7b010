"""How much worse a model gets when one leaf alone is compressed, before any fine-tuning."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from ssvq_jax import tree
from ssvq_jax.analysis.leaves import check_tree, decode_entry
from ssvq_jax.plan import Plan
from ssvq_jax.training.evaluation import Evaluation, make_evaluate
from ssvq_jax.training.step import Batch, Forward
from ssvq_jax.tree import PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Quality of a model of which some leaves are compressed; plain data, flat.

    Attributes:
        scope: what is compressed: nothing (``float``), every compressed leaf of the plan (``all``)
            or one of them (``leaf``).
        path: leaf path; empty unless the scope is ``leaf``.
        loss: mean cross-entropy, nats.
        accuracy: share of examples whose largest logit is the label's.
        loss_increase: the loss less the float model's.
        accuracy_drop: the float model's accuracy less this one's.
        examples: how many were evaluated.
    """

    scope: Literal["float", "all", "leaf"]
    path: str
    loss: float
    accuracy: float
    loss_increase: float
    accuracy_drop: float
    examples: int


def loss_sensitivities(
    forward: Forward,
    plan: Plan,
    params: PyTree,
    variables: Variables,
    batches: Callable[[], Iterable[Batch]],
    *,
    model_state: PyTree | None = None,
    done: Collection[Sensitivity] = (),
) -> Iterator[Sensitivity]:
    """Evaluates the float model, the compressed model, and every leaf compressed on its own.

    All evaluations run one compiled function. Leaves that share a codebook are judged one by one.

    Args:
        forward: the model.
        plan: made for ``params``.
        params: the float parameters.
        variables: what `Plan.init` returned for them.
        batches: called for every evaluation; gives one pass over the same examples, with masks.
        model_state: the model's other collections.
        done: what an interrupted run of the same arguments gave already; it is not computed again.

    Yields:
        What is not in ``done``: the scope ``float``, then ``all``, then every leaf.

    Raises:
        ValueError: on the first step, if a collection is missing, the tree is not the plan's, or
            ``done`` holds a leaf that the plan does not compress.
    """
    check_tree(plan, params, variables)
    params = jax.tree.map(jnp.asarray, params)  # host arrays move to the device once
    finished = {(row.scope, row.path): row for row in done}
    unknown = sorted({row.path for row in done if row.scope == "leaf"} - plan.compressed)
    if unknown:
        raise ValueError(
            f"the leaves {unknown} are done, but the plan does not compress them: begin anew, or "
            "give the plan of the run that is to go on"
        )
    evaluate = make_evaluate(forward)
    model_state = model_state or {}

    base = finished.get(("float", ""))
    if base is None:
        base = _row("float", "", evaluate(params, model_state, batches()))
        yield base
    if ("all", "") not in finished:
        yield _row("all", "", evaluate(plan.decode(variables), model_state, batches()), base)
    for entry in plan.entries:
        if all(("leaf", leaf.path) in finished for leaf in entry.leaves):
            continue
        for path, decoded in decode_entry(entry, variables).items():
            if ("leaf", path) not in finished:
                one = tree.fill(tree.punch(params, {path}), {path: decoded})
                yield _row("leaf", path, evaluate(one, model_state, batches()), base)


def _row(
    scope: Literal["float", "all", "leaf"],
    path: str,
    found: Evaluation,
    base: Sensitivity | None = None,
) -> Sensitivity:
    loss, accuracy = (base.loss, base.accuracy) if base else (found.loss, found.accuracy)
    return Sensitivity(
        scope=scope,
        path=path,
        loss=found.loss,
        accuracy=found.accuracy,
        loss_increase=found.loss - loss,
        accuracy_drop=accuracy - found.accuracy,
        examples=found.examples,
    )
