"""Images to train on: class folders, lists, tar shards, Hugging Face data sets, or the embedded handwritten digits.

data = skipway.data.load(Path("photos"), policy="trivial", mixup=0.2)
for inputs, targets, labels, numbers in data.train_batches(seed=0, epoch=0, batch_size=128, device=torch.device("cpu")):
    ...
"""

from __future__ import annotations

from skipway.data.augment import Augmentation
from skipway.data.batches import Batch
from skipway.data.dataset import Data
from skipway.data.decode import UnreadableImage, decode
from skipway.data.digits import digits
from skipway.data.loader import load
from skipway.data.options import DataChoices
from skipway.data.split import Splits, list_splits

__all__ = [
    "Augmentation",
    "Batch",
    "Data",
    "DataChoices",
    "Splits",
    "UnreadableImage",
    "decode",
    "digits",
    "list_splits",
    "load",
]
