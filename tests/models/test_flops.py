from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeclip.errors import ModeclipError
from modeclip.models.clip import encode_image, encode_text, load_clip
from modeclip.models.flops import count_flops


def by_hand(layers: int, width: int, tokens: int) -> int:
    """Count the products of a transformer: four projections, an MLP of four times the width, and attention."""
    projections = 4 * 2 * tokens * width**2
    mlp = 2 * 2 * tokens * width * 4 * width
    attention = 2 * 2 * tokens**2 * width
    return layers * (projections + mlp + attention)


@pytest.mark.parametrize("length", [5, 24])
def test_a_transformer_is_counted_as_by_hand(length: int) -> None:
    flops = count_flops("modeclip-icon", length)
    patches = 2 * 16 * (3 * 8 * 8) * 128
    assert flops.image == patches + by_hand(4, 128, 17) + 2 * 128 * 128
    assert flops.text == by_hand(3, 128, length) + 2 * 128 * 128
    assert flops.forward == flops.image + flops.text


def test_full_context_is_the_default() -> None:
    assert count_flops("modeclip-icon-xs") == count_flops("modeclip-icon-xs", 24)


@pytest.mark.parametrize("spec", ["modeclip-icon", "modeclip-icon-s"])
def test_a_training_step_costs_three_forward_passes(spec: str) -> None:
    """What the counter sees in a real step, loss and backward pass included, is what we say to a few percent."""
    clip = load_clip(spec, seed=0)
    batch, length = 4, 9
    tokens = torch.zeros(batch, 24, dtype=torch.long)
    tokens[:, :length] = torch.randint(1, 49408, (batch, length))
    images = torch.randn(batch, 3, 32, 32)
    clip.model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = 100 * encode_image(clip.model, images) @ encode_text(clip.model, tokens).T
        torch.nn.functional.cross_entropy(logits, torch.arange(batch)).backward()
    counted = counter.get_total_flops() / batch
    # The first convolution has no gradient for its pixels: that is the difference.
    assert counted == pytest.approx(count_flops(spec, length).training, rel=0.04)
    assert counted <= count_flops(spec, length).training + 3 * 2 * batch * 128


@pytest.mark.parametrize("length", [5, 24])
def test_what_is_frozen_costs_no_backward_pass(length: int) -> None:
    """By hand: of the last block both products of each, of a block behind something trained the inputs' product."""
    whole, last = count_flops("modeclip-icon", length), count_flops("modeclip-icon", length, trainable="last:1")
    heads = 2 * 2 * 128 * 128
    products = {tokens: by_hand(1, 128, tokens) for tokens in (17, length)}
    assert last.forward == whole.forward
    assert last.backward == 2 * (sum(products.values()) + heads)  # its first norm trains too, behind the trunk
    ffn = count_flops("modeclip-icon", length, trainable="ffn")
    attention = {tokens: 2 * 2 * tokens**2 * 128 for tokens in products}
    backward = heads
    for layers, tokens in ((4, 17), (3, length)):
        mlp = 16 * tokens * 128**2
        behind = 8 * tokens * 128**2 + 2 * attention[tokens]  # attention of a later block: for its input alone
        backward += layers * 2 * mlp - mlp // 2 + (layers - 1) * behind
    assert ffn.backward == backward


def test_known_models_cost_what_is_published() -> None:
    """4.4 billion multiply-adds of a ViT-B/32 at 224 pixels."""
    assert count_flops("ViT-B-32", 10).image / 2e9 == pytest.approx(4.4, rel=0.02)


def test_a_pretrained_tag_is_not_loaded() -> None:
    assert count_flops("modeclip-icon-xs@laion2b_s34b_b79k", 8) == count_flops("modeclip-icon-xs", 8)


@pytest.mark.parametrize("length", [1, 25])
def test_a_caption_that_no_model_reads_is_one_line(length: int) -> None:
    with pytest.raises(ModeclipError, match=f"length: .*2 to 24 .*modeclip-icon, got {length}$"):
        count_flops("modeclip-icon", length)
