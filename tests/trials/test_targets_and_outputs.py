"""Kind: axis 0 of the first tensor is taken for the samples, and the first tensor put out for the output.

| trial | input | right value |
|---|---|---|
| D4 | tokens with targets (N, L), output (N, L, V) | cross-entropy over the last axis |
| D4 | masks (N, H, W) or (N, 1, H, W), output (N, C, H, W) | cross-entropy over axis 1 |
| D4 | tokens, L = V | the last axis, and that another one fits |
| D4 | positions of real inputs, L = C | axis 1 as torch has it, and that another one fits |
| D4 | a model that puts out (output, loss), {"loss": …}, a dataclass with `loss`, the loss alone, named losses | its own loss |
| D4 | two numbers put out | refused: which one is the loss |
| — | named losses with a total among them | the total alone; refused where it is not their sum |
| D4 | tokens alone | cross-entropy of each next token, and said |
| D4 | targets all −100, in `targets=` or among the labels of the model | named |
| D4 | some targets −100 | left out |
| D4 | multi-hot, one logit for each sample, real values with an axis of length 1 | binary cross-entropy; mean square without broadcasting |
| D4 | labels beyond the classes, targets of a shape that fits nothing | refused with both shapes |
| D8 | a list, tuple, dict of heads; feature maps | the sum over all of them, and said |
| D8 | targets by name or position for several heads | each its own |
| D8 | heads of other shapes that the targets fit alike | refused: give a loss |
| D8 | output (logits, state), `hidden_states` deeper in the output | left out, and said |
| D14 | sequence-first inputs (T, N, C), targets (N,) | N samples on axis 1, as in the same network batch-first |
| D14 | the same with T = N, and without targets | axis 1, found by what the outputs depend on |
| D14 | 12 inputs beside 32 targets | refused |
| D14 | sequence-first tokens (T, N) with targets (T, N) | N samples on axis 1 |
"""  # noqa: E501 (rows of a table)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from skipway.probes.objective import choose_objective, compute_loss
from skipway.tracing.samples import find_sample_axes

N, L, V = 16, 6, 11
IDS = torch.randint(V, (N, L), generator=torch.Generator().manual_seed(0))


class LanguageModel(nn.Module):
    """Puts out its logits, or with targets whatever `put_out` makes of logits and loss."""

    def __init__(self, put_out: Callable[[Tensor, Tensor], Any] = lambda logits, loss: (logits, loss)) -> None:
        super().__init__()
        self.table, self.map, self.head = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V)
        self.put_out = put_out

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.table(ids)
        logits = self.head(x + self.map(x))
        if labels is None:
            return logits
        return self.put_out(logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def probed_loss(diagnosis: sw.Diagnosis) -> float:
    return diagnosis.measurement.loss


def expected(model: LanguageModel, targets: Tensor) -> float:
    """The loss on the probed half of the batch."""
    return F.cross_entropy(model(IDS[: N // 2]).flatten(0, 1), targets[: N // 2].flatten()).item()


def test_tokens_and_their_targets_are_compared_over_the_last_axis():
    model = LanguageModel()
    diagnosis = sw.diagnose(model, IDS, targets=IDS)
    assert probed_loss(diagnosis) == pytest.approx(expected(model, IDS), rel=1e-5)
    assert diagnosis.remarks[0] == f"loss: cross-entropy over axis 2 of the output (8, {L}, {V})"
    assert diagnosis.remarks[0] in diagnosis.table()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS, IDS), batch_size=N)
    assert probed_loss(sw.diagnose(model, loader)) == probed_loss(diagnosis)


@pytest.mark.parametrize("mask", [(4, 5, 6), (4, 1, 5, 6)])
def test_masks_are_compared_over_axis_1(mask):
    output, targets = torch.randn(4, 3, 5, 6), torch.randint(3, mask)
    objective = choose_objective(output, targets)
    assert objective(output, targets) == F.cross_entropy(output, targets.reshape(4, 5, 6))
    assert "over axis 1" in objective.description


def test_where_two_axes_fit_the_choice_is_said():
    ids, output = torch.randint(L, (4, L)), torch.randn(4, L, L)
    tokens = choose_objective(output, ids, inputs=ids)
    assert tokens(output, ids, ids) == F.cross_entropy(output.flatten(0, 1), ids.flatten())
    assert "axis 2 of" in tokens.description
    assert "axis 1 fits as well" in tokens.description
    positions = choose_objective(output, ids, inputs=torch.randn(4, 3, L))
    assert positions(output, ids) == F.cross_entropy(output, ids)
    assert "axis 1 of" in positions.description
    assert "axis 2 fits as well" in positions.description


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


OWN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, loss: (logits, loss),
    "loss first": lambda logits, loss: (loss, logits),
    "mapping": lambda logits, loss: {"logits": logits, "loss": loss},
    "dataclass": lambda logits, loss: Output(loss, logits),
    "alone": lambda logits, loss: loss,
    "named losses": lambda logits, loss: {"loss_a": loss / 4, "loss_b": loss * 3 / 4},
}


@pytest.mark.parametrize("form", OWN)
def test_a_loss_that_the_model_puts_out_is_its_loss(form):
    model = LanguageModel(OWN[form])
    loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).item()
    objective = choose_objective(output := model(IDS, IDS))
    assert objective(output).item() == pytest.approx(loss, rel=1e-5)
    assert "the model's own" in objective.description


def test_a_loss_that_the_model_puts_out_is_diagnosed():
    model = LanguageModel()
    for batch in ((IDS, IDS), {"ids": IDS, "labels": IDS}):
        assert probed_loss(sw.diagnose(model, batch)) == pytest.approx(expected(model, IDS), rel=1e-5)


@pytest.mark.parametrize(
    ("put_out", "right"),
    [
        (lambda a, b: {"recon_loss": a, "kl_loss": b, "total_loss": a + 0.1 * b}, lambda a, b: a + 0.1 * b),
        (lambda a, b: {"all_loss": a + b, "recon_loss": a, "kl_loss": b}, lambda a, b: a + b),
        (lambda a, b: {"total_loss": a + b, "recon_loss": a * 1, "kl_loss": b * 1}, lambda a, b: a + b),
        (lambda a, b: {"recon_loss": a, "kl_loss": b}, lambda a, b: a + b),
        (lambda a, b: {"a_loss": a * 1, "b_loss": a * 1}, lambda a, b: 2 * a),
        (lambda a, b: {"total_variation_loss": a, "kl_loss": b}, lambda a, b: a + b),
        (lambda a, b: {"loss_i2t": a * 1, "loss_t2i": a * 1, "loss_kl": 0 * b}, lambda a, b: 2 * a),
        (lambda a, b: {"a_loss": a, "b_loss": a}, lambda a, b: 2 * a),
        (lambda a, b: {"total_loss": a + 0 * b, "recon_loss": a, "kl_loss": b}, lambda a, b: a),
        (lambda a, b: {"d_loss": a + 2 * b, "real_loss": a, "fake_loss": b, "g_loss": a * 1}, lambda a, b: 2 * (a + b)),
        (lambda a, b: {"a_loss": a, "b_loss": b, "all_loss": a / a.detach() + b}, lambda a, b: a / a.detach() + b),
    ],
    ids=[
        "weighted",
        "sum",
        "computed twice",
        "no total",
        "equal",
        "total of something",
        "equal by chance",
        "one tensor",
        "not yet weighted",
        "total of some",
        "weighted by itself",
    ],
)
def test_a_total_among_the_losses_of_a_model_is_taken_alone(put_out, right):
    weight = torch.tensor(3.0, requires_grad=True)
    output = put_out(weight.square(), weight.exp())
    objective = choose_objective(output)
    value = right(weight.square(), weight.exp())
    assert objective(output).item() == pytest.approx(value.item())
    (slope,), (expected_slope,) = (torch.autograd.grad(each, weight) for each in (objective(output), value))
    assert slope.item() == pytest.approx(expected_slope.item())


def test_a_total_that_is_not_the_sum_is_refused():
    weight = torch.tensor(3.0, requires_grad=True)
    losses = {"total_loss": weight.square() + 0.1 * weight, "recon_loss": weight.square(), "kl_loss": weight * 1}
    with pytest.raises(sw.SkipwayError, match="total_loss is not the sum of the others; give loss="):
        choose_objective(losses)


@pytest.mark.parametrize(
    ("name", "derived"),
    [
        ("perplexity_loss", lambda a, b: a.exp()),
        ("gap_loss", lambda a, b: a - b),
        ("product_loss", lambda a, b: a * b),
        ("elbo_loss", lambda a, b: a + 0 * b),
    ],
)
def test_what_is_computed_from_a_loss_and_is_no_total_is_refused(name, derived):
    a, b = (torch.tensor(value, requires_grad=True).square() for value in (1.0, 2.0))
    with pytest.raises(
        sw.SkipwayError, match=f"{name} is computed from a_loss.* otherwise than as a sum with weights above 0"
    ):
        choose_objective({"a_loss": a, "b_loss": b, name: derived(a, b)})


def test_two_numbers_put_out_are_refused():
    model = LanguageModel(lambda logits, loss: (logits, loss, loss * 0.1))
    with pytest.raises(sw.SkipwayError, match=r"puts out 2 numbers \(1, 2\); say which is the loss: give loss="):
        sw.diagnose(model, (IDS, IDS))
    assert sw.diagnose(model, (IDS, IDS), loss=lambda output, _: output[1] + output[2]).measurement.finite


def test_tokens_alone_predict_the_next_token():
    model = LanguageModel()
    diagnosis = sw.diagnose(model, IDS)
    half = IDS[: N // 2]
    right = F.cross_entropy(model(half)[:, :-1].flatten(0, 1), half[:, 1:].flatten())
    assert probed_loss(diagnosis) == pytest.approx(right.item(), rel=1e-5)
    assert "cross-entropy of each next token" in diagnosis.remarks[0]


def test_a_mask_beside_the_tokens_is_not_predicted():
    output = torch.randn(N, L, V)
    inputs = {"attention_mask": torch.ones_like(IDS), "input_ids": IDS}
    value = choose_objective(output, inputs=inputs, vocabularies=(V,))(output, None, inputs)
    assert value == F.cross_entropy(output[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_targets_that_are_all_left_out_are_named():
    ignored = torch.full_like(IDS, -100)
    for batch, targets in ((IDS, ignored), ({"ids": IDS, "labels": ignored}, None)):
        with pytest.raises(sw.SkipwayError, match="every label is -100"):
            sw.diagnose(LanguageModel(), batch, targets=targets)
    some = torch.where(torch.arange(L) < 2, ignored, IDS)
    model = LanguageModel()
    assert probed_loss(sw.diagnose(model, IDS, targets=some)) == pytest.approx(expected(model, some), rel=1e-5)


def test_zeros_and_ones_and_axes_of_length_one():
    output, hot = torch.randn(8, 3), torch.randint(2, (8, 3))
    hot[0] = torch.tensor([1, 1, 0])
    for targets in (hot, hot.float(), hot.bool()):
        assert compute_loss(output, targets) == F.binary_cross_entropy_with_logits(output, hot.float())
    one, values = torch.randn(8, 1), torch.randn(8)
    assert compute_loss(one, values) == F.mse_loss(one[:, 0], values)
    labels = torch.tensor([0, 1] * 4)
    assert compute_loss(one, labels) == F.binary_cross_entropy_with_logits(one[:, 0], labels.float())
    assert compute_loss(output, labels[:, None]) == F.cross_entropy(output, labels)


@pytest.mark.parametrize(
    ("output", "targets", "words"),
    [
        ((8, 3), torch.full((8,), 3), "the largest label is 3, and the output has 3 classes"),
        ((8, 3), torch.full((8,), -1), "the smallest label is -1"),
        ((8, 1), torch.full((8,), 4), "the largest label is 4, and the output has 1 classes"),
        ((8, 1), torch.zeros(8, dtype=torch.long), "every label is 0, and the output has one class on axis 1"),
        ((8, 1), torch.full((8,), -100), "every label is -100"),
        ((8, 3, 4, 4), torch.zeros(8, 8, 8, dtype=torch.long), r"int64 \(8, 8, 8\) beside the output \(8, 3, 4, 4\)"),
        ((8, 3), torch.zeros(8), r"float32 \(8,\) beside the output \(8, 3\)"),
        ((8, 3), [0, 1, 2], "targets=list: the rule is a tensor, or one for each"),
    ],
)
def test_targets_that_fit_nothing_are_refused(output, targets, words):
    with pytest.raises(sw.SkipwayError, match=words):
        compute_loss(torch.randn(output), targets)


class Heads(nn.Module):
    """Two heads of a residual network, put out as `put_out` has it."""

    def __init__(self, put_out: Callable[[Tensor, Tensor], Any], sizes: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.early, self.final = nn.Linear(8, sizes[0]), nn.Linear(8, sizes[1])
        self.put_out = put_out

    def forward(self, x: Tensor) -> Any:
        x = x + self.first(x).relu()
        y = x + self.second(x).relu()
        return self.put_out(self.early(x), self.final(y))


HEADS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda early, final: [early, final],
    "tuple": lambda early, final: (early, final),
    "mapping": lambda early, final: {"out": final, "aux": early},
}


@pytest.mark.parametrize("form", HEADS)
def test_the_loss_is_the_sum_over_all_heads(form):
    model, x, labels = Heads(HEADS[form]), torch.randn(32, 8), torch.randint(4, (32,))
    diagnosis = sw.diagnose(model, x, targets=labels)
    with torch.no_grad():
        output = model(x[:16])
    right = sum(F.cross_entropy(head, labels[:16]) for head in (output.values() if form == "mapping" else output))
    assert probed_loss(diagnosis) == pytest.approx(right.item(), rel=1e-5)
    assert "sum over 2 outputs" in diagnosis.remarks[0]
    assert all(signal.gradient_after > 0 for signal in diagnosis.measurement.connections)


def test_every_connection_before_a_feature_map_gets_a_gradient():
    model = Heads(lambda early, final: [early[..., None], final[..., None]])
    diagnosis = sw.diagnose(model, torch.randn(32, 8))
    assert all(signal.gradient_after > 0 for signal in diagnosis.measurement.connections)
    assert diagnosis.remarks[0].endswith("mean square to noise, the sum over 2 outputs (0, 1)")


def test_targets_of_several_heads():
    model, x = Heads(lambda early, final: {"kind": early, "size": final}, (4, 1)), torch.randn(32, 8)
    kinds, sizes = torch.randint(4, (32,)), torch.randn(32)
    with torch.no_grad():
        output = model(x[:16])
    right = F.cross_entropy(output["kind"], kinds[:16]) + F.mse_loss(output["size"][:, 0], sizes[:16])
    for targets in ({"kind": kinds, "size": sizes}, (kinds, sizes)):
        assert probed_loss(sw.diagnose(model, x, targets=targets)) == pytest.approx(right.item(), rel=1e-5)


def test_targets_that_fit_heads_of_other_shapes_need_a_loss():
    model = Heads(lambda early, final: (early, final), (4, 6))
    with pytest.raises(sw.SkipwayError, match=r"fit several outputs of other shapes \(0, 1\); give loss="):
        sw.diagnose(model, torch.randn(32, 8), targets=torch.randint(4, (32,)))


def test_states_further_down_are_left_out_and_said():
    output = (torch.randn(8, 4), [torch.randn(8, 3), torch.randn(8, 3)])
    objective = choose_objective(output, labels := torch.randint(4, (8,)))
    assert objective(output, labels) == F.cross_entropy(output[0], labels)
    assert objective.description.endswith("2 tensors further down in the output left out")


class Encoder(nn.Module):
    """A pre-norm encoder of one network, called sequence-first or batch-first."""

    def __init__(self, layers: nn.TransformerEncoder, *, batch_first: bool, pool: bool = True) -> None:
        super().__init__()
        self.layers, self.batch_first, self.pool = layers, batch_first, pool
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.transpose(0, 1) if self.batch_first else x)
        y = self.head(y.mean(0) if self.pool else y)
        return y.transpose(0, 1) if self.batch_first and not self.pool else y


def encoders() -> tuple[Encoder, Encoder]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True)
    first = Encoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), batch_first=False)
    second = Encoder(first.layers, batch_first=True)
    second.head = first.head
    return first, second


@pytest.mark.parametrize("length", [6, 16])
def test_sequence_first_is_measured_as_batch_first(length):
    sequence_first, batch_first = encoders()
    x, labels = torch.randn(length, 16, 8), torch.randint(5, (16,))
    one = sw.diagnose(sequence_first, x, targets=labels)
    other = sw.diagnose(batch_first, x.transpose(0, 1).contiguous(), targets=labels)
    assert one.subject.size == other.subject.size == 16
    assert one.measurement.loss == pytest.approx(other.measurement.loss, rel=1e-4)
    assert one.measurement.distinct == pytest.approx(other.measurement.distinct, rel=1e-3)
    losses = [diagnosis.measurement.ahead.losses[:12] for diagnosis in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert any(remark.startswith(f"samples: 16 on axis 1 of the input ({length}, 16, 8)") for remark in one.remarks)
    assert not any(remark.startswith("samples") for remark in other.remarks)


@pytest.mark.parametrize("pool", [True, False])
def test_without_targets_the_axis_is_the_one_along_which_outputs_are_independent(pool):
    sequence_first, batch_first = encoders()
    sequence_first.pool = batch_first.pool = pool
    x = torch.randn(6, 16, 8)
    assert find_sample_axes(sequence_first, x).axis == 1
    assert find_sample_axes(batch_first, x.transpose(0, 1)).axis == 0


def test_counts_of_samples_are_compared():
    with pytest.raises(sw.SkipwayError, match=r"targets of shape \(31,\): .* each of the 12 samples"):
        sw.diagnose(encoders()[0], torch.randn(12, 32, 8), targets=torch.randint(5, (31,)))
    with pytest.raises(sw.SkipwayError, match=r"targets of shape \(32,\): the rule is one for each of the 12 samples"):
        sw.diagnose(nn.Linear(8, 5), torch.randn(12, 8), targets=torch.randint(5, (32,)))


def test_sequence_first_tokens():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.encoder = nn.Embedding(V, 8), encoders()[0]
            self.encoder.pool, self.encoder.head = False, nn.Linear(8, V)

        def forward(self, ids: Tensor) -> Tensor:
            return self.encoder(self.table(ids))

    ids, model = IDS.T.contiguous(), Model()
    for given in (ids, torch.randint(V, (N, N))):  # as long as there are samples
        diagnosis = sw.diagnose(model, given, targets=given)
        axes = diagnosis.subject.samples
        assert (axes.size, axes.axis) == (N, 1)
        part = given[:, : N // 2]
        right = F.cross_entropy(model(part).flatten(0, 1), part.flatten())
        assert diagnosis.measurement.loss == pytest.approx(right.item(), rel=1e-4)
