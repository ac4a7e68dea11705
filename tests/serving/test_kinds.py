"""What a service answers with a CLIP-MoE, experts that share a trunk, and clusters of images: what Python answers."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from modeclip import MoDE, ModeclipError
from modeclip.data.catalog import Catalog
from modeclip.mixture.bundle import save_bundle
from modeclip.models.clip import encode_image, encode_text, load_clip, save_clip
from modeclip.models.encoders import load_any_encoder
from modeclip.search.index import Index
from modeclip.serving import Client
from modeclip.serving.app import create_app
from modeclip.serving.client import ServiceError
from modeclip.serving.service import open_service
from support import encode_picture, make_clip_moe, noise_picture, unit_rows

CLASSES = ["heart", "arrow", "home"]
PICTURES = [noise_picture(number).resize((40, 30)) for number in range(3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"rule": "eq6"},
    {"rule": "top1"},
    {"max_experts": 1},
    {"temperature": 0.5},
    {"templates": ["a {}"]},
]
load_encoder = cache(load_any_encoder)


def client_of(model: Path, *indexes: Path | str) -> Client:
    """A client of a service in this process."""
    client = Client("http://testserver")
    client._http = TestClient(create_app(open_service(model, indexes=indexes), look=False))
    return client


def save_expert(folder: Path, seed: int) -> Path:
    """A model folder: a random model, whose feed-forward layers depend on the seed."""
    clip, draw = load_clip("modeclip-icon-xxxs", seed=0), torch.Generator().manual_seed(seed)
    for name, value in clip.model.state_dict().items():
        if re.match(r".*\.mlp\..*", name):
            value += 0.1 * torch.randn(value.shape, generator=draw)
    save_clip(clip, folder)
    return folder


@pytest.fixture(scope="module", params=["captions", "images"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that are stored as what differs from their seed, with clusters of captions or of images."""
    root = tmp_path_factory.mktemp(request.param)
    models = {name: save_expert(root / name, seed) for seed, name in enumerate(["seed", "expert-0", "expert-1"])}
    encoder, centers = "minilm", unit_rows(4, 384)
    if request.param == "images":
        encoder = f"clip-image:{models['seed']}"
        images = [encode_picture(noise_picture(number)) for number in range(4)]
        centers = load_encoder(encoder).encode_pairs([""] * 4, images)  # type: ignore[union-attr]
    fine = [{"index": index, "size": 9, "keywords": ["a"], "nearest_captions": ["a"]} for index in range(4)]
    save_bundle(
        root / "bundle",
        models=models,
        fine_centers=centers,
        expert_of_fine=np.repeat(np.arange(2), 2),
        cards={"fine": fine, "experts": [{"index": index, "size": 9, "keywords": ["a"]} for index in range(2)]},
        manifest={
            "name": "test",
            "encoder": encoder,
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}", "a {}."],
            "lineage": {},
        },
    )
    assert (root / "bundle" / "expert-1" / "delta.safetensors").is_file()
    return root / "bundle"


def test_a_bundle_answers_as_its_mixture(bundle: Path, icons_copy: Catalog, tmp_path: Path) -> None:
    mode = MoDE.load(bundle)
    index = Index.build(icons_copy, bundle, tmp_path / "index", selection=_few(icons_copy))
    client = client_of(bundle, index.folder)
    assert client.per_image == mode.per_image
    for options in OPTIONS:
        task = mode.task(CLASSES, **options)
        for found, expected in zip(
            client.task(CLASSES, **options).classify(PICTURES), task.classify(PICTURES), strict=True
        ):
            assert found.classnames == expected.classnames, options
            np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5, err_msg=str(options))
    with pytest.raises(ServiceError, match=r"known: .*eq6"):
        client.task(CLASSES, rule="best").classify(PICTURES)
    task = mode.task(CLASSES, each=not mode.per_image)
    batch = torch.stack([task.preprocess(one) for one in PICTURES])
    with torch.no_grad():
        expected = task.encode_image(batch, True) @ task.encode_text(CLASSES, True).T
    np.testing.assert_allclose(client.embed(PICTURES) @ client.embed(CLASSES).T, expected.numpy(), atol=1e-5)
    if mode.per_image:
        for options in OPTIONS[:4]:
            np.testing.assert_allclose(
                client.route_images(PICTURES, **options), mode.route_images(PICTURES, **options), atol=1e-5
            )
    else:
        np.testing.assert_allclose(client.route_queries(CLASSES), mode.route_queries(CLASSES), atol=1e-5)
    found, other = client.search("heart", image=PICTURES[0], count=5), index.search("heart", count=5)
    assert len(found.hits) == 5
    found = client.search("heart", count=5)
    assert [hit.key for hit in found.hits] == [hit.key for hit in other.hits]
    np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in other.hits], atol=1e-5)
    if mode.per_image:  # the rows hold the weights of their images
        manifest = json.loads((bundle / "mode.json").read_text())
        (bundle / "mode.json").write_text(json.dumps(manifest | {"temperature": 0.2}))
        with pytest.raises(ModeclipError, match="build the index again in another folder"):
            Index.open(index.folder)
        (bundle / "mode.json").write_text(json.dumps(manifest))


def _few(catalog: Catalog) -> Any:
    from modeclip.data.selection import Selection

    keys = catalog.read(["key"], np.arange(12))["key"]
    return Selection(where=(f"key IN ({', '.join(repr(str(key)) for key in keys)})",))


def test_a_clip_moe_answers_as_one_model(tmp_path: Path) -> None:
    folder = make_clip_moe(tmp_path / "moe", num_experts=2)
    client, clip = client_of(folder), load_clip(folder)
    with torch.no_grad():
        images = encode_image(clip.model, clip.images(PICTURES))
        texts = encode_text(clip.model, clip.tokens(CLASSES))
        expected = (clip.model.logit_scale.exp() * images @ texts.T).softmax(dim=-1)
    np.testing.assert_allclose(client.embed(PICTURES), images.numpy(), atol=1e-5)
    np.testing.assert_allclose(client.embed(CLASSES), texts.numpy(), atol=1e-5)
    for found, row in zip(client.task(CLASSES).classify(PICTURES), expected.tolist(), strict=True):
        shares = dict(zip(found.classnames, found.probabilities, strict=True))
        np.testing.assert_allclose([shares[name] for name in CLASSES], row, atol=1e-5)
    with pytest.raises(ServiceError, match="nothing to route to; serve a bundle"):
        client.route(CLASSES)
