"""CLIP-MoE: a CLIP whose blocks have several feed-forward layers (experts) and a router that sends each token to a few.

A block's feed-forward layer becomes a router, which is one matrix without a bias, and E experts that have the layer's
own shape. With logits r = W x of a token x, its K largest entries are chosen, and the block adds

    sum over the chosen k of softmax(r restricted to the chosen)_k * FFN_k(x)

in place of FFN(x). Attention, norms, embeddings and projections are those of one CLIP. A CLIP-MoE's state has the plain
model's names, but ``.experts.K`` stands behind the name of a feed-forward layer, and ``.router.weight`` beside them.

Tokens are sorted by their expert, so that each expert computes one product over the tokens that chose it, and no token
goes through an expert that it did not choose. An accelerator takes one grouped product for all experts instead, which
knows on the device where an expert's tokens end.

Two numbers of a batch belong to a training's loss (`router_losses`). With f_k the share of tokens whose first choice is
k and P_k the mean of softmax(r)_k over all tokens, the balance is E * sum_k f_k P_k, the mean over blocks: 1 where all
experts are chosen alike, E where all tokens choose one. The z-loss is the mean of logsumexp(r)^2. Both follow from sums
over tokens (`router_sums`), which parts of a batch add up, on one device or on many.

Source: CLIP-MoE (arXiv 2409.19291), Sec. 3.2; its released code counts all choices in f and so has K in the place of
1. The z-loss is that of ST-MoE (arXiv 2202.08906), Eq. 5, which CLIP-UP (arXiv 2502.00965) takes to CLIP.
Price: K times the products of a feed-forward layer, and E * D for the router; ``benchmarks/clip_moe.py`` prints what
comes to them. Rejected: every expert on every token, which costs E times as much, and the grouped product on a CPU,
which costs more than a product for each expert (docs/log.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from modeclip.errors import ModeclipError
from modeclip.models.blocks import Block, blocks_of

MOST_EXPERTS = 1 << 10
"""Most experts of a layer: a folder that asks for more is taken for damaged."""

GROUPED_ON = frozenset({"cuda", "xpu"})
"""Devices that take a grouped product, if they have one; on a CPU a product for each expert is faster (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Shape of a CLIP-MoE beside that of its CLIP: the section ``moe`` of its ``open_clip_config.json``."""

    num_experts: int
    """Experts of each block, the feed-forward layer that was there before included."""
    top_k: int = 2
    """Experts that a token goes through."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ModeclipError(f"moe.num_experts: expected 1 to {MOST_EXPERTS:,}, got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ModeclipError(f"moe.top_k: expected 1 to {self.num_experts}, the number of experts, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the tokens of a forward pass chose in one block."""

    tower: str
    """``image`` or ``text``."""
    index: int
    """Number of the block in its tower."""
    experts: Int[Tensor, "*tokens k"]
    """Experts of each token, the first choice first; the leading axes are those of the block's input."""
    weights: Float[Tensor, "*tokens k"]
    """Their weights, which sum to 1."""
    logits: Float[Tensor, "*tokens E"]
    """The router's output, float32; it carries a gradient in training."""


class MoeFfn(nn.Module):
    """A feed-forward layer of several experts, in the place of one."""

    def __init__(self, experts: Sequence[nn.Module], width: int, top_k: int) -> None:
        """Take the experts' layers; the router's rows are not set.

        Args:
            experts: Layers of one shape, from (n, width) to (n, width).
            width: Numbers of a token.
            top_k: Experts that a token goes through.
        """
        super().__init__()
        like = next(experts[0].parameters())
        self.router = nn.Linear(width, len(experts), bias=False, device=like.device, dtype=like.dtype)
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.last: tuple[torch.Size, Tensor, Tensor, Tensor] | None = None
        """Leading shape, logits, choices and weights of the last forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width) for (..., width)."""
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # near ties are decided in full precision
            logits = F.linear(tokens.float(), self.router.weight.float())
            chosen, experts = logits.topk(self.top_k, dim=1)
            weights = chosen.softmax(dim=1)
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            shares = torch.zeros_like(logits).scatter(1, experts, weights)
            return self._all(tokens, shares).view(x.shape)
        self.last = x.shape[:-1], logits, experts, weights.detach()
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(flat, minlength=len(self.experts))
        rows = _SortedRows.apply(tokens, order, place, self.top_k)
        chains = self._chains(rows)
        if chains:
            outputs = _grouped(chains, rows, counts)
        else:  # an expert without tokens runs too, so that its gradient is 0 and not missing
            parts = rows.split(counts.tolist())
            outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        result: Tensor = _WeightedSum.apply(outputs, weights.to(outputs.dtype), order, place)
        return result.view(x.shape)

    def __getattr__(self, name: str) -> Any:
        """Let the first expert answer what a block asks of its layer beside running it: open_clip asks for its type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts: Any = super().__getattr__("experts")
            return getattr(experts[0], name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last forward pass, which can be neither copied nor pickled."""
        return self.__dict__ | {"last": None}

    def _all(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """Run every expert on every token, as a graph without sizes that depend on data."""
        outputs = [expert(tokens) * shares[:, k, None].to(tokens.dtype) for k, expert in enumerate(self.experts)]
        return torch.stack(outputs).sum(dim=0)

    def _chains(self, rows: Tensor) -> list[list[nn.Module]]:
        """Return the steps of each expert where a grouped product computes them all, else none."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        if device not in GROUPED_ON or not _has_grouped(device, dtype):
            return []
        chains = [chain_of(expert) for expert in self.experts]
        return chains if all(_fits_grouped(chain, dtype) for chain in chains) else []


def assemble(
    base: nn.Module,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    top_k: int = 2,
    routers: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make one CLIP-MoE of a CLIP and of models that differ from it in their feed-forward layers only.

    Args:
        base: The plain model; it stays as it is. Its own feed-forward layers are the first expert of each block.
        experts: State of each further expert's whole model.
        top_k: Experts that a token goes through.
        routers: Rows of each block's router, (E, width) by the block's name. None: random ones, uniform within
            1 / sqrt(width), as PyTorch starts a linear layer.
        seed: Seed of the random rows.

    Returns:
        A model that runs like the base.

    Raises:
        ModeclipError: An expert differs in more than its feed-forward layers or has other shapes, a tower has no such
            layers, or the routers do not fit.
    """
    config = MoeConfig(num_experts=1 + len(experts), top_k=top_k)
    check_experts(base, experts)
    blocks = _blocks(base)
    model = with_experts(copy.deepcopy(base), config)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        for block, layer in zip(blocks, moe_layers(model), strict=True):
            for number, state in enumerate(experts, start=1):
                expert = layer.experts[number]
                expert.load_state_dict(_part_of(state, block.ffn_names))
            rows = layer.router.weight
            if routers is None:
                rows.copy_(torch.rand(rows.shape, generator=draw).mul_(2).sub_(1) / rows.shape[1] ** 0.5)
            elif block.name not in routers or routers[block.name].shape != rows.shape:
                found = tuple(routers[block.name].shape) if block.name in routers else "none"
                raise ModeclipError(
                    f"routers: expected rows of shape {tuple(rows.shape)} for {block.name}, got {found}"
                )
            else:
                rows.copy_(routers[block.name])
    return model


def with_experts(model: nn.Module, config: MoeConfig) -> nn.Module:
    """Give each block of a plain model experts that are copies of its feed-forward layer, and a router of zeros.

    Args:
        model: The plain model, which is changed.
        config: Number of experts and of choices.

    Raises:
        ModeclipError: A tower has no feed-forward layers.
    """
    for block in _blocks(model):
        parts = [model.get_submodule(name) for name in block.ffn_names]
        layer = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        width = next(module for module in layer.modules() if isinstance(module, nn.Linear)).in_features
        experts = [layer, *(copy.deepcopy(layer) for _ in range(config.num_experts - 1))]
        made = MoeFfn(experts, width, config.top_k)
        nn.init.zeros_(made.router.weight)
        for name, value in zip(block.ffn_names, [made, *(nn.Identity() for _ in parts[1:])], strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, value)
    return model


def moe_layers(model: nn.Module) -> list[MoeFfn]:
    """Return the layers with experts, in the order of ``blocks_of``: images first; none for a plain model."""
    return [layer for _, layer in _layers(model)]


def router_sums(model: nn.Module, read: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "blocks sums"]:
    """Return what `router_losses` needs of the last forward pass of both towers, as sums over tokens for each block.

    Args:
        model: A CLIP-MoE.
        read: Which tokens of the texts count. None: all that the tower has computed.

    Returns:
        For each block the sums of the E probabilities, the number of first choices of each of the E experts, the sum of
        the squared logsumexp, and the number of tokens.

    Raises:
        ModeclipError: The model has no experts, or has not run.
    """
    rows = []
    for routing in routing_of(model):
        logits, first = routing.logits.flatten(0, -2), routing.experts[..., 0].flatten()
        if read is not None and routing.tower == "text" and routing.logits.ndim == 3:
            counted = read[:, : routing.logits.shape[1]].flatten()
            logits, first = logits[counted], first[counted]
        num_experts = logits.shape[1]
        probabilities, choices = logits.softmax(dim=1).sum(dim=0), torch.bincount(first, minlength=num_experts)
        others = torch.stack([logits.logsumexp(dim=1).square().sum(), logits.new_tensor(len(logits))])
        rows.append(torch.cat([probabilities, choices.to(logits.dtype), others]))
    return torch.stack(rows)


def router_losses(sums: Float[Tensor, "blocks sums"]) -> tuple[Tensor, Tensor]:
    """Return the balance and the z-loss of a batch, as means over blocks.

    Args:
        sums: What `router_sums` returned, added up over the parts of the batch.
    """
    num_experts, count = sums.shape[1] // 2 - 1, sums[:, -1]
    probabilities, choices = sums[:, :num_experts], sums[:, num_experts : 2 * num_experts]
    balance = num_experts * (probabilities * choices).sum(dim=1) / count.square()
    return balance.mean(), (sums[:, -2] / count).mean()


def routing_of(model: nn.Module) -> list[Routing]:
    """Return what each token of the last forward pass chose, for each block; images first.

    Without gradients, a tower's last block sees only the token that is read afterwards, unless ``trunk.encode`` is
    asked for every token.

    Raises:
        ModeclipError: The model has no experts, or a tower has not run.
    """
    found = []
    for block, layer in _layers(model):
        if layer.last is None:
            raise ModeclipError(f"routing: the {block.tower} tower has not run yet; encode something first")
        shape, logits, experts, weights = layer.last
        found.append(
            Routing(
                tower=block.tower,
                index=block.index,
                experts=experts.view(*shape, -1),
                weights=weights.view(*shape, -1),
                logits=logits.view(*shape, -1),
            )
        )
    if not found:
        raise ModeclipError("routing: this model has no experts; give a CLIP-MoE (modeclip upcycle makes one)")
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers a model has, and how many of them a token meets."""
    total = active = sum(value.numel() for value in model.parameters())
    for layer in moe_layers(model):
        idle = len(layer.experts) - layer.top_k
        active -= idle * sum(value.numel() for value in layer.experts[0].parameters())
    return total, active


def chain_of(layer: nn.Module) -> list[nn.Module]:
    """Return the steps of a feed-forward layer in their order, or none if they are no chain that is known here."""
    if isinstance(layer, nn.Sequential):
        parts = [[part] if not list(part.children()) else chain_of(part) for part in layer]
        return [] if not all(parts) else [step for part in parts for step in part]
    for names in _CHAINS:
        children = dict(layer.named_children())
        if children and children.keys() == set(names):
            return [children[name] for name in names]
    return []


_CHAINS = (
    ("fc1", "act", "drop1", "norm", "fc2", "drop2"),  # timm
    ("dense", "intermediate_act_fn"),  # the first half of BERT's
)


def _blocks(model: nn.Module) -> list[Block]:
    if moe_layers(model):
        raise ModeclipError("experts: this model is a CLIP-MoE already; take the plain model that it was made of")
    blocks = blocks_of(model)
    for tower, found in blocks.items():
        if not found or not all(block.ffn_names for block in found):
            raise ModeclipError(
                f"experts: the {tower} tower has no blocks with feed-forward layers; take a model whose towers are "
                "transformers, such as ViT-B-32"
            )
    return [block for found in blocks.values() for block in found]


def _layers(model: nn.Module) -> Iterator[tuple[Block, MoeFfn]]:
    if not any(isinstance(module, MoeFfn) for module in model.modules()):
        return
    for block in (block for found in blocks_of(model).values() for block in found):
        layer = model.get_submodule(block.ffn_names[0])
        if isinstance(layer, MoeFfn):
            yield block, layer


def check_experts(model: nn.Module, experts: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise unless the experts' states have a plain model's shapes, and its values outside of feed-forward layers.

    Raises:
        ModeclipError: It names the expert by its number, from 1, or says that the model has no such layers.
    """
    may_differ = tuple(f"{name}." for block in _blocks(model) for name in block.ffn_names)
    base = model.state_dict()
    for number, state in enumerate(experts, start=1):
        _check_expert(number, state, base, may_differ)


def _check_expert(
    number: int, state: Mapping[str, Tensor], base: Mapping[str, Tensor], may_differ: tuple[str, ...]
) -> None:
    if strange := sorted(base.keys() ^ state.keys()):
        where = "the base" if strange[0] in base else "the expert"
        raise ModeclipError(
            f"expert {number}: only {where} has {strange[0]}; give experts that continued from the base"
        )
    for name, value in base.items():
        found = state[name]
        if found.shape != value.shape:
            raise ModeclipError(
                f"expert {number}: {name} has shape {tuple(found.shape)} instead of {tuple(value.shape)}; give experts "
                "of the base's architecture"
            )
        if not name.startswith(may_differ) and not torch.equal(found.to(value), value):
            raise ModeclipError(
                f"expert {number}: {name} differs from the base, but only feed-forward layers may; train experts with "
                "train.trainable: ffn"
            )


def _part_of(state: Mapping[str, Tensor], ffn_names: Sequence[str]) -> dict[str, Tensor]:
    """Return the state of one feed-forward layer by the names that ``with_experts`` gives them."""
    if len(ffn_names) == 1:
        start = f"{ffn_names[0]}."
        return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    return {
        f"{index}.{name.removeprefix(f'{part}.')}": value
        for index, part in enumerate(ffn_names)
        for name, value in state.items()
        if name.startswith(f"{part}.")
    }


# ------------------------------------------------------------------------------------------- grouped products


class _SortedRows(torch.autograd.Function):
    """Rows of tokens, each once for each of its experts, sorted by expert; ``place`` is the inverse of ``order``.

    Its gradient gathers, where that of indexing would add row by row.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return tokens[order // top_k]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return grad[place].view(len(place) // ctx.top_k, ctx.top_k, grad.shape[1]).sum(dim=1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Outputs of sorted rows, weighed and added up by token."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, weights, order, place)
        return torch.bmm(weights[:, None], outputs[place].view(*weights.shape, outputs.shape[1])).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        outputs, weights, order, place = ctx.saved_tensors
        of_outputs = grad[order // weights.shape[1]] * weights.flatten()[order, None]
        of_weights = torch.bmm(outputs[place].view(*weights.shape, outputs.shape[1]), grad[:, :, None]).squeeze(2)
        return of_outputs, of_weights, None, None


def _grouped(chains: Sequence[Sequence[nn.Module]], rows: Tensor, counts: Tensor) -> Tensor:
    """Run the experts' steps on their rows, each linear layer as one grouped product."""
    ends = counts.cumsum(0).to(torch.int32)
    if torch.is_autocast_enabled(rows.device.type):  # a grouped product does not look at it
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    for steps in zip(*chains, strict=True):
        if not isinstance(steps[0], nn.Linear):
            rows = steps[0](rows)
            continue
        linears: Any = steps
        matrices = torch.stack([linear.weight.to(rows.dtype).t() for linear in linears])
        rows = F.grouped_mm(rows, matrices, offs=ends)
        if linears[0].bias is not None:
            bias = torch.stack([linear.bias.to(rows.dtype) for linear in linears])
            rows = rows + bias.repeat_interleave(counts, dim=0, output_size=len(rows))
    return rows


def _fits_grouped(chain: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether a chain is linear layers, whose rows are multiples of 16 bytes, and steps without weights."""
    step = 16 // dtype.itemsize
    return bool(chain) and all(
        part.in_features % step == 0 and part.out_features % step == 0
        if isinstance(part, nn.Linear)
        else not list(part.parameters())
        for part in chain
    )


@cache
def _has_grouped(device: str, dtype: torch.dtype) -> bool:
    """Whether a device has the grouped product for a type, forward and backward."""
    try:
        with torch.enable_grad():
            a = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
            b = torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
            ends = torch.tensor([8, 16], device=device, dtype=torch.int32)
            torch.autograd.grad(F.grouped_mm(a, b.mT, offs=ends).square().sum(), (a, b))
    except (AttributeError, RuntimeError):  # an older PyTorch, or a device without it
        return False
    return True
