"""A client of the service, with the methods of `modeclip.mixture.mode.MoDE`: what asks a mixture can ask a service.

`Client.task` returns what `MoDE.task` does as far as pictures and texts are concerned: it classifies, and encodes into
vectors of unit norm whose product is the mixture's score. Nothing of PyTorch is loaded, and no model.

Price: a request for each call; pictures travel as PNG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from modeclip.data.images import to_rgb
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import RoutingConfig
from modeclip.mixture.explain import ClassReason, NearCluster
from modeclip.mixture.router import RouteRequest
from modeclip.search.query import Found, Hit

if TYPE_CHECKING:
    from PIL.Image import Image


class ServiceError(ModeclipError):
    """The service does not answer, or has refused a request; ``status`` is HTTP's, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedRoute:
    """The experts' weights for a task, with the reasons, as `modeclip.mixture.router.Route` has them."""

    classnames: tuple[str, ...]
    """Class names in the order of the task."""
    rule: str
    """Name of the formula."""
    temperature: float
    """Temperature of the rule."""
    class_weights: Float[np.ndarray, "L K"]
    """Weight of each expert for each class."""
    entropy: float
    """Entropy of the weights in nats."""
    members: tuple[str, ...]
    """Names of the experts, in the order of the weights."""
    reasons: tuple[ClassReason, ...]
    """Why each class has its weights."""

    def explain(self) -> list[ClassReason]:
        """Say for each class which fine clusters lie nearest, what they are about and whose they are."""
        return list(self.reasons)


@dataclass(frozen=True, kw_only=True)
class ServedPrediction:
    """The classes of one picture, most probable first."""

    classnames: tuple[str, ...]
    """Class names, the most probable first."""
    probabilities: tuple[float, ...]
    """Probability of each."""
    weights: Mapping[str, float]
    """Weight of each expert for the first class."""


class Client:
    """Asks a service that `modeclip serve` has started. Threads may share it."""

    def __init__(self, url: str = "http://127.0.0.1:8080", *, key: str | None = None, timeout: float = 60.0) -> None:
        """Keep the address; nothing is asked yet.

        Args:
            url: Of the service.
            key: API key, if the service wants one.
            timeout: Seconds that an answer may take.

        Raises:
            ModeclipError: The address is none.
        """
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ModeclipError(f"service {url!r}: expected an address such as http://127.0.0.1:8080")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    @classmethod
    def load(cls, url: str, *, key: str | None = None, timeout: float = 60.0) -> Client:
        """Open a service, and find out whether it answers; arguments as for the class.

        Raises:
            ServiceError: There is none, or the key is wrong.
        """
        client = cls(url, key=key, timeout=timeout)
        _ = client.facts
        return client

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What ``/models`` says of the model, when it is first asked."""
        found: dict[str, Any] = self._ask("GET", "/models")["data"][0]
        return found

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.facts["experts"])

    @property
    def per_image(self) -> bool:
        """Whether the clusters are of images, so that every image has weights of its own."""
        return bool(self.facts["per_image"])

    def request(
        self,
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
        templates: Sequence[str] | None = None,
    ) -> RouteRequest:
        """Fill in what is not given, as `MoDE.request` does, by what the service says of itself.

        Raises:
            ModeclipError: It serves one model, the rule is unknown, or the budget is below 1.
        """
        own = self.facts["routing"]
        if own is None:
            raise ModeclipError(f"service {self.url}: {self.facts['id']} is one model, with nothing to route to")
        return RouteRequest.of(
            RoutingConfig(rule=own["rule"], temperature=own["temperature"], templates=tuple(own["templates"])),
            rule=rule,
            temperature=temperature,
            max_experts=own["max_experts"] if max_experts is None else max_experts,
            each=each,
            templates=templates,
        )

    def route(
        self,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
    ) -> ServedRoute:
        """Weigh the experts for a task; arguments as for `MoDE.route`.

        Raises:
            ServiceError: The service does not answer, or refuses.
        """
        request = _given(templates=templates, rule=rule, temperature=temperature, max_experts=max_experts)
        return _route(self._ask("POST", "/route", {"classes": list(classnames), "each": each, **request}))

    def route_queries(
        self, texts: Sequence[str], *, rule: str | None = None, temperature: float | None = None
    ) -> Float[np.ndarray, "L K"]:
        """Weigh the experts for every text by itself; arguments as for `MoDE.route_queries`."""
        return self.route(texts, rule=rule, temperature=temperature, each=True).class_weights

    def route_images(
        self,
        pictures: Sequence[Image],
        *,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
    ) -> Float[np.ndarray, "N K"]:
        """Weigh the experts for every picture by itself; arguments as for `MoDE.route_images`."""
        request = _given(rule=rule, temperature=temperature, max_experts=max_experts)
        body = {"images": [_data_url(one) for one in pictures], **request}
        return _route(self._ask("POST", "/route-images", body)).class_weights

    def task(
        self,
        classnames: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        route_by_prompts: bool = False,
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
    ) -> ServedTask:
        """Return the one CLIP that the mixture is for these classes; arguments as for `MoDE.task`."""
        request = _given(templates=templates, rule=rule, temperature=temperature, max_experts=max_experts)
        request |= {"each": each, "route_by_prompts": route_by_prompts}
        return ServedTask(self, tuple(classnames), request)

    def embed(self, inputs: Sequence[str | Image]) -> Float[np.ndarray, "N E"]:
        """Return texts, each routed by itself, and pictures as vectors of unit norm."""
        sent = [one if isinstance(one, str) else _data_url(one) for one in inputs]
        body = {"input": sent, "encoding_format": "base64"}
        rows = [
            np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
            for one in self._ask("POST", "/v1/embeddings", body)["data"]
        ]
        return np.stack(rows)

    def search(
        self,
        text: str | None = None,
        *,
        image: Image | None = None,
        index: str | None = None,
        count: int = 10,
        where: Sequence[str] = (),
        **options: Any,
    ) -> Found:
        """Find images, as `modeclip.search.index.Index.search` does.

        Args:
            text: Words that the images should fit.
            image: A picture that they should resemble.
            index: Name of the index; None: the first.
            count: Images that are wanted.
            where: Conditions that they must fulfil.
            **options: The other fields of a query and of a search, such as ``negatives`` and ``hybrid``.
        """
        body = _given(text=text, index=index, image=None if image is None else _data_url(image))
        answer = self._ask("POST", "/search", {**body, "count": count, "where": list(where), **options})
        experts = tuple(answer["weights"])
        hits = [
            Hit(
                **{key: value for key, value in hit.items() if key not in {"parts", "picture"}},
                parts=tuple(hit["parts"].values()),
                catalog=f"{self.url}{hit['picture']}",
                row=hit["number"],
            )
            for hit in answer["hits"]
        ]
        return Found(
            hits=tuple(hits),
            weights=tuple(answer["weights"].values()),
            experts=experts,
            num_searched=answer["num_searched"],
            exact=answer["exact"],
        )

    def picture(self, index: str, number: int) -> Image:
        """Return a picture of an index."""
        from urllib.parse import quote

        from modeclip.data.images import decode_image

        return decode_image(self._send("GET", f"/pictures/{quote(index, safe='')}/{number}").content)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._send(method, path, body).json()

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        import httpx

        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ServiceError(f"service {self.url} does not answer ({reason}); is modeclip serve running?") from None
        if answer.is_success:
            return answer
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{path} was answered with {answer.status_code}; is it modeclip serve that listens there?"
        seconds = answer.headers.get("retry-after", "")
        raise ServiceError(
            f"service {self.url}: {message}",
            answer.status_code,
            retry_after=float(seconds) if seconds.isdigit() else None,
        )


class ServedTask:
    """A mixture routed to one task, at a service."""

    def __init__(self, client: Client, classnames: tuple[str, ...], request: Mapping[str, Any]) -> None:
        self.classnames = classnames
        self._client, self._request = client, dict(request)

    @cached_property
    def route(self) -> ServedRoute:
        """How the task was routed."""
        request = dict(self._request)
        templates, by_prompts = request.pop("templates", None), request.pop("route_by_prompts")
        if by_prompts and templates is None:
            templates = self._client.facts["routing"]["templates"]
        return self._client.route(self.classnames, templates=templates if by_prompts else None, **request)

    @property
    def weights(self) -> Float[np.ndarray, "L K"]:
        """Weight of each expert for each class."""
        return self.route.class_weights

    def explain(self) -> list[ClassReason]:
        """Say for each class which clusters lie nearest and what weights that gave."""
        return self.route.explain()

    def classify(self, images: Sequence[Image]) -> list[ServedPrediction]:
        """Name the class of each picture, as `RoutedClip.classify` does."""
        if not len(images):
            return []
        body = {
            "images": [_data_url(one) for one in images],
            "classes": list(self.classnames),
            "top": len(self.classnames),
            **self._request,
        }
        return [
            ServedPrediction(
                classnames=tuple(one["name"] for one in found["classes"]),
                probabilities=tuple(one["probability"] for one in found["classes"]),
                weights=found["weights"],
            )
            for found in self._client._ask("POST", "/classify", body)["pictures"]
        ]

    def encode_image(self, images: Sequence[Image]) -> Float[np.ndarray, "N E"]:
        """Return vectors of unit norm, which fit any task."""
        return self._client.embed(images)

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Return vectors of unit norm of texts, each routed by itself."""
        return self._client.embed(texts)


def _given(**values: Any) -> dict[str, Any]:
    """Return what is given, as JSON has it."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }


def _data_url(picture: Image) -> str:
    file = io.BytesIO()
    to_rgb(picture).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _route(answer: Mapping[str, Any]) -> ServedRoute:
    classes = answer["classes"]
    members = tuple(classes[0]["weights"])
    reasons = tuple(
        ClassReason(
            name=one["name"],
            weights=tuple(one["weights"].values()),
            clusters=tuple(
                NearCluster(
                    index=near["cluster"],
                    distance=near["distance"],
                    expert=members.index(near["expert"]),
                    captions=tuple(near["captions"]),
                )
                for near in one["nearest"]
            ),
            out_of_domain=one["out_of_domain"],
            distance=one["distance"],
            quantile=one["quantile"],
        )
        for one in classes
    )
    return ServedRoute(
        classnames=tuple(one["name"] for one in classes),
        rule=answer["rule"],
        temperature=answer["temperature"],
        class_weights=np.array([reason.weights for reason in reasons]),
        entropy=answer["entropy"],
        members=members,
        reasons=reasons,
    )
