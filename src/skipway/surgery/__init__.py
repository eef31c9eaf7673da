"""Surgery: operations on networks that others wrote, in place, verified, undoable."""

from skipway.surgery.activation_checkpoint import Budget, Every, SquareRoot, checkpointed
from skipway.surgery.classifier import replace_classifier
from skipway.surgery.depth import deepen, influence, lesion, shorten
from skipway.surgery.fold_gains import fold_gains
from skipway.surgery.operation import Operation, undo
from skipway.surgery.remove_norm import remove_norm
from skipway.surgery.rescheme import rescheme
from skipway.surgery.reversible import reversible
from skipway.surgery.stochastic_depth import skip_compute
from skipway.surgery.storage import rebuild

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
    "replace_classifier",
    "rescheme",
    "reversible",
    "shorten",
    "skip_compute",
    "undo",
]
