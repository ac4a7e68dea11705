"""Follow the tokens of pairs through a CLIP-MoE: which expert each of them chooses, by block, word and topic.

A sample of pairs goes through both towers. What counts for a token is its first choice: the expert with the largest
weight. The shares of a block are over all tokens of the sample, those of a topic over the tokens of its pairs, as the
mean over a tower's blocks. Padding of captions is not counted. A topic is a group of a column of integers (such as
``fine_cluster``), or, without one, a word and all pairs whose captions have it.

Price: the forward pass of 1,024 pairs, seconds for an icon model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.cards import pick_keywords, split_words
from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image, strict_pillow
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_least
from modeclip.models.clip import Clip, computing, load_clip
from modeclip.models.moe import Routing, moe_layers, routing_of
from modeclip.models.trunk import encode
from modeclip.system.devices import choose_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Tower = Literal["image", "text"]

PAIRS_AT_ONCE = 128
"""Pairs that are encoded at a time."""
NUM_WORDS = 12
"""Words shown for an expert."""
NUM_TOPICS = 24
"""Topics that are kept, those that are routed least like all others."""
TOPIC_PAIRS = 8
"""Fewest pairs of a topic; the shares of fewer say little."""
TOPIC_WORDS = 3
"""Words that name a topic."""
PICTURE_PIXELS = 128
"""Longest side of a picture that is kept; larger ones are made smaller."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Which pairs are followed."""

    num_pairs: int = 1024
    """Pairs whose tokens are counted, drawn at random."""
    num_shown: int = 12
    """Pairs whose tokens are shown one by one."""
    num_examples: int = 10
    """Pairs that are shown for each expert: those of whose tokens it gets the largest share."""
    topics: str | None = None
    """Column of integers whose values are the topics, such as `fine_cluster`; none: words of the captions."""
    seed: int = 0
    """Decides which pairs are drawn."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_least("trace", self, num_pairs=1, num_shown=0, num_examples=0)


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """What the tokens of all pairs chose in one block."""

    tower: Tower
    """Which tower."""
    index: int
    """Number of the block in its tower."""
    first: Float[np.ndarray, " E"]
    """Share of the tokens whose first choice each expert is; they sum to 1."""
    chosen: Float[np.ndarray, " E"]
    """Share of the tokens that go through each expert; they sum to k."""
    balance: float
    """E * sum of f P: 1 where all experts are chosen alike, E where all tokens choose one."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Pairs that have something in common, and where their tokens go."""

    name: str
    """The word, or the key words of the group."""
    num_pairs: int
    """Pairs of the sample that belong to it."""
    image: Float[np.ndarray, " E"]
    """Share of its patches whose first choice each expert is, the mean over blocks."""
    text: Float[np.ndarray, " E"]
    """The same for the tokens of its captions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedPair:
    """One pair, and the first choice of each of its tokens."""

    row: int
    """Row of the catalog."""
    key: str
    """Key of the pair."""
    caption: str
    """Its caption."""
    picture: Image
    """The image as the model sees it: scaled and cut."""
    pieces: tuple[str, ...]
    """Texts of the caption's tokens; empty for start and end."""
    image: tuple[Int[np.ndarray, " _"], ...]
    """First choices in each block of the image tower; tokens before the patches (classes, registers) come first."""
    text: tuple[Int[np.ndarray, " _"], ...]
    """First choices in each block of the text tower."""
    image_share: Float[np.ndarray, " E"]
    """Share of the image's tokens whose first choice each expert is, the mean over blocks."""
    text_share: Float[np.ndarray, " E"]
    """The same for the caption's."""


@dataclass(frozen=True, kw_only=True)
class ExpertTrace:
    """What one expert gets."""

    name: str
    """What people call it."""
    image: float
    """Share of all tokens of images whose first choice it is, the mean over blocks."""
    text: float
    """The same for captions."""
    words: tuple[str, ...]
    """Tokens of captions that choose it more than others do, strongest first."""
    pairs: tuple[TracedPair, ...]
    """Pairs of whose tokens it gets the largest share, each caption once."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Where the tokens of a sample of pairs go."""

    model: str
    """The CLIP-MoE."""
    top_k: int
    """Experts that a token goes through."""
    num_pairs: int
    """Pairs that were followed."""
    num_unreadable: int
    """Pairs that were drawn besides, whose images cannot be read."""
    blocks: tuple[BlockTrace, ...]
    """Images first, then texts."""
    experts: tuple[ExpertTrace, ...]
    """Each expert."""
    topic_column: str | None
    """Column that the topics come from; none: they are words."""
    topics: tuple[Topic, ...]
    """Topics that are routed least like all pairs, these first."""
    shown: tuple[TracedPair, ...]
    """Pairs to show token by token, at random."""


def trace(
    catalog: Catalog,
    model: str | Path,
    config: TraceConfig | None = None,
    *,
    selection: Selection = ALL,
    experts: Sequence[str] = (),
) -> Trace:
    """Follow the tokens of a sample of pairs through a CLIP-MoE.

    Args:
        catalog: Where the pairs are drawn from.
        model: Folder of the CLIP-MoE.
        config: Which pairs.
        selection: Pairs of the catalog that may be drawn.
        experts: Name of each expert; default: their numbers.

    Raises:
        ModeclipError: The model has no experts, ``experts`` has another length, the topics' column is missing or holds
            something else than integers, or no image can be read.
    """
    config = config or TraceConfig()
    clip = load_clip(model)
    layers = moe_layers(clip.model)
    if not layers:
        raise ModeclipError(f"trace: {model} has no experts; give a CLIP-MoE, such as `modeclip upcycle` makes")
    num_experts = len(layers[0].experts)
    names = tuple(experts) or tuple(f"expert {number}" for number in range(num_experts))
    if len(names) != num_experts:
        raise ModeclipError(f"trace: expected {num_experts} names of experts, got {len(names)}")
    rows = _draw(selection.rows(catalog), config)
    groups = _read_topics(catalog, rows, config.topics)
    clip.model.eval().to(choose_device())
    counts, pairs = _Counts(num_experts), list[TracedPair]()
    for some in np.array_split(rows, math.ceil(len(rows) / PAIRS_AT_ONCE)):
        pairs += _follow(catalog, clip, some, counts)
    if not pairs:
        raise ModeclipError(
            f"trace: none of {len(rows):,} images of {catalog.path!r} can be read; see `modeclip check`"
        )
    blocks = counts.blocks()
    return Trace(
        model=str(model),
        top_k=layers[0].top_k,
        num_pairs=len(pairs),
        num_unreadable=len(rows) - len(pairs),
        blocks=blocks,
        experts=_describe_experts(names, blocks, counts, pairs, config.num_examples),
        topic_column=config.topics,
        topics=_find_topics(pairs, groups),
        shown=tuple(np.random.default_rng(config.seed).permutation(np.array(pairs, object))[: config.num_shown]),
    )


class _Counts:
    """Adds up over pairs what tokens choose, by block and by the text of a token."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.words: list[Counter[str]] = [Counter() for _ in range(num_experts)]
        self._blocks: dict[tuple[Tower, int], list[np.ndarray]] = {}

    def add(self, routing: Routing, used: np.ndarray) -> None:
        """Count the tokens of a batch in one block; ``used`` tells tokens from padding, (B, T)."""
        tokens = [_by_pair(part, used).cpu().numpy()[used] for part in (routing.experts, routing.logits)]
        experts, logits = tokens[0], tokens[1].astype(np.float64)
        chance = np.exp(logits - logits.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        first = np.bincount(experts[:, 0], minlength=self.num_experts)
        chosen = np.bincount(experts.ravel(), minlength=self.num_experts)
        found = self._blocks.setdefault(
            (_tower(routing), routing.index), [np.zeros(self.num_experts) for _ in range(3)]
        )
        for total, part in zip(found, (first, chosen, chance.sum(0)), strict=True):
            total += part

    def blocks(self) -> tuple[BlockTrace, ...]:
        """Return the shares of each block."""
        made = []
        for (tower, index), (first, chosen, chance) in self._blocks.items():
            total = first.sum()
            balance = float(self.num_experts * (first * chance).sum() / total**2)
            made.append(
                BlockTrace(tower=tower, index=index, first=first / total, chosen=chosen / total, balance=balance)
            )
        return tuple(made)


def _draw(rows: Int[np.ndarray, " n"], config: TraceConfig) -> Int[np.ndarray, " m"]:
    """Draw the rows of the sample and return them in ascending order."""
    if len(rows) <= config.num_pairs:
        return rows
    draw = np.random.default_rng(config.seed)
    return np.sort(draw.choice(rows, config.num_pairs, replace=False, shuffle=False))


def _read_topics(catalog: Catalog, rows: Int[np.ndarray, " n"], column: str | None) -> dict[int, int]:
    """Return the group of each row; none without a column."""
    if column is None:
        return {}
    values = catalog.read([column], rows)[column]
    if not np.issubdtype(values.dtype, np.integer) or values.ndim != 1:
        raise ModeclipError(
            f"trace.topics: column {column!r} holds {catalog.type_of(column)}, expected an integer for each pair, "
            "such as fine_cluster"
        )
    return dict(zip(rows.tolist(), values.tolist(), strict=True))


def _follow(catalog: Catalog, clip: Clip, rows: Int[np.ndarray, " n"], counts: _Counts) -> Iterator[TracedPair]:
    """Encode some pairs, count what their tokens choose, and yield those whose images can be read."""
    samples, kept, pictures = [sample for block in catalog.samples(rows) for sample in block], [], []
    with strict_pillow():
        for row, sample in zip(rows.tolist(), samples, strict=True):
            try:
                pictures.append(decode_image(sample.read(), catalog.exif))
            except Exception:  # Pillow's decoders raise nearly anything on damaged bytes
                continue
            kept.append((row, sample))
    if not kept:
        return
    images, tokens = clip.images(pictures), clip.tokens([sample.caption for _, sample in kept])
    pieces = clip.pieces(tokens)
    with computing(clip, "32-true") as device:
        encode(clip.model, "image", images.to(device), every_token=True)
        encode(clip.model, "text", tokens.to(device), every_token=True)
    routings = routing_of(clip.model)
    first: dict[Tower, list[np.ndarray]] = {"image": [], "text": []}
    for routing in routings:
        tower = _tower(routing)
        shape = (len(kept), routing.logits.shape[:-1].numel() // len(kept))
        used = np.ones(shape, bool) if tower == "image" else _used(pieces, shape[1])
        counts.add(routing, used)
        first[tower].append(_by_pair(routing.experts, used)[..., 0].cpu().numpy())
    seen = _pictures(clip, images)
    for place, (row, sample) in enumerate(kept):
        image = tuple(block[place] for block in first["image"])
        text = tuple(block[place, : len(pieces[place])] for block in first["text"])
        for block in text:
            for piece, expert in zip(pieces[place], block.tolist(), strict=False):
                counts.words[expert].update(split_words(piece))
        yield TracedPair(
            row=row,
            key=sample.key,
            caption=sample.caption,
            picture=seen[place],
            pieces=tuple(pieces[place]),
            image=image,
            text=text,
            image_share=_share(image, counts.num_experts),
            text_share=_share(text, counts.num_experts),
        )


def _tower(routing: Routing) -> Tower:
    return "image" if routing.tower == "image" else "text"


def _by_pair(values: Tensor, used: np.ndarray) -> Tensor:
    """Return what a block says of its tokens as (B, T, ...), however its tokens lie (Swin: in rows and columns)."""
    return values.reshape(*used.shape, values.shape[-1])


def _used(pieces: Sequence[Sequence[str]], length: int) -> np.ndarray:
    """Return which tokens of captions are no padding, (B, length)."""
    return np.arange(length)[None] < np.array([len(row) for row in pieces])[:, None]


def _share(blocks: Sequence[np.ndarray], num_experts: int) -> Float[np.ndarray, " E"]:
    """Return the share of the tokens of a pair whose first choice each expert is, the mean over blocks."""
    shares = np.array([np.bincount(block, minlength=num_experts) / len(block) for block in blocks])
    mean: np.ndarray = shares.mean(axis=0)
    return mean


def _pictures(clip: Clip, images: Tensor) -> list[Image]:
    """Return a normalised batch as pictures, small enough to keep those of all pairs."""
    import torch
    from PIL import Image

    mean = torch.tensor(clip.model.visual.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(clip.model.visual.image_std).view(1, 3, 1, 1)
    pixels = (images * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
    for picture in pictures:
        picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    return pictures


def _describe_experts(
    names: Sequence[str],
    blocks: Sequence[BlockTrace],
    counts: _Counts,
    pairs: Sequence[TracedPair],
    num_examples: int,
) -> tuple[ExpertTrace, ...]:
    corpus: Counter[str] = Counter()
    for words in counts.words:
        corpus.update(words)
    means = {
        tower: np.mean([block.first for block in blocks if block.tower == tower], axis=0) for tower in ("image", "text")
    }
    found = []
    for number, name in enumerate(names):
        ranked = sorted(pairs, key=lambda pair: -(pair.image_share[number] + pair.text_share[number]))
        distinct = {pair.caption: pair for pair in reversed(ranked)}
        best = [pair for pair in ranked if distinct[pair.caption] is pair and pair.image_share[number] > 0]
        found.append(
            ExpertTrace(
                name=name,
                image=float(means["image"][number]),
                text=float(means["text"][number]),
                words=pick_keywords(counts.words[number], corpus, NUM_WORDS),
                pairs=tuple(best[:num_examples]),
            )
        )
    return tuple(found)


def _find_topics(pairs: Sequence[TracedPair], groups: dict[int, int]) -> tuple[Topic, ...]:
    """Return the topics whose tokens are routed least like those of all pairs, by their size and their distance."""
    words = [set(split_words(pair.caption)) for pair in pairs]
    members: dict[str | int, list[int]] = {}
    for place, pair in enumerate(pairs):
        for topic in [groups[pair.row]] if groups else sorted(words[place]):
            members.setdefault(topic, []).append(place)
    shares = {tower: np.array([getattr(pair, f"{tower}_share") for pair in pairs]) for tower in ("image", "text")}
    corpus = Counter(word for some in words for word in some)
    found = []
    for topic, places in members.items():
        if len(places) < TOPIC_PAIRS or len(places) == len(pairs):
            continue
        name = topic if isinstance(topic, str) else f"group {topic}"
        if not isinstance(topic, str):
            own = Counter(word for place in places for word in words[place])
            name = ", ".join(pick_keywords(own, corpus, TOPIC_WORDS)) or name
        means = {tower: values[places].mean(axis=0) for tower, values in shares.items()}
        distance = sum(float(np.square(means[tower] - values.mean(axis=0)).sum()) for tower, values in shares.items())
        found.append((len(places) * distance, Topic(name=name, num_pairs=len(places), **means)))
    found.sort(key=lambda item: (-item[0], item[1].name))
    return tuple(topic for _, topic in found[:NUM_TOPICS])
