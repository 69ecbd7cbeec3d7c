"""Cost of a configuration, counted on the ``meta`` device: no weights, no download, no accelerator."""

from visexpert.planning.amount import configured_gpus
from visexpert.planning.machine import GPUS, USUAL_MFU, Gpu, gpu_named
from visexpert.planning.make import make_plan
from visexpert.planning.plan import Asked, Plan
from visexpert.planning.read import Planned, read_configs

__all__ = [
    "GPUS",
    "USUAL_MFU",
    "Asked",
    "Gpu",
    "Plan",
    "Planned",
    "configured_gpus",
    "gpu_named",
    "make_plan",
    "read_configs",
]
