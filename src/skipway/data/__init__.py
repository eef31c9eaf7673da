"""Images to train on: a folder of class folders, or the embedded handwritten digits.

data = skipway.data.load(Path("photos"))
for inputs, labels in data.train_batches(seed=0, epoch=0, batch_size=128, device=torch.device("cpu")):
    ...
"""

from __future__ import annotations

from skipway.data.augmentation import Augmentation
from skipway.data.decoding import UnreadableImage, decode
from skipway.data.embedded import digits
from skipway.data.listing import Listing, list_folder
from skipway.data.loading import Data, load

__all__ = ["Augmentation", "Data", "Listing", "UnreadableImage", "decode", "digits", "list_folder", "load"]
