"""The depth mixing matrix against the forms that are known: ones, products, the norms' deviations, given weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipway as sw
from skipway.nn import ScaledShortcut
from skipway.nn.shortcut import Carry
from skipway.probes.mixing_matrix import FrozenNorms, depth_mixing

DIM, LENGTH = 16, 5


def triangle(size: int) -> torch.Tensor:
    return torch.ones(size, size).tril()


def example() -> torch.Tensor:
    return torch.randn(4, LENGTH, DIM)


class Row(nn.Sequential):
    """A stem and residual connections."""

    def __init__(self, *connections: nn.Module) -> None:
        super().__init__(nn.Linear(DIM, DIM), *connections, nn.Linear(DIM, 3))


@pytest.mark.parametrize(
    "model",
    [
        lambda: sw.build("vit-tiny-16", depth=2, dim=DIM, heads=2, patch=4, image=8, classes=3, channels=3),
        lambda: sw.build("cait-xxs24", depth=2, dim=DIM, heads=2, patch=4, image=8, classes=3),
    ],
)
def test_prenorm_is_ones(model):
    """Every branch is carried to all that follow, undiminished."""
    mixing = depth_mixing(model(), torch.randn(2, 3, 8, 8))
    stream = [name for name in mixing.readers if "class" not in name][:4]
    size = len(stream)
    torch.testing.assert_close(mixing.coefficients[:size, :size], triangle(size))
    torch.testing.assert_close(mixing.shares[:size].sum(1), torch.ones(size))


def test_prenorm_of_torch_is_ones():
    layer = nn.TransformerEncoderLayer(DIM, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    mixing = depth_mixing(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), example())
    torch.testing.assert_close(mixing.coefficients, triangle(7))
    assert mixing.sources[0] == "stem"
    assert mixing.readers[-1] == "output"


def test_scaled_skips_are_powers():
    """h_l = α x_l is carried: α^(l + 1 - i) of v_i, α^l of the stem, which is α x_0; the output is not scaled again."""
    alpha = 0.7
    rows = (sw.Residual(nn.Linear(DIM, DIM), shortcut=ScaledShortcut(alpha, Carry())) for _ in range(3))
    mixing = depth_mixing(Row(*rows), example())
    carried = [[alpha**row, *(alpha ** (row + 1 - column) for column in range(1, 4))] for row in range(3)]
    expected = torch.tensor([*carried, [alpha**2, alpha**2, alpha, 1.0]]).tril()
    torch.testing.assert_close(mixing.coefficients, expected)


def test_postnorm_divides_by_the_deviations():
    """x_{l+1} = norm(x_l + F(x_l)): with σ_l the deviation before norm l, M[l, i] = Π 1 / σ, averaged over tokens."""
    norms = [nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2)]
    model = Row(*(sw.Residual(nn.Linear(DIM, DIM), post=norm) for norm in norms))
    factors = []
    for norm in norms:
        norm.register_forward_hook(lambda _, args, y: factors.append(1 / args[0].detach().std(-1, unbiased=False)))
    x = torch.randn(64, LENGTH, DIM)
    model(x)
    factor = factors[0].mean() * (1 - 1 / DIM)  # the norm takes the mean away, so a channel keeps 1 - 1/D of itself
    mixing = depth_mixing(model, x)
    for found in (mixing.coefficients[1, 0], mixing.coefficients[1, 1]):
        torch.testing.assert_close(found, factor, atol=0.02, rtol=0)


class Dense(nn.Module):
    """DenseFormer: behind each connection a weighted sum of all outputs so far."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.stem = nn.Linear(DIM, DIM)
        self.branches = nn.ModuleList(nn.Linear(DIM, DIM) for _ in weights)
        self.register_buffer("weights", weights)

    def forward(self, x):
        outputs = [self.stem(x)]
        stream = outputs[0]
        for branch, row in zip(self.branches, self.weights, strict=True):
            outputs.append(stream + branch(stream))
            stream = torch.einsum("k,k...->...", row[: len(outputs)], torch.stack(outputs))
        return stream


def test_given_weights_are_found():
    """With X_j the outputs, x_{i+1} = Σ_j a_ij X_j (Pagliardini et al. 2024); X_j = x_j + v_j."""
    weights = torch.tensor([[0.3, 0.9, 0.0], [0.2, -0.4, 1.1]])
    mixing = depth_mixing(Dense(weights), example())
    first = torch.tensor([1.0, 0.0, 0.0])  # x_0 by (v_0, v_1, v_2)
    outputs = [first, first + torch.tensor([0.0, 1.0, 0.0])]
    second = weights[0, 0] * outputs[0] + weights[0, 1] * outputs[1]
    torch.testing.assert_close(mixing.coefficients[:2], torch.stack([first, second]))


@pytest.mark.parametrize("training", [True, False])
def test_rows_sum_to_one_across_stages(training):
    """Projections, rectifiers and norms on the way of the stream are linear maps with the numbers that they have."""
    model = sw.build("resnet", depth=20, width=8, classes=3).train(training)
    mixing = depth_mixing(model, torch.randn(8, 3, 16, 16))
    bias = [p.norm() for name, p in model.named_parameters() if name.endswith("bias") and "shortcut" in name]
    assert not sum(bias)
    torch.testing.assert_close(mixing.shares.sum(1), torch.ones(10), atol=2e-3, rtol=0)
    assert bool(mixing.coefficients[-1, 0].isnan())
    assert torch.isnan(torch.tensor(mixing.effective_rank))


def test_gradients_against_each_reader_alone():
    """Reader l's part of the gradient at source i: all other ways are cut by hand."""
    torch.manual_seed(1)
    model = Row(*(sw.Residual(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())) for _ in range(2)))
    x, targets = torch.randn(6, DIM), torch.arange(6) % 3
    mixing = depth_mixing(model, x, targets)
    stem, first, second, head = model
    v0 = stem(x).detach().requires_grad_()
    v1 = first.branch(v0)
    stream = v0 + v1
    v2 = second.branch(stream)
    loss = nn.functional.cross_entropy(head(stream + v2), targets)
    v1.retain_grad(), v2.retain_grad()
    loss.backward(retain_graph=True)
    through = {
        0: torch.autograd.grad(v1, v0, v1.grad, retain_graph=True)[0],
        1: torch.autograd.grad(second.branch(v0 + v1.detach()), v0, v2.grad)[0],
        2: torch.autograd.grad(nn.functional.cross_entropy(head(v0 + v1.detach() + v2.detach()), targets), v0)[0],
    }
    torch.testing.assert_close(sum(through.values()), v0.grad)
    expected = torch.stack([(part * v0.grad).sum() / v0.grad.square().sum() for part in through.values()])
    torch.testing.assert_close(mixing.gradient_shares[:, 0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixing.gradient_shares.sum(0), torch.ones(3))
    assert mixing.loss == pytest.approx(loss.item())


class Forgetful(nn.Module):
    """The second connection reads what the first has read, and the output of the first is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)
        self.first, self.second = (sw.Residual(nn.Linear(DIM, DIM)) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        self.first(x)
        return self.head(self.second(x))


def test_a_branch_that_nobody_reads_is_named():
    mixing = depth_mixing(Forgetful(), torch.randn(4, DIM))
    assert mixing.unread == ["first"]
    assert "read by nobody: first" in str(mixing)


def test_in_place_additions_and_the_model_stay():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

        def forward(self, x):
            x = x + 0
            x += self.linear(self.norm(x))
            return x

    model = nn.Sequential(nn.Linear(DIM, DIM), Block(), Block())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixing = depth_mixing(model, torch.randn(4, DIM))
    torch.testing.assert_close(mixing.coefficients, triangle(3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_mix_is_an_error():
    with pytest.raises(sw.SkipwayError, match="no residual connection"):
        depth_mixing(nn.Linear(DIM, DIM), torch.randn(2, DIM))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_static_hyperconnections_are_products(count):
    """M[l, i] = α_lᵀ A_{l-1} … A_{i+1} β_i (Zhu et al. 2025, sec. 4.5), with the numbers of each connection drawn."""
    scheme = f"hyperconnections({count}, dynamic=False)"
    model = sw.build("vit-tiny-16", depth=2, dim=DIM, heads=2, patch=4, image=8, classes=3, scheme=scheme)
    own = [connection.residual.streams for connection in sw.chain(model)]
    with torch.no_grad():
        for streams in own:
            streams.static.add_(0.3 * torch.randn_like(streams.static))
    mixing = sw.depth_mixing(model, torch.randn(2, 3, 8, 8))
    reads, mixes, writes = zip(*(each.static.detach().split((1, count, 1), dim=1) for each in own), strict=True)
    reads = (*reads, torch.full((count, 1), 1 / count))  # the exit takes the mean
    expected = torch.zeros(5, 5)
    for source in range(5):
        state = torch.ones(count, 1) if source == 0 else writes[source - 1]
        for reader in range(source, 5):
            expected[reader, source] = (reads[reader].T @ state).item()
            state = mixes[reader].T @ state if reader < 4 else state
    torch.testing.assert_close(mixing.coefficients, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixing.shares.sum(1), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(mixing.gradient_shares.sum(0), torch.ones(5), atol=1e-4, rtol=0)


def history(scheme: str, blocks: int = 2) -> torch.nn.Module:
    """A ViT that reads earlier outputs, with what reads them drawn."""
    model = sw.build("vit-tiny-16", depth=blocks, dim=DIM, heads=2, patch=4, image=8, classes=3, scheme=scheme)
    return model.eval()


@pytest.mark.parametrize("rescale", [False, True])
def test_attention_residuals_weigh_all_sources_alike_at_the_start(rescale):
    """Softmax of zeros: 1 / k of each of k sources ("Attention Residuals", sec. 5), or their sum."""
    mixing = sw.depth_mixing(history(f"attentionresiduals(blocks=None, rescale={rescale})"), torch.randn(2, 3, 8, 8))
    expected = torch.ones(5, 5).tril()
    expected = expected if rescale else expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(mixing.coefficients, expected, atol=1e-4, rtol=1e-4)


def test_denseformer_is_a_product_of_its_mixtures():
    """With X_b = Y_(b-1) + branches and Y_b = Σ a_bj X_j, every X and Y is a combination of the sources."""
    model = history("denseformer", blocks=3)
    mixtures = [c.residual.streams.weights for c in list(sw.chain(model))[1::2]]
    with torch.no_grad():
        for weights in mixtures:
            weights.add_(0.3 * torch.randn_like(weights))
    mixing = sw.depth_mixing(model, torch.randn(2, 3, 8, 8))
    unit = torch.eye(7)
    rows, outputs, y = [], [unit[0]], unit[0]
    for block, weights in enumerate(mixtures):
        for branch in (1, 2):
            rows.append(y)
            y = y + unit[2 * block + branch]
        outputs.append(y)
        y = sum(weight.detach() * each for weight, each in zip(weights, outputs, strict=True))
    torch.testing.assert_close(mixing.coefficients, torch.stack([*rows, y]), atol=1e-4, rtol=1e-4)


def test_x0_scalars_bring_the_stem_back():
    """In what block b reads, the stem weighs r of what it was, plus m."""
    mixing = sw.depth_mixing(history("x0residual(resid=1.1, x0=0.2)", blocks=3), torch.randn(2, 3, 8, 8))
    stem = [1.3, 1.3]
    for _ in range(2):
        stem += [1.1 * stem[-1] + 0.2] * 2
    torch.testing.assert_close(mixing.coefficients[:6, 0], torch.tensor(stem), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["hyperconnections(3, dynamic=False)", "hyperconnections(4)", "mhc"])
def test_several_streams_as_strangers(scheme, monkeypatch):
    """Watched, a network of ours with several streams mixes as it does by the types of its modules."""
    model = sw.build("vit-tiny-16", scheme=scheme, depth=2, dim=12, heads=2, patch=4, image=8, classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, targets = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    own = depth_mixing(model, x, targets)
    monkeypatch.setattr("skipway.probes.mixing_matrix.connections_by_type", lambda model: ())
    watched = depth_mixing(model, x, targets)
    assert (watched.readers, watched.sources) == (own.readers, own.sources)
    for name in ("coefficients", "shares", "gradient_shares"):
        torch.testing.assert_close(getattr(watched, name), getattr(own, name))


class TwoStreams(nn.Module):
    """Constant hyper-connections in the style of others: streams on an axis of their own, joined by products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)
        self.branches = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.weights = nn.Parameter(torch.rand(3, 2, 4))

    def forward(self, x):
        s = torch.stack([self.stem(x)] * 2, -2)
        for branch, weights in zip(self.branches, self.weights, strict=True):
            read, mix, write = weights.split((1, 2, 1), -1)
            s = mix.mT @ s + write * branch((read * s).sum(-2)).unsqueeze(-2)
        return self.head(s.sum(-2))


def test_several_streams_of_others_are_products():
    """M[l, i] = α_lᵀ A_{l-1}ᵀ … A_{i+1}ᵀ β_i, and α_lᵀ A_{l-1}ᵀ … A_1ᵀ 1 of the stem (Zhu et al. 2025, sec. 4.5)."""
    model = TwoStreams()
    mixing = depth_mixing(model, example())
    reads, mixes, writes = (part.detach() for part in model.weights.split((1, 2, 1), -1))
    expected = torch.zeros(4, 4)
    for row in range(4):
        read = (reads[row] if row < 3 else torch.ones(2, 1)).mT
        for column in range(row, -1, -1):
            source = torch.ones(2, 1) if column == 0 else writes[column - 1]
            for mix in mixes[column:row]:
                source = mix.mT @ source
            expected[row, column] = (read @ source).item()
    torch.testing.assert_close(mixing.coefficients, expected)
    torch.testing.assert_close(mixing.shares.sum(1), torch.ones(4))
    torch.testing.assert_close(mixing.gradient_shares.sum(0), torch.ones(4))


class Inline(TwoStreams):
    """What the branches put out is in no module's hands."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(3, DIM, DIM))

    def forward(self, x):
        s = torch.stack([self.stem(x)] * 2, -2)
        for map_, weights in zip(self.maps, self.weights, strict=True):
            read, mix, write = weights.split((1, 2, 1), -1)
            s = mix.mT @ s + write * torch.tanh((read * s).sum(-2) @ map_).unsqueeze(-2)
        return self.head(s.sum(-2))


def test_what_no_module_holds_is_refused():
    with pytest.raises(sw.SkipwayError, match="neither an argument nor an output of a module"):
        depth_mixing(Inline(), example())


@pytest.mark.parametrize("form", ["add_", "out", "out of the branch"])
def test_an_addition_whose_result_nobody_reads_counts(form):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

        def forward(self, x):
            f = self.f(x)
            if form == "add_":
                x.add_(f)
            elif form == "out":
                torch.add(x, f, out=x)
            else:
                f.add_(x)
                return f
            return x

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(DIM, DIM), Block(), Block(), nn.Linear(DIM, DIM)), torch.randn(4, DIM)
    mixing = depth_mixing(model, x)
    torch.testing.assert_close(mixing.coefficients, triangle(3))
    for block in model[1:3]:
        block.forward = lambda x, f=block.f: x + f(x)
    expected = depth_mixing(model, x)
    torch.testing.assert_close(mixing.shares, expected.shares)
    torch.testing.assert_close(mixing.gradient_shares, expected.gradient_shares)


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(1, 4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, track_running_stats=True).eval(),
    ],
    ids=["one group", "groups", "instance", "running"],
)
def test_what_any_norm_divides_by_is_a_constant(norm):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()), norm

        def forward(self, x):
            return self.norm(x + self.f(x))

    x = torch.randn(2, 4, 3, 3)
    with FrozenNorms():
        frozen = norm(x)
    torch.testing.assert_close(frozen, norm(x))
    shares = depth_mixing(nn.Sequential(Block(), Block()), x).shares[1, :2]
    assert shares.sum() > 0.9


def test_squares_of_16_bits_do_not_overflow():
    norm, x = nn.GroupNorm(2, 4).half(), (1000 * torch.randn(2, 4, 3)).half()
    with FrozenNorms():
        torch.testing.assert_close(norm(x), nn.GroupNorm(2, 4)(x.float()).half(), rtol=1e-2, atol=1e-2)


def test_a_branch_of_function_transforms():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(DIM, DIM)

        def forward(self, x):
            return x + torch.func.vmap(torch.func.grad(lambda row: self.f(row).square().sum()))(x)

    assert depth_mixing(nn.Sequential(Block(), Block()), torch.randn(3, DIM)).shares.shape == (3, 3)


def test_a_normalised_vector_is_divided_by_a_constant():
    x = torch.randn(3, 4, requires_grad=True)
    with FrozenNorms():
        y = F.normalize(x, dim=1)
    torch.testing.assert_close(y, F.normalize(x, dim=1))
    (gradient,) = torch.autograd.grad(y, x, x)
    torch.testing.assert_close(gradient, F.normalize(x, dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_an_epsilon_torchs_own_counts(dtype):
    norm, x = nn.RMSNorm(4).to(dtype), torch.full((1, 4), 1e-3, dtype=dtype)
    with FrozenNorms():
        frozen = norm(x)
    torch.testing.assert_close(frozen, norm(x), rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(3), nn.RMSNorm(3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_in_float32_return_the_type_that_they_are_given(norm):
    x = torch.randn(2, 4, 3, 3).bfloat16()
    with FrozenNorms():
        frozen = norm(x)
    torch.testing.assert_close(frozen, norm(x), rtol=2e-2, atol=2e-2)


class Writing(TwoStreams):
    """Streams of others, with branches that write into what they read, and a head that does."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.ReLU(inplace), self.head)
        self.branches = nn.ModuleList(nn.Sequential(nn.ReLU(inplace), nn.Linear(DIM, DIM)) for _ in range(3))

    def forward(self, x):
        s = torch.stack([self.stem(x)] * 2, -2)
        for branch, weights in zip(self.branches, self.weights, strict=True):
            read, mix, write = weights.split((1, 2, 1), -1)
            s = mix.mT @ s + write * branch((read * s).sum(-2)).unsqueeze(-2)
        return self.head(s.sum(-2))


class OurStreams(nn.Module):
    """Streams or joins of ours, with branches that write into what they read."""

    def __init__(self, inplace: bool, scheme: str) -> None:
        super().__init__()
        model = sw.build("vit-tiny-16", depth=2, dim=DIM, heads=2, patch=4, image=8, classes=3, scheme=scheme)
        for connection in sw.chain(model):
            if connection.residual.join is None:  # what is read of streams is nobody else's
                connection.residual.pre = nn.Identity()
            connection.residual.branch = nn.Sequential(nn.ReLU(inplace), nn.Linear(DIM, DIM))
            connection.residual.post = nn.ReLU(inplace)
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("scheme", [None, "hyperconnections(2, dynamic=False)", "orthogonal"])
def test_what_is_kept_of_a_pass_is_not_written_into(scheme):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Writing(inplace) if scheme is None else OurStreams(inplace, scheme)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found.append(depth_mixing(model, example() if scheme is None else torch.randn(2, 3, 8, 8)))
    for name in ("coefficients", "shares", "gradient_shares"):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name))


def test_complex_streams_mix_as_real_ones_do():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(DIM, DIM, dtype=torch.complex64)

        def forward(self, x):
            return x + self.f(x)

    x = torch.randn(3, DIM, dtype=torch.complex64)
    mixing = depth_mixing(nn.Sequential(Block(), Block()), x, loss=lambda out, targets: out.abs().square().mean())
    torch.testing.assert_close(mixing.coefficients, triangle(3))
    torch.testing.assert_close(mixing.shares.sum(1), torch.ones(3))
    torch.testing.assert_close(mixing.gradient_shares.sum(0), torch.ones(3))
