"""The page that the service shows: its files, and what its views ask for besides the service's own answers.

The page is plain HTML, CSS and ES modules in ``site/``, loads nothing from elsewhere, and its content security policy
makes the browser refuse everything else. Search and Classify use the routes that any client uses; the routes here serve
the atlas, the run and the state of the service. They are for the page alone, so they are not part of the OpenAPI.
"""

from __future__ import annotations

import json
import platform
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from modeclip import __version__
from modeclip.errors import ModeclipError
from modeclip.pages.html import fill_template
from modeclip.serving.atlas import Atlas, TakenError
from modeclip.serving.limits import RefusedError
from modeclip.system.console import log
from modeclip.system.devices import memory_gb
from modeclip.system.paths import RunPaths
from modeclip.training.jobs import JOB_FILE, TrainJob
from modeclip.training.status import JobStatus, job_status, status

if TYPE_CHECKING:
    from modeclip.serving.service import Service

Json = dict[str, Any]

SITE = Path(__file__).parent / "site"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: its own files, and pictures that somebody drops on it."""
MOST_EXPERTS = 64
"""Experts that have a colour in the style sheet; more share the colour of the last."""
MOST_ROWS = 200
"""Pairs that are described at once."""
RESULT_FIELDS = ("name", "kind", "rule", "default", "average", "interval", "samples", "versus_dense_total")
"""What the page is told of each row of a run's results."""
CHECK_FOLDER = "check"
"""Folder of the run that the data check is written to."""


class MaskRequest(BaseModel):
    """A selection on the map, to be saved as a column."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=100)
    polygons: list[Annotated[list[tuple[float, float]], Field(min_length=3, max_length=4000)]] = Field(
        default=[], max_length=64
    )
    clusters: list[int] = Field(default=[], max_length=100_000)
    rows: list[int] = Field(default=[], max_length=1_000_000)
    replace: bool = False


@dataclass
class DataCheck:
    """The data check of a run, which the page can start."""

    running: bool = False
    error: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def page_router(service: Service) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(include_in_schema=False)
    _add_site(router)
    _add_atlas(router, service)
    _add_run(router, service)

    @router.get("/system")
    def system() -> Json:
        return describe_system(service)

    return router


def _add_site(router: APIRouter) -> None:
    files = {path.name: path for path in SITE.iterdir() if path.suffix in TYPES}

    @router.get("/")
    def index() -> Response:
        return FileResponse(
            files["index.html"],
            media_type="text/html",
            headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", **_SAFE},
        )

    @router.get("/site/colours.css")
    def colours() -> Response:
        style = fill_template("colours.css", num_experts=MOST_EXPERTS)
        return Response(style, media_type="text/css", headers={"Cache-Control": "no-cache", **_SAFE})

    @router.get("/site/{name}")
    def site(name: str) -> Response:
        if name not in files:
            raise RefusedError(f"the page has no file {name!r}", 404)
        kind = TYPES[files[name].suffix]
        return FileResponse(files[name], media_type=kind, headers={"Cache-Control": "no-cache", **_SAFE})

    @router.get("/favicon.ico")
    def icon() -> Response:
        return FileResponse(files["icon.svg"], media_type="image/svg+xml")


_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def _add_atlas(router: APIRouter, service: Service) -> None:
    atlas = None if service.run is None else Atlas(service.run)

    def opened() -> Atlas:
        if atlas is None or not atlas.paths.catalog_path.exists():
            raise RefusedError(
                "there is no atlas: it needs the catalog of a run; serve the folder of a run (modeclip serve RUN)", 404
            )
        return atlas

    @router.get("/atlas/summary")
    def summary() -> Json:
        return opened().summary()

    @router.get("/atlas/points")
    def points() -> Response:
        return Response(opened().points(), media_type="application/octet-stream")

    @router.get("/atlas/colour/{name:path}")
    def colour(name: str) -> Response:
        legend, codes = opened().colour(name)
        return Response(codes, media_type="application/octet-stream", headers={"X-Legend": json.dumps(legend)})

    @router.get("/atlas/cluster/{index}")
    def cluster(index: int, count: Annotated[int, Query(ge=0, le=MOST_ROWS)] = 12) -> Json:
        card = opened().cluster(index)
        return card | {"pairs": opened().pairs(opened().members(index, count))}

    @router.get("/atlas/pairs")
    def pairs(
        row: Annotated[list[int], Query(max_length=MOST_ROWS)] = [],  # noqa: B006 - FastAPI copies it
        key: Annotated[list[str], Query(max_length=MOST_ROWS)] = [],  # noqa: B006
    ) -> Json:
        return {"pairs": opened().pairs([*row, *opened().rows_of_keys(key)])}

    @router.get("/atlas/pictures/{row}")
    def picture(row: int, size: Annotated[int, Query(ge=16, le=1024)] = 256) -> Response:
        data = opened().picture(row, size)
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/webp"
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=600", **_SAFE})

    @router.post("/atlas/masks")
    def save(mask: MaskRequest) -> Json:
        chosen = opened().selected(mask.polygons, mask.clusters, mask.rows)
        try:
            return opened().save_mask(mask.name, chosen, replace=mask.replace)
        except TakenError as error:
            raise RefusedError(str(error), 409) from None

    @router.delete("/atlas/masks/{name}")
    def remove(name: str) -> Json:
        opened().remove_mask(name)
        return {"name": name}


def _add_run(router: APIRouter, service: Service) -> None:
    checking, board = DataCheck(), Board()

    @router.get("/runs")
    def runs() -> Json:
        if service.run is None:
            return {"run": None}
        return {
            "run": describe_run(service.run, board),
            "check": {"running": checking.running, "error": checking.error},
        }

    @router.get("/runs/pages/{name:path}")
    def page(name: str) -> Response:
        found = {} if service.run is None else pages_of(service.run)
        if name not in found:
            raise RefusedError(f"the run has no page {name!r}", 404)
        policy = {"Content-Security-Policy": "frame-ancestors 'self'", "Cache-Control": "no-cache", **_SAFE}
        return FileResponse(found[name], media_type="text/html", headers=policy)

    @router.post("/runs/check")
    def check() -> Json:
        if service.run is None:
            raise RefusedError("there is no run to check; serve the folder of a run (modeclip serve RUN)", 404)
        with checking.lock:
            if not checking.running:
                checking.running, checking.error = True, ""
                threading.Thread(target=_check, args=(service.run, checking), daemon=True).start()
        return {"running": True}


def _check(run: Path, checking: DataCheck) -> None:
    """Write the page of the data check."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.checks import CheckConfig
    from modeclip.data.checks import check as run_check
    from modeclip.models.clip import load_clip
    from modeclip.pages.check_page import write_check

    try:
        catalog, config = Catalog.open(RunPaths(folder=run).catalog_path), CheckConfig()
        found = run_check(catalog, config, tokenize=load_clip("modeclip-icon", seed=0).tokenizer)
        write_check(catalog, found, run / CHECK_FOLDER, config.seed)
    except (ModeclipError, OSError) as error:
        checking.error = str(error)
        log(f"data check: {error}")
    finally:
        checking.running = False


def pages_of(run: Path) -> dict[str, Path]:
    """Return the pages of a run by the names that they have in addresses."""
    paths = RunPaths(folder=run)
    found = {
        "report": paths.report,
        "check": run / CHECK_FOLDER / "check.html",
        "clusters": paths.clusters / "atlas.html",
    }
    found |= {f"curation/{path.parent.name}": path for path in sorted(paths.curation.glob("*/*.html"))}
    return {name: path for name, path in found.items() if path.is_file()}


class Board:
    """How far the models of a run are, for a page that asks every few seconds.

    Whether finished models still fit their pairs takes seconds to find out. So it is looked up in the background, once
    for each state of the catalog and the models; until then they are called finished.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked_at: Any = None
        self._stale: dict[str, JobStatus] = {}

    def read(self, run: Path) -> list[JobStatus]:
        """Return the status of each model, the seed first; none where no model was planned.

        Raises:
            ModeclipError: A job's file is damaged.
        """
        paths = RunPaths(folder=run)
        files = sorted(paths.models.glob(f"*/{JOB_FILE}"))
        marks = [paths.catalog_path / "_versions", *files, *paths.models.glob("*/done.json")]
        seen = [(str(path), path.stat().st_mtime_ns) for path in marks if path.exists()]
        with self._lock:
            if files and seen != self._looked_at:
                self._looked_at, self._stale = seen, {}
                threading.Thread(target=self._look, args=(run, seen), daemon=True).start()
        rows = [job_status(TrainJob.load(path), path.parent) for path in files]
        rows.sort(key=lambda row: (row.name != "seed", row.name))
        return [self._stale.get(row.name, row) if row.state == "finished" else row for row in rows]

    def _look(self, run: Path, seen: Any) -> None:
        try:
            stale = {row.name: row for row in status(run) if row.state == "stale"}
        except (ModeclipError, OSError):  # what is wrong is said where it is read
            return
        with self._lock:
            if self._looked_at == seen:
                self._stale = stale


def describe_run(run: Path, board: Board) -> Json:
    """Return how far a run is: its stages, its models, its pages, and the headline of its results."""
    from modeclip.pages.run_report import find_headline
    from modeclip.pipeline.stages import STAGES, read_record
    from modeclip.system.files import read_json

    paths, stages, models, trouble = RunPaths(folder=run), [], [], []
    for path in (path for name in STAGES if (path := paths.stages / f"{name}.json").is_file()):
        try:
            record = read_record(path, "run its recipe again")
            stages.append({"name": record["name"], "seconds": record["seconds"], "detail": record["detail"]})
        except ModeclipError as error:
            trouble.append(str(error))
    try:
        models = [asdict(row) for row in board.read(run)]
    except ModeclipError as error:
        trouble.append(str(error))
    results: list[Json] = []
    if paths.results.is_file():
        try:
            table = read_json(paths.results, dict[str, Any], "evaluate again (modeclip evaluate)")
            opponent = find_headline(table["models"])["dense"]
            results = [
                {name: model.get(name) for name in RESULT_FIELDS} | {"is_opponent": model is opponent}
                for model in table["models"]
            ]
        except (ModeclipError, KeyError) as error:
            trouble.append(str(error))
    return {
        "name": run.resolve().name,
        "folder": str(run),
        "stages": stages,
        "models": models,
        "results": results,
        "pages": list(pages_of(run)),
        "trouble": trouble,
    }


def describe_system(service: Service) -> Json:
    """Return what is served, and what it takes."""
    import torch

    model = service.answers.model
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": model.device,
        "memory_bytes": round(1e9 * memory_gb()),
        "began": service.began,
        "uptime_seconds": time.time() - service.began,
        "trouble": service.trouble,
        "models": [
            {"name": name, "loaded": ref in model.pool, "dimension": size, "digest": ref.digest}
            for name, ref, size in zip(model.names, model.refs, model.sizes, strict=True)
        ],
        "indexes": [
            {
                "name": name,
                "folder": index.folder,
                "num_rows": len(index),
                "exact": index.approximate is None,
                "recall": None if index.approximate is None else index.approximate.recall,
            }
            for name, index in service.indexes.items()
        ],
        "limits": asdict(service.limits),
    }
