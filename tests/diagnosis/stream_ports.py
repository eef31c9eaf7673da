"""Ports of hyper-connections as people write them, with switches for the faults that were found in the wild."""

from __future__ import annotations

import torch
from torch import nn

DIM = 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x)).relu())


def sinkhorn(logits: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    h = logits.softmax(-1)
    for _ in range(iterations):
        h = h / h.sum(-2, keepdim=True)
        h = h / h.sum(-1, keepdim=True)
    return h


def log_sinkhorn(logits: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    u = v = torch.zeros(logits.shape[-1])
    for _ in range(iterations):
        u = -torch.logsumexp(logits + v[None, :], dim=-1)
        v = -torch.logsumexp(logits + u[:, None], dim=-2)
    return torch.exp(logits + u[:, None] + v[None, :])


class Fused(nn.Module):
    """As transformers' `deepseek_v4`: one map and one vector for read, write and mixing weights, streams (B, T, n, d).

    Args:
        n: streams.
        hold: start of the diagonal of the logits over the others.
        std: of the map's start.
        factor: of the write weights.
        apply: whether the mixing is applied.
    """

    def __init__(self, n: int = 4, index: int = 0, *, hold=4.0, off=0.0, std=0.02, factor=2.0, apply=True) -> None:
        super().__init__()
        self.branch, self.n, self.factor, self.apply_mixing = Mlp(), n, factor, apply
        self.fn = nn.Parameter(torch.randn(n * (n + 2), n * DIM) * std)
        self.base = nn.Parameter(torch.cat((torch.zeros(2 * n), start(n, hold, off).flatten())))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, s):
        n, flat = self.n, s.flatten(-2)
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
        pre, post, comb = nn.functional.linear(flat, self.fn).split([n, n, n * n], dim=-1)
        b_pre, b_post, b_comb = self.base.split([n, n, n * n])
        pre = torch.sigmoid(pre * self.scale[0] + b_pre)
        post = torch.sigmoid(post * self.scale[1] + b_post)
        post = post if self.factor == 1 else self.factor * post
        comb = sinkhorn(comb.unflatten(-1, (n, n)) * self.scale[2] + b_comb.view(n, n))
        f = self.branch((pre.unsqueeze(-1) * s).sum(-2))
        mixed = torch.matmul(comb.transpose(-1, -2), s) if self.apply_mixing else s
        return post.unsqueeze(-1) * f.unsqueeze(-2) + mixed


class Apart(nn.Module):
    """As tokenbender's and mhc-lite's: three parameters of logits, streams (n, B, T, d), einsum."""

    def __init__(self, n: int = 4, index: int = 0, *, hold=4.0, off=0.0, std=0.02, factor=2.0, apply=True) -> None:
        super().__init__()
        self.branch, self.factor, self.apply_mixing = Mlp(), factor, apply
        self.res = nn.Parameter(start(n, hold, off))
        self.pre = nn.Parameter(torch.where(torch.arange(n) == index % n, 1.0, -1.0) * (std != 0))
        self.post = nn.Parameter(torch.zeros(n))

    def forward(self, s):
        h = log_sinkhorn(self.res)
        mixed = torch.einsum("ij,jbtd->ibtd", h, s)
        f = self.branch(torch.einsum("j,jbtd->btd", self.pre.sigmoid(), s))
        post = self.post.sigmoid() * self.factor if self.factor != 1 else self.post.sigmoid()
        return (mixed if self.apply_mixing else s) + torch.einsum("i,btd->ibtd", post, f)


class Joined(nn.Module):
    """As lucidrains': read and mixing weights side by side, (n, n + 1), of a static and a dynamic part."""

    def __init__(self, n: int = 4, index: int = 0, *, hold=4.0, off=0.0, std=0.02, factor=2.0, apply=True) -> None:
        super().__init__()
        self.branch, self.factor, self.apply_mixing = Mlp(), factor, apply
        read = torch.zeros(n, 1) if std == 0 else torch.where(torch.arange(n)[:, None] == index % n, 1.0, -1.0)
        self.static = nn.Parameter(torch.cat((read, start(n, hold, off)), dim=1))
        self.dynamic = nn.Parameter(torch.randn(DIM, n + 1) * std)
        self.beta = nn.Parameter(torch.zeros(n))

    def forward(self, s):
        alpha = 0.01 * (nn.functional.layer_norm(s, (DIM,)) @ self.dynamic) + self.static
        mixing = sinkhorn(alpha[..., 1:])
        alpha = torch.cat((alpha[..., :1].sigmoid(), mixing), dim=-1)
        mixed = torch.einsum("...st,...sd->...td", alpha, s)
        f = self.branch(mixed[..., 0, :])
        write = self.beta.sigmoid() * self.factor if self.factor != 1 else self.beta.sigmoid()
        return torch.einsum("...d,s->...sd", f, write) + (mixed[..., 1:, :] if self.apply_mixing else s)


class Plain(nn.Module):
    """Static hyper-connections: numbers without a softmax, streams (B, T, n, d)."""

    def __init__(self, n: int = 4, index: int = 0, *, apply=True) -> None:
        super().__init__()
        self.branch, self.apply_mixing = Mlp(), apply
        self.read = nn.Parameter(nn.functional.one_hot(torch.tensor(index % n), n).float())
        self.mix, self.write = nn.Parameter(torch.eye(n)), nn.Parameter(torch.ones(n))

    def forward(self, s):
        f = self.branch((self.read[:, None] * s).sum(-2))
        return (self.mix @ s if self.apply_mixing else s) + self.write[:, None] * f[..., None, :]


PORTS = {"fused": Fused, "apart": Apart, "joined": Joined}


def start(n: int, hold: float, off: float) -> torch.Tensor:
    return torch.full((n, n), off) + (hold - off) * torch.eye(n)


class Network(nn.Module):
    """A stem, blocks on n streams, and their mean."""

    def __init__(self, kind: type[nn.Module], n: int = 4, depth: int = 4, **choices) -> None:
        super().__init__()
        self.stem, self.n, self.first = nn.Linear(DIM, DIM), n, kind is Apart
        self.blocks = nn.Sequential(*(kind(n, index, **choices) for index in range(depth)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def forward(self, x):
        axis = 0 if self.first else -2
        x = self.stem(x)
        s = self.blocks(torch.stack([x] * self.n, dim=axis))
        return self.head(self.norm(s.mean(axis)))
