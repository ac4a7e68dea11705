"""What requests and responses of the service look like, for FastAPI and its OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAIklEQVR42i3GsQEAMAwCIOL/P9uhMn"
    "EKpLfYYosttth+9B4oSggPofwfxwAAAABJRU5ErkJggg=="
)
"""A PNG of 8 by 8 pixels with a line, for examples."""


WEIGHTS = {"expert-0": 0.08, "expert-1": 0.92}


def _example(**content: Any) -> ConfigDict:
    """Return the settings of a shape that shows an example of itself."""
    return ConfigDict(json_schema_extra={"examples": [content]})


class Shape(BaseModel):
    """A request: unknown fields are refused, so that a typo is not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Routed(Shape):
    """A request whose experts are weighed by a rule."""

    rule: str | None = Field(default=None, examples=["per_class"], description="Routing rule; null: the bundle's.")
    temperature: float | None = Field(
        default=None, ge=1e-6, le=1e6, description="Temperature of the rule; null: its own."
    )
    max_experts: int | None = Field(default=None, ge=1, description="Experts that may have weight; null: all.")

    def routing(self) -> dict[str, Any]:
        """Return the rule's settings as arguments of `MoDE.request`."""
        return {"rule": self.rule, "temperature": self.temperature, "max_experts": self.max_experts}


class ClassifyRequest(Routed):
    """Pictures and the classes that they may show."""

    model_config = _example(images=[PICTURE], classes=["heart", "home", "star"], top=3)

    images: list[str] = Field(min_length=1, examples=[[PICTURE]], description="Pictures in base64, or as data URLs.")
    classes: list[str] = Field(min_length=1, examples=[["heart", "home", "star"]])
    templates: list[str] = Field(
        default=[], examples=[["a photo of {}."]], description="Prompts with {} for the name; none: the model's own."
    )
    each: bool = Field(default=False, description="Route every class by itself.")
    route_by_prompts: bool = Field(default=False, description="Route the prompts in place of the plain names.")
    top: int = Field(default=5, ge=1, description="Classes that are returned for each picture.")


class ClassScore(BaseModel):
    """A class and how probable it is."""

    name: str
    probability: float


class PictureClasses(BaseModel):
    """The classes of one picture."""

    classes: list[ClassScore]
    weights: dict[str, float] = Field(description="Weight of each expert for the first class.")


class ClassifyResponse(BaseModel):
    """The classes of each picture, in the order of the request."""

    model_config = _example(
        model="demo",
        pictures=[{"classes": [{"name": "heart", "probability": 0.93}], "weights": WEIGHTS}],
    )

    model: str
    pictures: list[PictureClasses]


class RouteRequest(Routed):
    """Class names, or texts that are each a task of its own."""

    model_config = _example(classes=["heart", "home", "star"])

    classes: list[str] = Field(min_length=1, examples=[["heart", "home", "star"]])
    templates: list[str] = Field(default=[], description="Prompts that are routed in place of the plain names.")
    each: bool = Field(default=False, description="Route every text by itself, as a query for images.")


class RouteImagesRequest(Routed):
    """Pictures, each routed by itself, where the clusters of a bundle are of images."""

    model_config = _example(images=[PICTURE])

    images: list[str] = Field(min_length=1, examples=[[PICTURE]], description="Pictures in base64, or as data URLs.")


class Near(BaseModel):
    """A fine cluster near to a class."""

    cluster: int
    distance: float = Field(description="Distance of the class to its centre, 0 to 2.")
    expert: str
    captions: list[str]


class Reason(BaseModel):
    """Why a class has the weights that it has."""

    name: str
    weights: dict[str, float]
    nearest: list[Near]
    out_of_domain: bool | None = Field(description="Whether no caption of the bundle is near; null: not known.")
    distance: float | None
    quantile: float | None


class RouteResponse(BaseModel):
    """Weights with reasons."""

    model_config = _example(
        model="demo",
        rule="per_class",
        temperature=0.1,
        entropy=0.28,
        classes=[
            {
                "name": "heart",
                "weights": WEIGHTS,
                "nearest": [
                    {"cluster": 7, "distance": 0.31, "expert": "expert-1", "captions": ["heart", "broken heart"]}
                ],
                "out_of_domain": False,
                "distance": 0.31,
                "quantile": 0.12,
            }
        ],
    )

    model: str
    rule: str
    temperature: float
    entropy: float = Field(description="Of the weights, in nats.")
    classes: list[Reason]


class EmbeddingsRequest(BaseModel):
    """OpenAI's request: texts, and pictures as data URLs. Fields that it has besides are ignored."""

    model_config = _example(input=["a red umbrella", PICTURE])

    model: str | None = Field(default=None, description="Name of the model, as /models has it.")
    input: str | list[str] = Field(examples=[["a red umbrella", PICTURE]])
    encoding_format: Literal["float", "base64"] = Field(default="float", description="How vectors are written.")
    dimensions: int | None = Field(
        default=None, ge=1, le=65_536, description="Numbers of each vector; zeros are appended, none are dropped."
    )
    user: str | None = Field(default=None, description="Not looked at.")


class Embedding(BaseModel):
    """A vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """OpenAI counts tokens; here each input counts as one."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """OpenAI's response. All vectors have unit norm, so a product is a cosine."""

    model_config = _example(
        object="list",
        data=[{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
        model="demo",
        usage={"prompt_tokens": 1, "total_tokens": 1},
    )

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class SearchRequest(Shape):
    """What is looked for in an index."""

    model_config = _example(text="a red umbrella", count=5)

    text: str | None = Field(default=None, examples=["a red umbrella"])
    image: str | None = Field(default=None, description="A picture in base64, or as a data URL.")
    image_weight: float = Field(default=0.5, ge=0, le=1, description="Share of the picture beside a text.")
    negatives: list[str] = Field(default=[], max_length=16, description="Texts that the images should not fit.")
    negative_weight: float = Field(default=0.5, ge=0, le=100, description="Weight of each of them.")
    expert: str | None = Field(default=None, description="The one expert that answers; null: as the text is routed.")
    where: list[str] = Field(
        default=[], max_length=16, examples=[["width >= 16"]], description="Conditions in SQL on columns of the index."
    )
    count: int = Field(default=20, ge=1, description="Images that are wanted.")
    least_strength: float = Field(default=0.0, ge=0, le=1, description="Leave out hits that are weaker.")
    hybrid: bool = Field(default=False, description="Rank by the words of the captions too.")
    index: str | None = Field(default=None, description="Name of the index; null: the only one, or the first.")


class SearchHit(BaseModel):
    """One image that was found."""

    number: int = Field(description="Position in the index.")
    key: str
    caption: str
    path: str | None
    score: float
    height: float = Field(description="Standard deviations of the score above the mean of the query's scores.")
    strength: float = Field(description="Share of known pairs, captions with their own images, that fit less.")
    parts: dict[str, float] = Field(description="What each expert adds to the score.")
    picture: str = Field(description="Address of the picture in this service.")


class SearchResponse(BaseModel):
    """The images, best first."""

    model_config = _example(
        index="demo",
        weights=WEIGHTS,
        num_searched=23_537,
        exact=True,
        hits=[
            {
                "number": 15_109,
                "key": "phosphor/umbrella",
                "caption": "umbrella",
                "path": "icons/umbrella.png",
                "score": 0.82,
                "height": 3.1,
                "strength": 0.52,
                "parts": {"expert-0": 0.05, "expert-1": 0.77},
                "picture": "/pictures/demo/15109",
            }
        ],
    )

    index: str
    weights: dict[str, float] = Field(description="Weight of each expert.")
    num_searched: int
    exact: bool
    hits: list[SearchHit]


class IndexFacts(BaseModel):
    """An index."""

    images: int
    columns: list[str] = Field(description="What a condition may name.")
    exact: bool = Field(description="Whether every search compares all images.")


class Routing(BaseModel):
    """How a bundle routes unless a request says otherwise."""

    rule: str
    temperature: float
    templates: list[str]
    max_experts: int | None


class ModelFacts(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the service has opened it, in seconds since 1970.")
    owned_by: str = "modeclip"
    experts: list[str]
    digests: list[str] = Field(description="SHA-256 of the weights and settings of each.")
    dimension: int = Field(description="Numbers of an embedding.")
    per_image: bool = Field(description="Whether every picture has weights of its own.")
    logit_scale: float = Field(description="Factor of the scores before the softmax, all experts alike.")
    routing: Routing | None = Field(description="null: one model, with nothing to route to.")
    indexes: dict[str, IndexFacts]


class ModelsResponse(BaseModel):
    """OpenAI's list of models."""

    model_config = _example(
        object="list",
        data=[
            {
                "id": "demo",
                "object": "model",
                "created": 1_795_907_284,
                "owned_by": "modeclip",
                "experts": list(WEIGHTS),
                "digests": ["1a9cd5ad", "4191a228"],
                "dimension": 257,
                "per_image": False,
                "logit_scale": 18.9,
                "routing": {"rule": "per_class", "temperature": 0.1, "templates": ["{}"], "max_experts": 2},
                "indexes": {"demo": {"images": 23_537, "columns": ["key", "caption", "width"], "exact": True}},
            }
        ],
    )

    object: Literal["list"] = "list"
    data: list[ModelFacts]


class Health(BaseModel):
    """Whether the service lives."""

    model_config = _example(status="ready", model="demo", trouble="", uptime_seconds=12.5)

    status: str
    model: str
    trouble: str = Field(description="Why what lies on disk is not what answers; empty: it is.")
    uptime_seconds: float


class Trouble(BaseModel):
    """What is wrong with a request, and what to do."""

    message: str
    type: str
    request_id: str


class ErrorResponse(BaseModel):
    """Every error looks so."""

    model_config = _example(
        error={
            "message": "count: expected at most 1,000, got 5,000",
            "type": "invalid_request_error",
            "request_id": "7a3d699ceb2649a68623cc6ab682338a",
        }
    )

    error: Trouble


class KnnRequest(BaseModel):
    """clip-retrieval's request; what it asks besides (deduplication, safety, aesthetics) is ignored."""

    model_config = _example(text="a red umbrella", num_images=3)

    text: str | None = Field(default=None, examples=["a red umbrella"])
    image: str | None = Field(default=None, description="A picture in base64.")
    image_url: str | None = Field(default=None, description="Refused: no address is ever fetched.")
    embedding_input: list[float] | None = Field(
        default=None, max_length=65_536, description="An embedding of this service."
    )
    modality: Literal["image", "text"] = Field(default="image", description="What the index holds: images alone.")
    num_images: int = Field(default=100, ge=1, description="Hits with picture and caption.")
    num_result_ids: int | None = Field(default=None, ge=1, description="Hits in all; null: as many as num_images.")
    indice_name: str | None = Field(default=None, description="Name of the index; null: the first.")


class KnnHit(BaseModel):
    """A hit as clip-retrieval gives it; beyond num_images only number and similarity."""

    model_config = _example(id=15_109, similarity=0.82, caption="umbrella", image="iVBORw0KGgo=")

    id: int
    similarity: float
    caption: str | None = None
    url: str | None = None
    image: str | None = Field(default=None, description="The picture in base64.")


class MetadataRequest(BaseModel):
    """clip-retrieval's request for what belongs to hits."""

    model_config = _example(ids=[0, 1])

    ids: list[int] = Field(examples=[[0, 1]])
    indice_name: str | None = Field(default=None, description="Name of the index; null: the first.")


class Metadata(BaseModel):
    """What an index knows of an image."""

    model_config = _example(id=0, metadata={"key": "phosphor/umbrella", "caption": "umbrella", "width": 32})

    id: int
    metadata: dict[str, Any]


class Predicted(BaseModel):
    """immich's response."""

    model_config = _example(clip="[0.6, -0.8]", imageHeight=32, imageWidth=32)

    clip: str = Field(description="The vector, as JSON in a text.")
    image_height: int | None = Field(default=None, alias="imageHeight")
    image_width: int | None = Field(default=None, alias="imageWidth")
