"""Augmentation of training images: crops, flips, policies, erasing and mixing, on whole batches and on the device.

Random numbers are drawn in advance, per image, as a function of (seed, epoch, image): see `skipway.data.randomness`. So
the augmentation of an image depends neither on the batch size, nor on its position, nor on the number of workers or
ranks.
"""

from __future__ import annotations

from skipway.data.augment.crops import DRAWS, crop_and_flip, random_box
from skipway.data.augment.erase import erase_rectangles
from skipway.data.augment.mix import mix_images
from skipway.data.augment.policy import apply_policy
from skipway.data.augment.settings import Augmentation

__all__ = ["DRAWS", "Augmentation", "apply_policy", "crop_and_flip", "erase_rectangles", "mix_images", "random_box"]
