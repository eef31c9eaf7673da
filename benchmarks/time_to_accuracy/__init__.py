"""Time to an accuracy on CIFAR-10 from random weights: `skipway train --preset fast` beside a plain training script.

    mkdir -p build/cifar10 && tar -xJf ../shared/data/cifar10-jpeg.tar.xz -C build/cifar10
    python -m benchmarks.time_to_accuracy race build/cifar10 --out times.json
    python -m benchmarks.time_to_accuracy ablation build/cifar10 --out ablation.jsonl
    python -m benchmarks.time_to_accuracy table ablation.jsonl

`race` runs each goal by itself, with a number of epochs for each contestant (`race.PLANS`). They take turns epoch
by epoch, each stopped (SIGSTOP) while the other runs, so that both see the same machine; a clock runs only for the one
that runs, from the start of its interpreter on, with reading and decoding the images. Both see the accuracy on the test
images after each epoch, which nothing is chosen by: for `skipway train` they are the validation split, and a thousandth
of the training images, which it never trains on, is its test split.

The plain script is what one writes today: timm's datasets and transforms on PIL, a DataLoader with worker processes,
timm's optimizer, a one-cycle rate, smoothed labels, bfloat16, channels-last, the mirrored test image, a plain loop. Its
network, rate, batch and epochs are its own, but were tried in one setting only, ours in five: a ratio says so until
both are tuned alike (benchmarks/time-to-accuracy.md).

`ablation` trains with the preset and without each of its parts, at equal processor time, and appends a line of JSON for
each; what the file has is not repeated.
"""
