"""Cut a tower of a CLIP in two: a trunk that models share, and a head that each has for itself.

A tower is a row of blocks between embeddings and a projection. The trunk is the embeddings and the blocks up to a
depth; the head is the last blocks, the norm behind them and the projection. Where models differ in their heads alone,
the trunk runs once for all of them (`modeclip.models.features`), and a trunk that is not trained runs without a graph.

Between the two lies a tuple of tensors whose first axis are the samples, so it can be cut into batches, stacked and
stored: the hidden states (B, T, W), and for texts the token ids (B, T) that the head finds the end of the text by.

Both are made of shallow copies of the tower's modules. They hold the same parameters, so gradients, new weights and
another device reach them. Towers that can be cut are open_clip's own (with or without their variants of masks and
pooling), Vision Transformers of timm, and BERT, RoBERTa and XLM-R; any other is an error, and runs as a whole.

A causal text tower is read at the end-of-text token, and no position sees a later one, so the padding that no text of
a batch uses is cut off first: the same vectors to rounding, for a fraction of the work.

Without gradients, the last block of open_clip's own towers computes only the token that is read afterwards: the class
token of an image, the end of a text. Of the other tokens it takes what its attention mixes. With one query q, and keys
k_t = W_k x_t + b_k and values v_t = W_v x_t + b_v in each head,

    softmax_t(q k_t) = softmax_t((W_k^T q) x_t)    and    sum_t a_t v_t = W_v (sum_t a_t x_t) + b_v,

so W_k and W_v are multiplied once a sample and not once a token. Features are equal to rounding. A block that trains,
that hooks watch, or that is built otherwise runs as it is.

An image tower that answers requests can be recorded once with TorchScript (`record`): without the interpreter between
its operations it takes three quarters of the processor time, and other threads run meanwhile. The numbers are the same.

Price: microseconds; nothing is copied. What is saved are the forward passes of the shared blocks, and most of the last
one (``benchmarks/shared_trunk.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    from torch import Tensor

    from modeclip.models.blocks import Tower

    State = tuple[Tensor, ...]
    """What a trunk gives to a head: hidden states, and for texts their token ids; the first axis are the samples."""

_RECORDED: WeakKeyDictionary[Any, Callable[[Tensor], Tensor]] = WeakKeyDictionary()
"""Recorded image towers, by their models."""
_LOGITS = ("logit_scale", "logit_bias")
_BERTS = {"bert", "roberta", "xlm-roberta"}
"""Kinds of text towers of transformers whose layers are a plain row."""


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """How one tower can be cut."""

    blocks: str
    """Name of the row of blocks in the model."""
    after: tuple[str, ...]
    """Names of what follows the blocks: norm, pooling, projection."""
    num_blocks: int
    """How many there are."""
    cut: Callable[[int], tuple[Callable[[Tensor], State], Callable[..., Tensor]]]
    """Makes the trunk with the first so many blocks, and the head with the others, not normalised."""
    reads_one: bool = False
    """Whether a head without gradients computes one token of the last block."""


def split(model: Any, tower: Tower, depth: int) -> tuple[Callable[[Tensor], State], Callable[[State], Tensor]]:
    """Cut a tower before its last blocks.

    Args:
        model: A CLIP of open_clip.
        tower: ``image`` or ``text``.
        depth: How many of the last blocks belong to the head, 0 to all; with all, the trunk is the embeddings.

    Returns:
        The trunk, of (B, 3, H, W) images or (B, context_length) token ids; and the head, of what the trunk returned,
        which gives (B, D) unit vectors equal to those of the whole tower.

    Raises:
        ModeclipError: The tower cannot be cut, or has fewer blocks.
    """
    import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)

    anatomy = _anatomy(model, tower)
    if anatomy is None:
        module = getattr(model, "visual" if tower == "image" else "text", model)
        raise ModeclipError(
            f"{tower} tower: {type(module).__name__} has no row of blocks that it could be cut in; expected a Vision "
            "Transformer or a text transformer of open_clip, a Vision Transformer of timm, or BERT, RoBERTa, XLM-R"
        )
    if not 0 <= depth <= anatomy.num_blocks:
        raise ModeclipError(f"{tower} tower: expected 0 to {anatomy.num_blocks} blocks in the head, got {depth}")
    trunk, head = anatomy.cut(anatomy.num_blocks - depth)
    return trunk, lambda state: F.normalize(head(*state), dim=-1)


def head_depth(model: Any, tower: Tower, changed: Collection[str]) -> int | None:
    """Return how many of the last blocks of a tower a head needs to hold all of some tensors.

    Args:
        model: A CLIP of open_clip.
        tower: ``image`` or ``text``.
        changed: Names in its state; those of the other tower, and the scale and bias of the logits, do not count.

    Returns:
        The least depth for `split`, or None if the tower cannot be cut or the embeddings are among them.
    """
    anatomy = _anatomy(model, tower)
    if anatomy is None:
        return None
    depth = 0
    for name in changed:
        if name in _LOGITS or name.startswith("visual.") != (tower == "image"):
            continue
        if name.startswith(f"{anatomy.blocks}."):
            index = int(name.removeprefix(f"{anatomy.blocks}.").partition(".")[0])
            depth = max(depth, anatomy.num_blocks - index)
        elif not any(name == part or name.startswith(f"{part}.") for part in anatomy.after):
            return None
    return depth


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A trunk with the heads of the models that share it."""

    members: tuple[int, ...]
    """Which of the models these are, by index."""
    trunk: Callable[[Tensor], State]
    """Their trunk; of a model that shares none, it gives back its input."""
    heads: tuple[Callable[[State], Tensor], ...]
    """The head of each, which gives (B, D) unit vectors."""


def share(models: Sequence[Any], tower: Tower) -> list[Shared]:
    """Find out which models share a trunk: those that hold the very same parameters from the embeddings on.

    Args:
        models: CLIPs of open_clip, in evaluation mode.
        tower: ``image`` or ``text``.

    Returns:
        Groups in which every model is once; a model that shares nothing is a group of its own, and runs as a whole.
    """
    groups: list[tuple[list[int], int]] = []
    for index, model in enumerate(models):
        for number, (members, depth) in enumerate(groups):
            own = _depth_apart(models[members[0]], model, tower)
            if own is not None:
                groups[number] = [*members, index], max(depth, own)
                break
        else:
            groups.append(([index], 0))
    return [_shared(models, members, tower, depth) for members, depth in groups]


def encode(model: Any, tower: Tower, x: Tensor, *, every_token: bool = False) -> Tensor:
    """Run a whole tower: unit vectors (B, D) of images, or of token ids without the padding that none of them uses.

    Args:
        model: A CLIP of open_clip.
        tower: ``image`` or ``text``.
        x: Images or token ids.
        every_token: Compute every token of the last block, for those who look at them afterwards.
    """
    import torch

    if tower == "image" and model in _RECORDED and not every_token and not torch.is_grad_enabled():
        recorded: Tensor = _RECORDED[model](x)
        return recorded
    anatomy = _anatomy(model, tower)
    reads_one = anatomy is not None and anatomy.reads_one and not every_token
    if reads_one or (tower == "text" and is_exact_without_padding(model)):
        trunk, head = split(model, tower, 1 if reads_one else 0)
        return head(trunk(x))
    features: Tensor = getattr(model, f"encode_{tower}")(x, normalize=True)
    return features


def record(model: Any) -> bool:
    """Record the image tower of a model with TorchScript, so that ``encode`` runs it without the interpreter.

    PyTorch calls TorchScript deprecated; what it names instead needs a compiler on the machine. So a tower that cannot
    be recorded, or whose recording differs from it for a batch of another size, goes on as it is.

    Args:
        model: A CLIP of open_clip on a CPU, in evaluation mode. It is forgotten with its recording.

    Returns:
        Whether it is recorded.
    """
    import torch

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = model.visual

        def forward(self, images: Tensor) -> Tensor:
            return encode(self, "image", images)

    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    images = torch.rand(3, 3, int(height), int(width), generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = torch.jit.trace(Tower().eval(), images[:2], check_trace=False)  # type: ignore[no-untyped-call]
            same = [torch.equal(found(images[:count]), encode(model, "image", images[:count])) for count in (3, 1)]
    except Exception:  # TorchScript raises nearly anything on what it cannot record
        return False
    if all(same):
        _RECORDED[model] = found
    return all(same)


def _shared(models: Sequence[Any], members: Sequence[int], tower: Tower, depth: int) -> Shared:
    if len(members) == 1:
        model = models[members[0]]
        return Shared(members=tuple(members), trunk=lambda x: (x,), heads=(lambda state: encode(model, tower, *state),))
    pairs = [split(models[index], tower, depth) for index in members]
    return Shared(members=tuple(members), trunk=pairs[0][0], heads=tuple(head for _, head in pairs))


def _depth_apart(one: Any, other: Any, tower: Tower) -> int | None:
    """Return the depth of the heads that two models need to share a trunk; None if they share none."""
    modules = [model.visual if tower == "image" else getattr(model, "text", model) for model in (one, other)]
    first = [next(module.parameters()) for module in modules]  # of the embeddings
    anatomy = _anatomy(one, tower) if first[0] is first[1] else None
    if anatomy is None:
        return None
    values = [dict(model.named_parameters()) for model in (one, other)]
    if values[0].keys() != values[1].keys():
        return None
    depth = head_depth(one, tower, [name for name, value in values[0].items() if value is not values[1][name]])
    return None if depth == anatomy.num_blocks else depth


def is_exact_without_padding(model: Any) -> bool:
    """Tell whether the padding behind texts changes nothing: open_clip's causal text tower, read at the end of text."""
    own = _own_text_tower(model)
    return own is not None and own.is_exact_without_padding


def tokens_read(model: Any, tokens: Tensor) -> Tensor | None:
    """Return which of (B, T) token ids are no padding behind a text, (B, T) booleans; None where padding is not cut."""
    if not is_exact_without_padding(model):
        return None
    return tokens.ne(0).flip(1).cumsum(1).flip(1) > 0


@dataclass(frozen=True, kw_only=True)
class _OwnText:
    """open_clip's own text tower, which lies in the model itself or beside it."""

    tower: Any
    prefix: str
    pool: str
    end: int

    @property
    def has_class_token(self) -> bool:
        return getattr(self.tower, "cls_emb", None) is not None

    @property
    def is_exact_without_padding(self) -> bool:
        at_end = not self.has_class_token and (self.pool == "argmax" or (self.pool == "eos" and bool(self.end)))
        return at_end and self.tower.attn_mask is not None


def _anatomy(model: Any, tower: Tower) -> _Anatomy | None:
    if tower == "image":
        return _own_image(model.visual) or _timm_image(model.visual)
    own = _own_text_tower(model)
    return _hugging_text(getattr(model, "text", None)) if own is None else _own_text(own)


def _own_image(visual: Any) -> _Anatomy | None:
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None or getattr(visual, "output_tokens", False) or not hasattr(visual, "_embeds"):
        return None
    import torch

    pools_class = getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", None) == "tok"
    reads_class = pools_class and not _is_watched(visual)

    def cut(first: int) -> tuple[Callable[[Tensor], State], Callable[..., Tensor]]:
        before, behind = _cut_transformer(visual.transformer, first)

        def head(x: Tensor) -> Tensor:
            if reads_class and _reads_one(behind):
                x = _run_to(behind, x, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))[:, None]
            else:
                x = behind(x)
            pooled: Tensor = visual._pool(x)[0]
            return pooled if visual.proj is None else pooled @ visual.proj

        return lambda images: (before(visual._embeds(images)),), head

    after = ("visual.ln_post", "visual.proj", "visual.attn_pool", "visual.attn_pool_contrastive")
    return _Anatomy(
        blocks="visual.transformer.resblocks",
        after=after,
        num_blocks=len(blocks),
        cut=cut,
        reads_one=reads_class and _reads_one(visual.transformer),
    )


def _timm_image(visual: Any) -> _Anatomy | None:
    trunk: Any = getattr(visual, "trunk", None)
    if type(trunk).__name__ != "VisionTransformer" or not hasattr(visual, "head"):
        return None
    from torch import nn

    def cut(first: int) -> tuple[Callable[[Tensor], State], Callable[..., Tensor]]:
        before = _twin(trunk, blocks=trunk.blocks[:first], norm=nn.Identity())

        def head(x: Tensor) -> Tensor:
            for block in trunk.blocks[first:]:
                x = block(x)
            features: Tensor = visual.head(trunk.forward_head(trunk.norm(x)))
            return features

        return lambda images: (before.forward_features(images),), head

    parts = ("trunk.norm", "trunk.attn_pool", "trunk.fc_norm", "trunk.head", "head")
    after = tuple(f"visual.{part}" for part in parts)
    return _Anatomy(blocks="visual.trunk.blocks", after=after, num_blocks=len(trunk.blocks), cut=cut)


def _own_text_tower(model: Any) -> _OwnText | None:
    tower = getattr(model, "text", None)
    if tower is None and hasattr(model, "token_embedding") and hasattr(model, "text_pool_type"):
        return _OwnText(tower=model, prefix="", pool=model.text_pool_type, end=model.text_eos_id)
    is_own = hasattr(tower, "_embeds") and hasattr(getattr(tower, "transformer", None), "resblocks")
    if not is_own or tower is None or tower.output_tokens:
        return None
    return _OwnText(tower=tower, prefix="text.", pool=tower.pool_type, end=tower.eos_id)


def _own_text(own: _OwnText) -> _Anatomy:
    import torch

    tower, blocks = own.tower, own.tower.transformer.resblocks

    def embed(tokens: Tensor) -> Tensor:
        if own.has_class_token:
            x: Tensor = tower._embeds(tokens)[0]
        else:
            dtype = tower.transformer.get_cast_dtype()
            x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[: tokens.shape[1]].to(dtype)
        return x

    def mask_of(x: Tensor, tokens: Tensor) -> Tensor | None:
        length = x.shape[1]
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        if own.has_class_token or getattr(tower, "use_pad_mask", False):
            added: Tensor = tower._build_additive_mask(tokens, length, tower.transformer.get_cast_dtype())
            return added if mask is None else mask.unsqueeze(0) + added
        return mask

    def cut(first: int) -> tuple[Callable[[Tensor], State], Callable[..., Tensor]]:
        before, behind = _cut_transformer(tower.transformer, first)

        def trunk(tokens: Tensor) -> State:
            tokens = _without_padding(tokens) if own.is_exact_without_padding else tokens
            x = embed(tokens)
            return before(x, attn_mask=mask_of(x, tokens)), tokens

        def head(x: Tensor, tokens: Tensor) -> Tensor:
            mask, at = mask_of(x, tokens), _read_at(x, tokens, own)
            if at is not None and _reads_one(behind):
                x = tower.ln_final(_run_to(behind, x, at, mask))
            elif own.has_class_token:
                x = tower.ln_final(behind(x, attn_mask=mask)[:, -1])
            else:
                x = tower.ln_final(behind(x, attn_mask=mask))
                x = x if at is None else x[torch.arange(x.shape[0], device=x.device), at]
            projection = tower.text_projection
            if projection is None:
                return x
            features: Tensor = projection(x) if callable(projection) else x @ projection
            return features

        return trunk, head

    after = (f"{own.prefix}ln_final", f"{own.prefix}text_projection")
    return _Anatomy(
        blocks=f"{own.prefix}transformer.resblocks",
        after=after,
        num_blocks=len(blocks),
        cut=cut,
        reads_one=(own.has_class_token or own.pool != "none") and _reads_one(tower.transformer),
    )


def _without_padding(tokens: Tensor) -> Tensor:
    import torch

    if torch.compiler.is_exporting():  # a graph has no length that depends on values; whoever runs it cuts the padding
        return tokens
    used = (tokens != 0).any(dim=0).nonzero()  # an id of 0 is padding, but also the token "!"
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens


def _read_at(x: Tensor, tokens: Tensor, own: _OwnText) -> Tensor | None:
    """Return the position (B,) that each text is read at; None where the tower pools nothing."""
    if own.has_class_token or own.pool in ("first", "last"):
        last = own.has_class_token or own.pool == "last"
        return tokens.new_full(tokens.shape[:1], x.shape[1] - 1 if last else 0)
    if own.pool == "none":
        return None
    at: Tensor = (tokens if own.pool == "argmax" else tokens.eq(own.end).int()).argmax(dim=-1)
    return at


def _hugging_text(text: Any) -> _Anatomy | None:
    bert = getattr(text, "transformer", None)
    kind = getattr(getattr(text, "config", None), "model_type", None)
    if bert is None or kind not in _BERTS or text.output_tokens:
        return None
    layers = bert.encoder.layer

    def cut(first: int) -> tuple[Callable[[Tensor], State], Callable[..., Tensor]]:
        before = _twin(bert, encoder=_twin(bert.encoder, layer=layers[:first]), pooler=None)
        behind = _twin(bert, embeddings=_given(), encoder=_twin(bert.encoder, layer=layers[first:]))

        def mask_of(tokens: Tensor) -> Tensor:
            return tokens.ne(text.config.pad_token_id).long()

        def trunk(tokens: Tensor) -> State:
            return before(input_ids=tokens, attention_mask=mask_of(tokens)).last_hidden_state, tokens

        def head(x: Tensor, tokens: Tensor) -> Tensor:
            mask = mask_of(tokens)
            features: Tensor = text.proj(text.pooler(behind(inputs_embeds=x, attention_mask=mask), mask))
            return features

        return trunk, head

    after = ("text.transformer.pooler", "text.pooler", "text.proj")
    return _Anatomy(blocks="text.transformer.encoder.layer", after=after, num_blocks=len(layers), cut=cut)


def _given() -> Any:
    """Return the embeddings of a head that is given its hidden states: it returns them."""
    from torch import nn

    class Given(nn.Module):
        def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
            return inputs_embeds

    return Given()


def _cut_transformer(transformer: Any, first: int) -> tuple[Any, Any]:
    """Return a transformer of open_clip as two: one with its first blocks, and one with the others."""
    blocks = transformer.resblocks
    if first == 0:
        return _unchanged, transformer
    if first == len(blocks):
        return transformer, _unchanged
    return _twin(transformer, resblocks=blocks[:first]), _twin(transformer, resblocks=blocks[first:])


def _reads_one(transformer: Any) -> bool:
    """Whether the last block may compute one token alone: it neither trains nor is watched, and is open_clip's own."""
    import torch

    if torch.is_grad_enabled() or not hasattr(transformer, "resblocks"):
        return False
    block = transformer.resblocks[-1]
    attention, kind = getattr(block, "attn", None), type(block)
    return (
        (kind.__module__, kind.__name__) == ("open_clip.transformer", "ResidualAttentionBlock")
        and type(attention) is torch.nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not block.training
        and not _is_watched(transformer)
        and not any(_is_watched(part) for part in block.modules())
    )


def _is_watched(module: Any) -> bool:
    """Whether somebody sees, or does otherwise, what runs through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _run_to(transformer: Any, x: Tensor, at: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run a transformer up to one token of each sample.

    Args:
        transformer: One that `_reads_one`.
        x: (B, T, W) hidden states.
        at: (B,) position of the token.
        mask: What is added to the attention, (T, T) or (B * heads, T, T).

    Returns:
        (B, W): equal to ``transformer(x, attn_mask=mask)`` at these positions.
    """
    import torch

    *before, block = transformer.resblocks
    for earlier in before:
        x = earlier(x, attn_mask=mask)
    attention = block.attn
    (batch, _, width), heads = x.shape, attention.num_heads
    rows = torch.arange(batch, device=x.device)
    of_query, of_key, of_value = attention.in_proj_weight.chunk(3)
    bias = attention.in_proj_bias.chunk(3)
    normed = block.ln_1(x)
    query = torch.nn.functional.linear(normed[rows, at], of_query, bias[0]) * (width // heads) ** -0.5
    in_head = query.view(batch, heads, -1)
    scores = torch.einsum("bhd,hdw->bhw", in_head, of_key.view(heads, -1, width)) @ normed.mT
    if mask is not None:
        own = mask[at][:, None] if mask.ndim == 2 else mask.view(batch, heads, *mask.shape[1:])[rows, :, at]
        scores = scores + own
    mixed = scores.float().softmax(dim=-1).to(normed.dtype) @ normed
    values = torch.einsum("bhw,hdw->bhd", mixed, of_value.view(heads, -1, width)).reshape(batch, width) + bias[2]
    x = x[rows, at] + block.ls_1(attention.out_proj(values))
    result: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return result


def _unchanged(x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Stand for no block at all."""
    del attn_mask
    return x


def _twin(module: Any, **parts: Any) -> Any:
    """Return a shallow copy of a module with some of its parts replaced; parameters and hooks are the same ones."""
    twin = object.__new__(type(module))
    twin.__dict__ = module.__dict__ | {"_modules": module._modules | parts}
    return twin
