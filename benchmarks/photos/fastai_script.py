"""fastai's recipe: `vision_learner(…).fine_tune(n)`, an epoch of the head and n of everything."""

from __future__ import annotations

from benchmarks.peers import import_timm
from benchmarks.photos.trunk import NETWORK, SIZE, parser, report


def start() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--batch-size", type=int, default=32)
    given = options.parse_args()
    import_timm()
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Resize,
        accuracy,
        aug_transforms,
        get_image_files,
        set_seed,
        vision_learner,
    )

    class Report(Callback):
        order = 60  # after the recorder

        def after_epoch(self) -> None:
            report(validation=float(self.learn.recorder.values[-1][-1]))

    set_seed(given.seed)
    loaders = ImageDataLoaders.from_folder(
        given.data / "train",
        valid_pct=0.1,
        seed=given.seed,
        item_tfms=Resize(SIZE),
        batch_tfms=aug_transforms(),
        bs=given.batch_size,
        num_workers=given.workers,
    )
    learner = vision_learner(
        loaders, NETWORK, metrics=accuracy, pretrained_cfg_overlay={"file": str(given.weights)}, cbs=Report()
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(given.epochs, base_lr=given.lr)
        unseen = learner.dls.test_dl(get_image_files(given.data / "test"), with_labels=True)
        report(test=learner.validate(dl=unseen)[1])


if __name__ == "__main__":
    start()
