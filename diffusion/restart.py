"""Starting a scheduler in the middle of its schedule: for a video that already exists, and after an interruption."""

from __future__ import annotations

import copy
from typing import Any

import torch

# What multistep schedulers carry from step to step.
_CARRIED = ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order")


def shifted(scheduler: Any, shift: float | None) -> Any:
    """A copy of a scheduler, with another flow shift unless that is None.

    Raises:
        ValueError: the scheduler has no flow shift.
    """
    names = [name for name in ("shift", "flow_shift") if name in scheduler.config]
    if shift is not None and not names:
        raise ValueError(f"{type(scheduler).__name__} has no flow shift; leave shift out")
    change = {} if shift is None else {names[0]: shift}
    return type(scheduler).from_config(scheduler.config, **change)


def skip_steps(scheduler: Any, skip: int, done: int = 0, carried: dict[str, Any] | None = None) -> Any:
    """A copy of a scheduler that leaves out the first `skip` steps of any schedule it is given.

    Of the others it does not offer the first `done`, which were taken before and left the state `carried`.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> late = skip_steps(FlowMatchEulerDiscreteScheduler(), 2)
    >>> late.set_timesteps(4)
    >>> late.timesteps
    tensor([334.,   1.])
    """
    short = copy.copy(scheduler)
    set_timesteps, step = short.set_timesteps, short.step
    whole: list[torch.Tensor] = []

    def set_shortened(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        short.timesteps, short.sigmas = short.timesteps[skip:], short.sigmas[skip:]
        short.num_inference_steps = len(short.timesteps)
        if done:
            whole[:] = [short.timesteps, short.sigmas]
            short.timesteps, short.sigmas = short.timesteps[done:], short.sigmas[done:]

    def first_step(*args: Any, **kwargs: Any) -> Any:
        if whole:  # from here on as if the steps before had been taken
            short.timesteps, short.sigmas = whole
            whole.clear()
            short._step_index = done
            vars(short).update(carried or {})
        return step(*args, **kwargs)

    short.set_timesteps, short.step = set_shortened, first_step
    return short


def carried(scheduler: Any) -> dict[str, Any]:
    """What a scheduler needs to go on after the step it has just taken: tensors, lists of them, and numbers."""
    return {name: getattr(scheduler, name) for name in _CARRIED if hasattr(scheduler, name)}
