"""Surgery: operations on networks that others wrote, in place, verified, undoable."""

from skipway.surgery.checkpointing import Budget, Every, SquareRoot, checkpointed
from skipway.surgery.depth import deepen, influence, lesion, shorten
from skipway.surgery.gains import fold_gains
from skipway.surgery.memory import skip_compute
from skipway.surgery.norms import remove_norm
from skipway.surgery.operation import Operation, undo
from skipway.surgery.rescheme import rescheme
from skipway.surgery.reversing import reversible
from skipway.surgery.stored import rebuild

__all__ = [
    "Budget",
    "Every",
    "Operation",
    "SquareRoot",
    "checkpointed",
    "deepen",
    "fold_gains",
    "influence",
    "lesion",
    "rebuild",
    "remove_norm",
    "rescheme",
    "reversible",
    "shorten",
    "skip_compute",
    "undo",
]
