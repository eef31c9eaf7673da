"""`replace_classifier`: the classifier is found by what the network computes, in networks of every library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.surgery import replace_classifier
from skipway.surgery.classifier import find_classifiers
from skipway.zoo import ModelRequest, load_model

KNOWN = {
    "resnet20": ["head.classifier"],
    "timm:resnet18": ["fc"],
    "timm:tf_efficientnet_lite0": ["classifier"],
    "timm:levit_128s": ["head.linear", "head_dist.linear"],  # two, averaged
    "timm:deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "torchvision:squeezenet1_0": ["classifier.1"],  # a convolution, an activation, a pool
    "torchvision:mobilenet_v2": ["classifier.1"],
}


def load(name):
    try:
        return load_model(name, ModelRequest())
    except SkipwayError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", KNOWN)
def test_the_classifier_of_every_library_is_found_and_replaced(name):
    torch.manual_seed(0)
    loaded = load(name)
    model, images = loaded.model.eval(), torch.randn(2, *loaded.shape)
    before, state = model(images), model.state_dict()
    assert find_classifiers(model, images) == KNOWN[name]
    operation = replace_classifier(model, images, 7)
    assert list(operation.touched) == KNOWN[name]
    assert model(images).shape == (2, 7)
    operation.undo()
    assert torch.equal(model(images), before)
    assert all(tensor is state[key] or torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_first_loss_is_that_of_equal_probabilities():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.LayerNorm(64), nn.Linear(64, 1000))
    replace_classifier(model, torch.zeros(1, 3, 2, 2), 10)
    logits = model(torch.randn(64, 3, 2, 2))
    loss = nn.functional.cross_entropy(logits, torch.arange(64) % 10)
    assert abs(loss.item() - 2.302585) < 0.05  # ln 10


def test_hugging_face_configs_follow():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    operation = replace_classifier(model, example, 5)
    assert model(**example).logits.shape == (2, 5)
    assert (model.config.num_labels, len(model.config.id2label), model.num_labels) == (5, 5, 5)
    operation.undo()
    assert model.config is config
    assert config.num_labels == 2


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    "trunk",
    [Stream(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Sequential(Stream(), nn.Unflatten(1, (2, 4)))],
    ids=["stream", "norm", "three axes"],
)
def test_a_trunk_has_none(trunk):
    assert find_classifiers(trunk, torch.randn(3, 8)) == []
    with pytest.raises(SkipwayError, match="has no classifier: the rule is an output"):
        replace_classifier(trunk, torch.randn(3, 8), 5)


@pytest.mark.parametrize("classes", [0, -1, True, 2.0, "3"])
def test_numbers_of_classes_are_checked(classes):
    with pytest.raises(SkipwayError, match="classes=.*the rule is a whole number"):
        replace_classifier(nn.Linear(2, 2), torch.zeros(1, 2), classes)


def test_a_classifier_that_something_else_depends_on_is_refused_and_put_back():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.temperature = nn.Linear(4, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.map(x) * self.temperature

    model = Scaled()
    with pytest.raises(Exception, match=r"6|size"):
        replace_classifier(model, torch.randn(2, 4), 3)
    assert model(torch.randn(2, 4)).shape == (2, 6)


class Named(nn.Module):
    """A classifier under two names, and attributes that are as large as the number of classes."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 8), nn.Linear(8, classes)
        self.fc = self.head
        self.num_classes = self._n_labels = self.num_class_tokens = self.class_token_index = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.trunk(x).relu())


def test_counts_of_classes_alone_follow_and_are_named():
    model = Named()
    operation = replace_classifier(model, torch.randn(2, 4), 5)
    assert (model.num_classes, model._n_labels, model.num_class_tokens, model.class_token_index) == (5, 5, 1, 1)
    assert operation.touched == {"head": "1 classes replaced by 5, and in num_classes, _n_labels"}
    operation.undo()
    assert (model.num_classes, model._n_labels) == (1, 1)


class Decoder(nn.Module):
    def __init__(self, head: nn.Module, classes: int) -> None:
        super().__init__()
        self.head, self.num_classes = head, classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).view(len(x), self.num_classes)


def test_counts_follow_around_every_name_of_the_classifier():
    head = nn.Linear(8, 3)
    model = nn.ModuleDict({"head": head, "decoders": nn.ModuleList([Decoder(head, 3)])})
    model.forward = lambda x: model["decoders"][0](x)
    operation = replace_classifier(model, torch.randn(2, 8), 5)
    assert model["decoders"][0].num_classes == 5
    assert operation.touched == {"head": "3 classes replaced by 5, and in decoders.0.num_classes"}
    operation.undo()
    assert model["decoders"][0].num_classes == 3


def test_a_classifier_is_replaced_under_all_its_names():
    model, x = Named(3), torch.randn(2, 4)
    before, names = model.head, list(model._modules)
    operation = replace_classifier(model, x, 5)
    assert model.head is model.fc
    assert model(x).shape == (2, 5)
    operation.undo()
    assert model.head is model.fc is before
    assert list(model._modules) == names


class Cosine(nn.Linear):
    """Cosine classifier, with a scale of some shape."""

    def __init__(self, scale):
        super().__init__(8, 5, bias=False)
        self.scale = nn.Parameter(torch.full(scale, 16.0))

    def forward(self, x):
        return self.scale * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


@pytest.mark.parametrize("scale", [(), (1,)])
def test_what_does_not_count_classes_stays(scale):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Cosine(scale)), torch.randn(6, 4)
    before = model(x)
    operation = replace_classifier(model, x, 3)
    assert torch.equal(model[2].scale, torch.full(scale, 16.0))
    features, weight = nn.functional.normalize(model[:2](x)), nn.functional.normalize(model[2].weight)
    torch.testing.assert_close(model(x), 16 * features @ weight.T)
    model(x).square().sum().backward()
    assert model[2].weight.grad.any()
    operation.undo()
    assert torch.equal(model(x), before)


def test_what_counts_classes_beside_weight_and_bias_is_refused_by_name():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Cosine((5,))), torch.randn(6, 4)
    before = model(x)
    with pytest.raises(SkipwayError, match=r"'scale' of the classifier '2', of shape \(5,\)"):
        replace_classifier(model, x, 3)
    assert torch.equal(model(x), before)
