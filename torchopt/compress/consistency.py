"""What `finalize` looks at before it bakes: whether counter, masks and codes are those of a step, and come to their end.

They say which, not how much, so nothing may average them; whoever does (an average of models with its buffers) gets a model that runs,
and keeps neither zeros nor values. So they are looked at: the counter and the codes by their seals, masks by how many ones they have,
activation ranges, when they are baked, by whether scale and ends belong together.
"""

from __future__ import annotations

import warnings

from torch import nn

from torchopt import cluster as clustering
from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.errors import StateError
from torchopt.state.counter import State
from torchopt.state.optimizer_moved import has_finite_gradients

REMEDY = (
    "an average of models with their buffers (AveragedModel(use_buffers=True), Lightning's EMAWeightAveraging) does that: give it "
    "multi_avg_fn=torchopt.ema_multi_avg_fn(decay), which copies masks, codes and counter"
)

MOST_EVALUATIONS = 3  # of tables between two steps: those of an optimizer that looks ahead once, and of an average


def check_intact(prepared: nn.Module, state: State) -> None:
    """Refuse a model whose counter, masks or codes are not those of a step.

    Raises:
        StateError: something else has written over them.
    """
    step = int(state.step)
    counter = None if state.intact else f"the step counter stands at {step}, where torchopt.step has not left it"
    found = counter or pruning.damaged(prepared, step) or clustering.damaged(prepared)
    if found:
        raise StateError(f"finalize: {found}; {REMEDY}")
    stale = clustering.stale(prepared)
    if stale:
        warnings.warn(
            f"finalize: {stale}; call torchopt.step after the last optimizer step, and let an average of models copy what is no "
            "floating-point tensor, as torchopt.ema_multi_avg_fn does",
            stacklevel=3,
        )


def check_finished(prepared: nn.Module, step: int) -> None:
    """Refuse masks that are less sparse than asked, soft tables, and layers that do not round yet: training stopped early, or nobody
    called `step`.

    Raises:
        StateError: a schedule has not come to its end.
    """
    waiting = pruning.unfinished(prepared, step)
    if waiting and step == 0:
        raise StateError(
            "finalize: step was never called, so no mask was ever computed; call torchopt.step(model) after each "
            "optimizer.step(), or compress without training by torchopt.one_shot(model, rules)"
        )
    soft = clustering.soft_until(prepared)
    if soft:
        raise StateError(
            f"finalize: after step {step}, shared values are soft until step {soft}, and the final model's are hard; train on, set "
            "Cluster.soft_until lower, or bake them as they are with finalize(model, unfinished=True)"
        )
    floats = quantization.unrounded(prepared, step)
    if floats:
        raise StateError(
            f"finalize: after step {step}, {floats}, and the final model's values are; train on, set the milestones lower, or round "
            "without training for it by finalize(model, unfinished=True)"
        )
    if waiting:
        more = f" ({len(waiting) - 1} more weights wait too)" if len(waiting) > 1 else ""
        raise StateError(
            f"finalize: after step {step}, {waiting[0]}{more}; train on until step {max(w.done_step for w in waiting)}, "
            "end the schedule earlier, or take the masks as they are with finalize(model, unfinished=True)"
        )


def warn_of_the_loop(prepared: nn.Module, state: State) -> None:
    """Before a step is counted, say once what about the loop around it cannot be right."""
    still = bool(state.step) and state.moved.still(prepared.parameters()) and has_finite_gradients(prepared.parameters())
    if still and state.moved.once("still"):
        warnings.warn(
            "step: no weight has changed since the last call, though there are gradients; call torchopt.step only after the optimizer has "
            "stepped (under accelerate: if accelerator.sync_gradients), and make the optimizer of what prepare returned: "
            "torch.optim.SGD(model.parameters(), …)",
            stacklevel=4,
        )
    searched = clustering.evaluations(prepared)
    if searched > MOST_EVALUATIONS and state.moved.once("searched"):
        warnings.warn(
            f"step: shared values were evaluated at {searched} places since the last call; a line search (LBFGS) compares losses with "
            "gradients that pass straight through to the weights, and fails: train tables with SGD or Adam, and call torchopt.step "
            "after each of their steps",
            stacklevel=4,
        )
