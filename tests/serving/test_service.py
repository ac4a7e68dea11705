"""A real service on a real bundle: its answers against the library's, and what becomes of it when things go wrong."""

from __future__ import annotations

import base64
import gc
import json
import os
import shutil
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from modeclip import MoDE, ModeclipError
from modeclip.search.index import INDEX_FILE, Index
from modeclip.serving import Client
from modeclip.serving.app import create_app
from modeclip.serving.client import ServiceError, _data_url
from modeclip.serving.limits import Limits
from modeclip.serving.service import open_service
from support import encode_picture, noise_picture, transparent_drawing

if TYPE_CHECKING:
    from conftest import Server

pytestmark = pytest.mark.slow
WEB = httpx.Client(timeout=1200, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
CLASSES = ["heart", "arrow left", "home", "star", "circle"]


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encode_picture(picture, kind)).decode()}"


PICTURES = [noise_picture(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def mode(served_run: Path) -> MoDE:
    return MoDE.load(served_run / "bundle")


def test_classes_are_those_of_the_mixture(server: Server, mode: MoDE) -> None:
    for options in (
        {},
        {"rule": "eq6", "templates": ["a {}", "the {} icon"]},
        {"rule": "top1"},
        {"max_experts": 1},
        {"each": True},
        {"templates": ["the {}"], "route_by_prompts": True},
    ):
        answer = server.ask(
            "/classify", images=[data_url(one) for one in PICTURES], classes=CLASSES, top=len(CLASSES), **options
        ).json()
        task = mode.task(CLASSES, **options)
        for found, expected in zip(answer["pictures"], task.classify(PICTURES), strict=True):
            assert [one["name"] for one in found["classes"]] == list(expected.classnames)
            shares = [one["probability"] for one in found["classes"]]
            np.testing.assert_allclose(shares, expected.probabilities, atol=1e-5)
            weights = task.route.class_weights[CLASSES.index(expected.classnames[0])]
            np.testing.assert_allclose(list(found["weights"].values()), weights, atol=1e-9)


def test_weights_and_reasons_are_those_of_the_mixture(server: Server, mode: MoDE) -> None:
    for each in (False, True):
        answer = server.ask("/route", classes=CLASSES, each=each).json()
        route = mode.route(CLASSES, each=each)
        for found, expected in zip(answer["classes"], route.explain(), strict=True):
            assert found["name"] == expected.name
            np.testing.assert_allclose(list(found["weights"].values()), expected.weights, atol=1e-6)
            assert [near["cluster"] for near in found["nearest"]] == [near.index for near in expected.clusters]
            assert found["out_of_domain"] == expected.out_of_domain
        assert answer["entropy"] == pytest.approx(route.entropy, abs=1e-6)


def test_embeddings_multiply_to_the_scores_of_the_mixture(server: Server, mode: MoDE) -> None:
    import torch

    texts = ["red heart", "arrow"]
    answer = server.ask("/v1/embeddings", input=[texts[0], data_url(PICTURES[0]), texts[1]])
    vectors = np.array([one["embedding"] for one in answer.json()["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    task = mode.task(texts, templates=["{}"], each=True)
    with torch.no_grad():
        image = task.encode_image(mode.pool.get(mode.bundle.models[0]).images(PICTURES[:1]), normalize=True).numpy()
        words = task.encode_text(texts, normalize=True).numpy()
    np.testing.assert_allclose(vectors[[0, 2]] @ vectors[1], words @ image[0], atol=1e-5)
    packed = server.ask("/v1/embeddings", input=texts[0], encoding_format="base64", dimensions=1024).json()["data"][0]
    plain = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_allclose(plain[: vectors.shape[1]], vectors[0], atol=1e-6)
    assert len(plain) == 1024
    assert not plain[vectors.shape[1] :].any()


def test_hits_are_those_of_the_index(server: Server, served_run: Path) -> None:
    index = Index.open(served_run / "index")
    answer = server.ask("/search", text="arrow left", count=5, where=["width >= 1"], negatives=["circle"]).json()
    from modeclip.search.query import Query

    found = index.search(Query(text="arrow left", negatives=("circle",)), count=5, where=["width >= 1"])
    assert [hit["key"] for hit in answer["hits"]] == [hit.key for hit in found.hits]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], [hit.score for hit in found.hits], atol=1e-5)
    np.testing.assert_allclose(list(answer["weights"].values()), found.weights, atol=1e-6)
    (picture,) = index.pictures(found.hits[:1])
    served = server.get(answer["hits"][0]["picture"])
    assert served.headers["content-type"].startswith("image/")
    again = server.ask("/search", image=base64.b64encode(served.content).decode(), count=1).json()
    assert again["hits"][0]["score"] == pytest.approx(1, abs=5e-3)
    small = server.get(f"{answer['hits'][0]['picture']}?size=16")
    import io

    assert max(Image.open(io.BytesIO(small.content)).size) == min(16, max(picture.size))


def test_clip_retrieval_and_immich_get_their_shapes(server: Server) -> None:
    (name,) = server.get("/indices-list").json()
    ours = server.ask("/search", text="heart", count=4).json()["hits"]
    theirs = server.ask("/knn-service", text="heart", num_images=2, num_result_ids=4, indice_name=name).json()
    assert [one["id"] for one in theirs] == [hit["number"] for hit in ours]
    assert [set(one) for one in theirs] == [{"id", "similarity", "caption", "image"}] * 2 + [{"id", "similarity"}] * 2
    assert base64.b64decode(theirs[0]["image"])[:4] in {b"\x89PNG", b"\xff\xd8\xff\xe0"}
    facts = server.ask("/metadata", ids=[theirs[1]["id"]], indice_name=name).json()
    assert facts[0]["metadata"]["caption"] == ours[1]["caption"]
    vector = server.ask("/v1/embeddings", input="heart").json()["data"][0]["embedding"]
    by_vector = server.ask("/knn-service", embedding_input=vector, num_images=4).json()
    assert [one["id"] for one in by_vector] == [one["id"] for one in theirs]

    assert server.get("/ping").text == "pong"
    entries = {"clip": {"textual": {"modelName": "ViT-B-32__openai"}}}
    answer = WEB.post(f"{server.url}/predict", data={"entries": json.dumps(entries), "text": "heart"})
    np.testing.assert_allclose(json.loads(answer.json()["clip"]), vector, atol=1e-6)
    entries = {"clip": {"visual": {"modelName": "ViT-B-32__openai", "options": {}}}}
    file = encode_picture(PICTURES[0])
    answer = WEB.post(f"{server.url}/predict", data={"entries": json.dumps(entries)}, files={"image": file}).json()
    assert (answer["imageHeight"], answer["imageWidth"]) == (32, 32)
    expected = server.ask("/v1/embeddings", input=data_url(PICTURES[0])).json()["data"][0]["embedding"]
    np.testing.assert_allclose(json.loads(answer["clip"]), expected, atol=1e-5)


def test_requests_in_flight_are_computed_together_with_the_same_numbers(server: Server) -> None:
    images = [data_url(noise_picture(100 + seed)) for seed in range(48)]

    def classify(image: str) -> list[float]:
        answer = server.ask("/classify", images=[image], classes=CLASSES, top=9).json()["pictures"][0]["classes"]
        return [one["probability"] for one in sorted(answer, key=lambda one: one["name"])]

    alone = [classify(image) for image in images]
    batches, items = (server.counter(f'modeclip_batch{end}_total{{kind="images"}}') for end in ("es", "_items"))
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(classify, images))
    np.testing.assert_allclose(together, alone, atol=1e-5)
    batches = server.counter('modeclip_batches_total{kind="images"}') - batches
    assert server.counter('modeclip_batch_items_total{kind="images"}') - items == len(images)
    assert batches < len(images)


def test_searches_in_flight_share_a_pass_with_the_same_numbers(server: Server) -> None:
    words = ["heart", "arrow left", "home", "star", "circle", "mail"]
    bodies = [{"text": word, "count": count} for word in words for count in (2, 3)] * 3
    alone = [server.ask("/search", **body).json() for body in bodies[: len(bodies) // 3]] * 3
    names = ('modeclip_batches_total{kind="searches"}', 'modeclip_batch_items_total{kind="searches"}')
    before = [server.counter(name) for name in names]
    with ThreadPoolExecutor(24) as pool:
        found = [one.json() for one in pool.map(lambda body: server.ask("/search", **body), bodies)]
    batches, items = (server.counter(name) - then for name, then in zip(names, before, strict=True))
    assert items == len(bodies) > batches
    for one, expected in zip(found, alone, strict=True):
        assert [hit["number"] for hit in one["hits"]] == [hit["number"] for hit in expected["hits"]]
        for hit, other in zip(one["hits"], expected["hits"], strict=True):
            assert hit["score"] == pytest.approx(other["score"], abs=1e-5)
            assert hit["strength"] == pytest.approx(other["strength"], abs=1e-5)


def test_a_list_that_is_asked_again_costs_no_text_pass(server: Server) -> None:
    classes = [f"thing number {number}" for number in range(1000)]
    first = server.ask("/classify", images=[data_url(PICTURES[0])], classes=classes).json()
    counters = [f'modeclip_batch_items_total{{kind="{kind}"}}' for kind in ("texts", "router")]
    before = [server.counter(name) for name in counters]
    assert server.ask("/classify", images=[data_url(PICTURES[0])], classes=classes).json() == first
    assert [server.counter(name) for name in counters] == before


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/classify", {"images": ["https://example.org/a.png"], "classes": ["a"]}, 422, "never fetched"),
        ("/classify", {"images": ["file:///etc/passwd"], "classes": ["a"]}, 422, "never fetched"),
        ("/classify", {"images": ["/etc/passwd"], "classes": ["a"]}, 422, "no base64"),
        ("/classify", {"images": [data_url(PICTURES[0])], "classes": ["a", "a"]}, 422, "'a' stands there twice"),
        ("/classify", {"images": [data_url(PICTURES[0])], "classes": ["a\ud800"]}, 422, "classes"),
        ("/classify", {"images": [data_url(PICTURES[0])], "classes": ["a"], "rule": "best"}, 422, "eq6"),
        ("/classify", {"images": [data_url(PICTURES[0])], "classes": ["a"], "templates": ["b"]}, 422, "{}"),
        ("/classify", {"images": [data_url(PICTURES[0])] * 65, "classes": ["a"]}, 413, "at most 64"),
        ("/classify", {"images": [data_url(PICTURES[0])], "classes": ["a" * 3000]}, 413, "3,000 letters"),
        ("/classify", {"images": [data_url(PICTURES[0])], "clases": ["a"]}, 422, "classes"),
        ("/route", {"classes": [str(number) for number in range(10_001)]}, 413, "at most 10,000"),
        ("/search", {"text": "a", "count": 1001}, 413, "at most 1,000"),
        ("/search", {"text": "a", "where": ["no_column > 3"]}, 422, "no_column"),
        ("/search", {"text": "a", "where": ["1=1; drop table x"]}, 422, "single condition"),
        ("/search", {"text": "a", "index": "other"}, 404, "known: "),
        ("/search", {"text": "a", "expert": "expert-99"}, 422, "expert-0"),
        ("/search", {}, 422, "nothing to look for"),
        ("/v1/embeddings", {"input": "a", "model": "gpt"}, 404, "unknown model 'gpt'"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, 422, "at least that"),
        ("/knn-service", {"image_url": "http://localhost/"}, 422, "never fetched"),
        ("/knn-service", {"embedding_input": [1.0]}, 422, "embedding_input"),
        ("/metadata", {"ids": [-1]}, 404, "from 0 to"),
    ],
)
def test_mistakes_are_answered_in_one_line_that_says_what_to_do(
    server: Server, path: str, body: dict[str, object], status: int, words: str
) -> None:
    answer = WEB.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


def test_paths_keys_hosts_and_origins(
    served_run: Path, tmp_path: Path, start: Callable[..., Server], server: Server
) -> None:
    assert "/openapi.json" in server.get("/nothing").json()["error"]["message"]
    assert server.get("/classify").status_code == 405
    foreign = {"host": "rebound.example"}
    assert WEB.get(f"{server.url}/health", headers=foreign).status_code == 403
    page = {"origin": "https://example.org"}
    refused = WEB.post(f"{server.url}/route", json={"classes": ["a"]}, headers=page)
    assert refused.status_code == 403
    assert "--allow-origin https://example.org" in refused.text
    assert "access-control-allow-origin" not in WEB.get(f"{server.url}/models", headers=page).headers

    (tmp_path / "key").write_text("secret-secret\n")
    words = ("--api-key-file", tmp_path / "key", "--allow-origin", "https://example.org", "--max-waiting", 1)
    closed = start(served_run / "bundle", *words)
    assert closed.get("/models").status_code == 401
    assert closed.get("/ready").status_code == 200
    for headers in ({"authorization": "Bearer secret-secret"}, {"x-api-key": "secret-secret"}):
        answer = WEB.get(f"{closed.url}/models", headers={**headers, **page})
        assert answer.json()["data"][0]["indexes"] == {}
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        found = WEB.post(f"{closed.url}/search", json={"text": "a"}, headers=headers)
        assert (found.status_code, "--index" in found.text) == (409, True)
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert WEB.options(f"{closed.url}/route", headers=asked).status_code == 200
    # one request may be under way: while it is, others are told to come again, and a slow sender is none of them
    headers, many = {"x-api-key": "secret-secret"}, {"classes": [f"{number} things" for number in range(3000)]}

    def until_let_in(asked: dict[str, list[str]]) -> httpx.Response:  # those who look below may be under way as well
        while (answer := WEB.post(f"{closed.url}/route", json=asked, headers=headers)).status_code == 429:
            pass
        return answer

    with socket.create_connection(("127.0.0.1", closed.port)) as slow, ThreadPoolExecutor(1) as pool:
        slow.sendall(
            b"POST /route HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: secret-secret\r\ncontent-length: 99\r\n\r\n{"
        )
        assert WEB.get(f"{closed.url}/models", headers=headers).status_code == 200
        for number in range(20):  # until one is met while it is under way
            more = {"classes": [f"{number} {name}" for name in many["classes"]]}
            under_way = pool.submit(until_let_in, more)
            while (busy := WEB.get(f"{closed.url}/models", headers=headers)).status_code == 200:
                if under_way.done():
                    break
            if busy.status_code != 200:
                break
            assert under_way.result().status_code == 200
        assert busy.status_code == 429
        assert int(busy.headers["retry-after"]) >= 1
        assert under_way.result().status_code == 200
    code, errors = closed.end()
    assert code == 0
    assert "secret-secret" not in errors


def test_a_service_from_its_first_start_to_its_end(
    served_run: Path,
    tmp_path: Path,
    start: Callable[..., Server],
    modeclip_command: Callable[..., CompletedProcess[str]],
) -> None:
    """It is killed, starts again, reloads what changes, goes on without what is gone, and drains."""
    run = Path(shutil.copytree(served_run, tmp_path / "run"))
    first = start(run, "--max-memory", 0.01)  # experts are loaded when they are asked for
    index = run / "index" / INDEX_FILE
    assert first.counter("modeclip_models") <= 1
    weights = first.ask("/search", text="heart", count=3).json()["weights"]
    assert sum(weight > 0 for weight in weights.values()) == 1  # as many experts as fit
    busy = [threading.Thread(target=_ask_in_vain, args=(first,)) for _ in range(4)]
    for thread in busy:
        thread.start()
    first.process.kill()
    for thread in busy:
        thread.join()

    service = start(run)
    found = Index.open(run / "index").search("heart", count=3)
    hits = service.ask("/search", text="heart", count=3).json()["hits"]
    assert [hit["number"] for hit in hits] == [hit.number for hit in found.hits]
    manifest, hidden = run / "bundle" / "mode.json", run / "gone.json"
    content = json.loads(manifest.read_text())
    routed = service.ask("/route", classes=CLASSES).json()

    def wait(path: str, is_so: Callable[[dict[str, object]], object]) -> None:
        end = time.monotonic() + 300
        while not is_so(service.get(path).json()):
            assert time.monotonic() < end, service.get(path).text
            time.sleep(0.05)

    manifest.rename(hidden)
    wait("/health", lambda health: "mode.json" in str(health["trouble"]))
    assert service.ask("/route", classes=CLASSES).json() == routed
    content["rule"] = "uniform"
    hidden.write_text(json.dumps(content))
    hidden.rename(manifest)
    wait("/models", lambda models: models["data"][0]["routing"]["rule"] == "uniform")  # type: ignore[index]
    assert service.get("/health").json()["trouble"] == ""
    assert service.ask("/route", classes=CLASSES).json()["rule"] == "uniform"
    # an index of another model: the service goes on with what it has, and says which hashes differ
    whole = index.read_text()
    index.write_text(whole.replace(json.loads(whole)["model"]["digests"][0], "0" * 64))
    wait("/health", lambda health: "has the hash" in str(health["trouble"]))
    assert service.ask("/search", text="heart", count=1).status_code == 200
    done = modeclip_command("serve", run / "bundle", "--index", run / "index", "--port", 0)  # a run builds its own anew
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has the hash" in done.stderr
    assert "expected 000000000000" in done.stderr
    index.write_text(whole)
    wait("/health", lambda health: health["trouble"] == "")
    # what is under way is answered before the end
    classes = [f"{number} things" for number in range(2000)]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.ask, "/route", classes=classes)
        while service.counter("modeclip_requests_in_flight") < 2:  # this one, and the question
            assert not answer.done()
        os.kill(service.process.pid, signal.SIGTERM)
        assert len(answer.result().json()["classes"]) == len(classes)
    code, errors = service.end()
    assert code == 0
    assert "under way is answered" in errors
    assert "Traceback" not in errors


@pytest.fixture
def indexed(small_run: Path, made_once: Callable[..., Path], tmp_path: Path) -> Path:
    """A run with its index, served in this process before, that may be changed."""

    def fill(out: Path) -> None:
        shutil.copytree(small_run, out)
        open_service(out).close()

    return Path(shutil.copytree(made_once("indexed", fill), tmp_path / "run"))


@pytest.mark.parametrize("is_outdated", [False, True])
def test_a_run_is_served_where_it_was_moved(indexed: Path, tmp_path: Path, is_outdated: bool) -> None:
    index = indexed / "index" / INDEX_FILE
    content = json.loads(index.read_text())
    if is_outdated:
        content["model"]["digests"][0] = "0" * 64
        index.write_text(json.dumps(content))
    moved = indexed.rename(tmp_path / "moved")
    service = open_service(moved)
    assert service.indexes["moved"].catalogs == [str(moved / "catalog.lance")]
    answer = TestClient(create_app(service, look=False)).get("/pictures/moved/5?size=64")
    assert answer.status_code == 200, answer.text
    service.close()


def test_the_model_before_is_let_go(indexed: Path) -> None:
    """Also the first, which the collector leaves alone, and one that a request asks while it is replaced."""
    service = open_service(indexed, limits=Limits(timeout_seconds=1e-3))
    before = weakref.ref(service.answers)
    gc.collect()
    gc.freeze()
    assert service.reload()
    assert before() is None
    assert gc.get_freeze_count() > 0
    asked = service.answers
    before = weakref.ref(asked)
    assert service.reload()
    assert before() is asked
    del asked
    assert not service.reload(always=False)
    assert before() is None
    service.close()


def test_what_is_damaged_is_said_and_mended(indexed: Path) -> None:
    service = open_service(indexed)
    note = indexed / "index" / INDEX_FILE
    rows = max((indexed / "index" / "images.lance" / "data").iterdir(), key=lambda path: path.stat().st_size)
    whole, whole_rows = note.read_text(), rows.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole_rows) - 2100)
    damages = {
        "heights": (json.dumps(json.loads(whole) | {"heights": [0.0]}), whole_rows),
        "config": (json.dumps(json.loads(whole) | {"config": {"exact": 1}}), whole_rows),
        "images.lance": (whole, whole_rows[: len(whole_rows) // 2]),
        "": (whole, whole_rows[:100] + noise + whole_rows[-2000:]),
    }
    for words, (text, content) in damages.items():
        rows.write_bytes(content)
        note.write_text(f"{text} ")
        assert not service.reload(always=False)
        assert service.trouble
        assert words in service.trouble
        assert "\n" not in service.trouble
        rows.write_bytes(whole_rows)
        note.write_text(whole)
        assert service.reload(always=False)
        assert service.trouble == ""
    service.close()


def test_a_tag_is_that_of_one_picture(indexed: Path) -> None:
    def ask(tag: str = "", number: int = 5) -> httpx.Response:
        service = open_service(indexed)
        client = TestClient(create_app(service, look=False))
        answer = client.get(f"/pictures/run/{number}?size=64", headers={"if-none-match": tag} if tag else {})
        service.close()
        return answer

    first = ask()
    assert ask(first.headers["etag"]).status_code == 304
    index = Index.open(indexed / "index")
    index.remove([f"key = '{index.read([2], ['key'])[0]['key']}'"])
    other = ask(first.headers["etag"])
    assert other.status_code == 200
    assert other.content != first.content
    assert ask(first.headers["etag"], 4).status_code == 304


def test_prompts_of_the_model_count_and_addresses_of_this_machine_are_its_own(small_run: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_run / "bundle", tmp_path / "bundle"))
    manifest = bundle / "mode.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"templates": ["a {}", "one {}", "{}"]}))
    app = create_app(open_service(bundle, limits=Limits(max_classes=30)), look=False, is_local=True)
    client = TestClient(app, base_url="http://127.0.1.1")
    for number, status in ((10, 200), (20, 413)):
        body = {"images": [data_url(PICTURES[0])], "classes": [f"thing {place}" for place in range(number)]}
        assert client.post("/classify", json=body).status_code == status
        assert client.post("/route", json={"classes": body["classes"]}).status_code == 200  # routed by names alone
    assert TestClient(app, base_url="http://rebound.example").get("/health").status_code == 403


def _ask_in_vain(service: Server) -> None:
    with suppress(httpx.TransportError):
        service.ask("/route", classes=CLASSES)


def test_what_cannot_be_served_is_one_line(
    served_run: Path, server: Server, tmp_path: Path, modeclip_command: Callable[..., CompletedProcess[str]]
) -> None:
    half = tmp_path / "half"
    (half / "images.lance").mkdir(parents=True)
    (tmp_path / "short").write_text("abc")
    bundle = served_run / "bundle"
    for words, expected in [
        ((bundle, "--port", server.port), "another process listens there"),
        ((tmp_path / "no-bundle", "--port", 0), "no-bundle"),
        ((bundle, "--index", half, "--port", 0), "half built"),
        ((bundle, "--index", tmp_path / "none", "--port", 0), "no index at"),
        ((bundle, "--host", "192.0.2.1", "--port", 0), "--host"),
        ((bundle, "--port", 99_999), "--port"),
        ((bundle, "--port", 0, "--max-memory", 1e-6), "memory"),
        ((bundle, "--port", 0, "--dimension", 3), "--dimension"),
        ((bundle, "--port", 0, "--api-key-file", tmp_path / "short"), "8 or more"),
        ((bundle, "--port", 0, "--api-key-file", tmp_path / "nokey"), "nokey"),
        ((bundle, "--max-bytes", 0), "--max-bytes"),
        ((bundle, "--timeout-seconds", 0), "--timeout-seconds"),
    ]:
        done = modeclip_command("serve", *words)
        assert done.returncode == 2, words
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("modeclip: error: ")
        assert expected in done.stderr, done.stderr


def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, modeclip_command: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    from modeclip.commands import serving

    monkeypatch.setattr(serving, "NEEDED", ("no_such_package",))
    done = modeclip_command("serve", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'pip install "modeclip[serve]"' in done.stderr


def test_a_client_sends_what_is_transparent_as_white() -> None:
    drawing, expected = transparent_drawing()
    assert _data_url(drawing) == _data_url(expected)


def test_a_client_has_the_methods_of_the_mixture(server: Server, mode: MoDE, served_run: Path) -> None:
    with Client.load(server.url, timeout=1200.0) as client:
        own = {name for name in vars(MoDE) if not name.startswith("_")}
        assert own <= set(dir(client))
        assert client.per_image == mode.per_image
        assert client.experts == tuple(expert.name for expert in mode.bundle.experts)
        assert client.request(rule="eq6", each=True) == mode.request(rule="eq6", each=True)
        route, expected = client.route(CLASSES, each=True), mode.route(CLASSES, each=True)
        np.testing.assert_allclose(route.class_weights, expected.class_weights, atol=1e-6)
        for reason, other in zip(route.explain(), expected.explain(), strict=True):
            assert (reason.name, reason.out_of_domain) == (other.name, other.out_of_domain)
            assert [near.index for near in reason.clusters] == [near.index for near in other.clusters]
            assert [near.expert for near in reason.clusters] == [near.expert for near in other.clusters]
        np.testing.assert_allclose(client.route_queries(CLASSES), mode.route_queries(CLASSES), atol=1e-6)
        task, local = client.task(CLASSES, templates=["a {}"]), mode.task(CLASSES, templates=["a {}"])
        for found, other in zip(task.classify(PICTURES), local.classify(PICTURES), strict=True):
            assert found.classnames == other.classnames
            np.testing.assert_allclose(found.probabilities, other.probabilities, atol=1e-5)
        np.testing.assert_allclose(task.weights, local.route.class_weights, atol=1e-6)
        scores = task.encode_image(PICTURES[:2]) @ task.encode_text(["heart"]).T
        assert scores.shape == (2, 1)
        index = Index.open(served_run / "index")
        found, other = client.search("arrow", count=3), index.search("arrow", count=3)
        assert [hit.key for hit in found.hits] == [hit.key for hit in other.hits]
        assert found.experts == other.experts
        (name,) = client.facts["indexes"]
        (picture,) = index.pictures(other.hits[:1])
        assert np.array_equal(np.asarray(client.picture(name, found.hits[0].number)), np.asarray(picture))
        with pytest.raises(ServiceError, match=r"known: .*eq6") as refused:
            client.route(CLASSES, rule="best")
        assert refused.value.status == 422
        with pytest.raises(ServiceError, match="not of images"):
            client.route_images(PICTURES)
    with pytest.raises(ServiceError, match="is modeclip serve running"), Client("http://127.0.0.1:9") as nobody:
        nobody.route(["a"])
    with pytest.raises(ModeclipError, match="expected an address"):
        Client("localhost")
