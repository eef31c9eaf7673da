"""Speed: kernels put into anybody's network, inference by the quickest backend, and the benchmark of it all."""

from skipway.speed.accelerate import accelerate
from skipway.speed.allocation import keep_memory
from skipway.speed.backends import BACKENDS, Backend
from skipway.speed.optimize import Attempt, Optimized, optimize

__all__ = ["BACKENDS", "Attempt", "Backend", "Optimized", "accelerate", "keep_memory", "optimize"]
