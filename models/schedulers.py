"""The scheduler of a diffusers pipeline, as one of ours: another one makes other pictures."""

import math
from pathlib import Path

from models import weights
from models.script import UserError

# (transformer, scheduler) of a diffusers pipeline -> our schedule and solver.
SCHEDULES = {
    ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"): ("flux", "euler"),
    ("SanaTransformer2DModel", "FlowMatchEulerDiscreteScheduler"): ("sana-euler", "euler"),
    ("SanaTransformer2DModel", "DPMSolverMultistepScheduler"): ("sana-dpm", "dpm"),
}
# Another value of one of these makes another scheduler; settings that are not here do not matter.
STANDARD = dict(
    algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", thresholding=False,
    prediction_type="flow_prediction", final_sigmas_type="zero", euler_at_final=False,
    use_flow_sigmas=True, use_lu_lambdas=False, use_karras_sigmas=False, use_beta_sigmas=False,
    use_exponential_sigmas=False, stochastic_sampling=False, invert_sigmas=False,
    shift_terminal=None, num_train_timesteps=1000, time_shift_type="exponential",
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip


def read(folder: Path, network: str, source: str) -> tuple[str, str, float | None]:
    """(schedule, solver, shift; None: by the number of tokens), for a transformer of this class.

    UserError: it is none of ours.
    """
    config = weights.read_json(folder / "scheduler" / "scheduler_config.json")
    classes = (network, config.get("_class_name"))
    odd = [f"{k}={v}" for k, v in config.items() if STANDARD.get(k, v) != v]
    if odd or classes not in SCHEDULES:
        found = f"{network} with {classes[1]} ({', '.join(odd)})"
        raise UserError(f"{source}: {found} is not known here")
    if config.get("use_dynamic_shifting"):
        return *SCHEDULES[classes], None
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if not (isinstance(shift, int | float) and 0 < shift < math.inf):
        raise UserError(f"{source}: shift is {shift!r} in its scheduler, wanted a number above 0")
    return *SCHEDULES[classes], float(shift)
