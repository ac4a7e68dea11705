"""The command that answers over HTTP: serve."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.errors import ModeclipError
from modeclip.serving.limits import Limits
from modeclip.system.options import MaxMemory, UserEncoder, to_bytes

NEEDED = ("fastapi", "uvicorn", "uvloop", "prometheus_client", "multipart")
"""Packages of the extra ``serve``."""


def serve(
    what: Positional[
        Annotated[str, arg(metavar="RUN|BUNDLE|MODEL", help="Folder of a run, a bundle, a model folder, or NAME@TAG.")]
    ],
    limits: Annotated[OmitArgPrefixes[Limits], arg(name="limits")],
    *,
    index: Annotated[
        tuple[str, ...],
        arg(
            metavar="INDEX",
            help="Folders or addresses of indexes; default: that of the run, built at the first start.",
        ),
    ] = (),
    host: Annotated[str, arg(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, arg(help="Port to listen at; 0: any that is free.")] = 8080,
    max_memory: MaxMemory = None,
    api_key_file: Annotated[
        Path | None, arg(help="File with the key that clients must send as Authorization: Bearer KEY.")
    ] = None,
    allow_origin: Annotated[
        tuple[str, ...], arg(metavar="ORIGIN", help="Pages of these origins may ask (https://example.org).")
    ] = (),
    dimension: Annotated[
        int | None, arg(help="Numbers of an embedding: zeros are appended, for programs that expect so many.")
    ] = None,
    device: Annotated[str, arg(help="Where it computes: auto, cpu, cuda.")] = "auto",
    encoder: UserEncoder = None,
    trust_encoder: Annotated[bool, arg(help="Run the bundle's own encoder, if that is Python code.")] = False,
) -> None:
    """Answer over HTTP: classify, route, embed, search, and a page for people."""
    if not 0 <= port <= 65_535:
        raise ModeclipError(f"--port: expected 0 to 65,535, got {port}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModeclipError(f'serve: {missing[0]} is not installed; pip install "modeclip[serve]"')
    key = "" if api_key_file is None else _read_key(api_key_file)
    memory = to_bytes(max_memory)
    from modeclip.serving.server import bind
    from modeclip.serving.server import serve as serve_until_told
    from modeclip.serving.service import open_service

    place = bind(host, port)
    with place:
        service = open_service(
            what,
            indexes=index,
            limits=limits,
            device=device,
            encoder=encoder,
            trust_encoder=trust_encoder,
            max_memory=memory,
            dimension=dimension,
        )
        serve_until_told(service, place, key=key, origins=allow_origin)


def _read_key(path: Path) -> str:
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < 8 or not key.isascii() or any(letter.isspace() for letter in key):
        raise ModeclipError(f"--api-key-file {path}: expected one line of 8 or more ASCII letters without blanks")
    return key
