"""Features of the frozen network, and logistic regression of scikit-learn with a penalty chosen on a tenth."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.peers import import_timm
from benchmarks.photos.trunk import SIZE, create_network, parser, report

STRENGTHS = np.logspace(-4, 0, 9)


def compute(given, network, transform, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a part."""
    from torchvision.datasets import ImageFolder

    loader = DataLoader(ImageFolder(str(given.data / part), transform), 64, num_workers=given.workers)
    features, labels = [], []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
        for images, own in loader:
            features.append(network(images.to(memory_format=torch.channels_last)).float())
            labels.append(own)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def start() -> None:
    options = parser(__doc__)
    options.add_argument("--bfloat16", action="store_true")
    given = options.parse_args()
    timm = import_timm()
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = create_network(given.weights, num_classes=0).eval().to(memory_format=torch.channels_last)
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}, model=network)
    transform = timm.data.create_transform(**config)
    features, labels = compute(given, network, transform, "train")
    train, validation, train_labels, validation_labels = train_test_split(
        features, labels, test_size=0.1, stratify=labels, random_state=given.seed
    )

    def fit(strength: float, rows: np.ndarray, own: np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(rows, own)

    scores = {
        strength: fit(strength, train, train_labels).score(validation, validation_labels) for strength in STRENGTHS
    }
    best = max(scores, key=scores.__getitem__)
    report(validation=scores[best])
    model = fit(best, features, labels)
    report(test=model.score(*compute(given, network, transform, "test")))


if __name__ == "__main__":
    start()
