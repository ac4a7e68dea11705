"""What many tests need to make by hand: pictures, tar files, small jobs, vectors, a look at weights.

Fixtures that cost seconds (a finished run, a catalog of icons, an S3 server) are in conftest.py, made once for all
processes that test.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from modeclip.data.catalog import Catalog
    from modeclip.training.jobs import TrainConfig, TrainJob

WEIGHTS = "open_clip_model.safetensors"


def encode_picture(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the bytes of a picture's file; the options are Pillow's."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def plain_png(color: int | tuple[int, int, int] = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    """Return a PNG of one colour; a number is a grey."""
    return encode_picture(Image.new("RGB", size, color if isinstance(color, tuple) else (int(color),) * 3))


def noise_picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Return a picture of random pixels, another one for each seed; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def transparent_drawing() -> tuple[Image.Image, Image.Image]:
    """Return a black square on a transparent ground, and the same in RGB on a white one."""
    drawing, expected = Image.new("RGBA", (16, 16)), Image.new("RGB", (16, 16), "white")
    for picture in (drawing, expected):
        picture.paste("black", (4, 4, 12, 12))
    return drawing, expected


def png_bomb() -> bytes:
    """Return a PNG of a few bytes that says it has 20,000 by 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def tar_of(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    """Return a plain tar of these members, in their order; given as pairs, a name may occur twice."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def write_pairs(folder: Path, images: Iterable[bytes], captions: Sequence[str]) -> Path:
    """Write a folder of ``000.png`` with ``000.txt`` and so on."""
    folder.mkdir(parents=True)
    for number, (image, caption) in enumerate(zip(images, captions, strict=False)):
        (folder / f"{number:03d}.png").write_bytes(image)
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
    return folder


def can_mount() -> bool:
    """Whether a test may mount a small disk in a namespace of its own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def unit_rows(rows: int, dimension: int, random: np.random.Generator | int = 0) -> np.ndarray:
    """Return random float32 vectors of length 1."""
    vectors = np.random.default_rng(random).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def grouped_rows(num_rows: int, dimension: int, seed: int, num_groups: int = 6) -> np.ndarray:
    """Return float32 unit vectors in groups of uneven size."""
    rng = np.random.default_rng(seed)
    group = rng.choice(num_groups, num_rows, p=np.arange(1, num_groups + 1) / np.arange(1, num_groups + 1).sum())
    x = rng.normal(size=(num_groups, dimension))[group] + 0.5 * rng.normal(size=(num_rows, dimension))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def squared_distances_of(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return exact squared distances, (N, M)."""
    return np.square(x[:, None].astype(np.float64) - centers[None]).sum(2)


def rows_with_nan() -> np.ndarray:
    """Return ten rows, of which 3 and 7 have a value that is not finite."""
    x = grouped_rows(10, 4, 0)
    x[[3, 7], [1, 2]] = np.nan, np.inf
    return x


def make_job(catalog: Catalog | Path | str, folder: Path, config: TrainConfig, **changes: object) -> TrainJob:
    """Return a job of 24 steps from a model's own start, named after its folder, with these changes."""
    from modeclip.training.choosing import LADDER
    from modeclip.training.jobs import AUTO, TrainJob

    config = replace(config, model=LADDER[0]) if config.model == AUTO else config
    job = TrainJob(
        name=folder.name,
        folder=str(folder),
        catalog=str(getattr(catalog, "path", catalog)),
        catalog_fingerprint="test",
        config=config,
        first_step=0,
        last_step=24,
        first_share=0.0,
        last_share=1.0,
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def with_weights(name: str, folder: Path, seed: int = 0) -> str:
    """Write random weights of a model to a file, and return the specification that names both."""
    from modeclip.models.checkpoints import write_tensors
    from modeclip.models.clip import load_clip

    path = folder / f"{name}-{seed}.safetensors"
    write_tensors(path, load_clip(name, seed=seed).model.state_dict())
    return f"{name}@{path}"


def make_clip_moe(folder: Path, *, num_experts: int, model: str = "modeclip-icon-xxs", scale: float = 8.0) -> Path:
    """Write a CLIP-MoE whose experts are random steps away from a random model, or that model itself for 0 experts.

    Args:
        folder: The new folder.
        num_experts: Experts of each block.
        model: The model's architecture.
        scale: Factor of the router's random rows; the larger, the surer the routing.
    """
    import torch

    from modeclip.models.blocks import ffn_parameters
    from modeclip.models.clip import assemble_clip, load_clip, save_clip
    from modeclip.models.moe import moe_layers

    clip, draw = load_clip(model, seed=0), torch.Generator().manual_seed(0)
    if num_experts:
        own, names = clip.model.state_dict(), set(ffn_parameters(clip.model))
        states = [
            {
                name: value + 0.1 * torch.randn(value.shape, generator=draw) if name in names else value
                for name, value in own.items()
            }
            for _ in range(num_experts - 1)
        ]
        clip = assemble_clip(clip, states, top_k=min(2, num_experts))
        for layer in moe_layers(clip.model):
            layer.router.weight.data.mul_(scale)
    save_clip(clip, folder)
    return folder


def mark_done(job: TrainJob) -> None:
    """Leave the record of a finished job, without its model."""
    job.save()
    record = {"digest": job.digest, "samples": 1, "rows": 1, "seconds": 1.0}
    (Path(job.folder) / "done.json").write_text(json.dumps(record))


def weights_of(model: Path | str) -> bytes:
    """Return a model folder's file of weights: equal bytes are equal models."""
    return (Path(model) / WEIGHTS).read_bytes()


class InThisProcess:
    """Runs jobs in this process, one after the other, in place of `modeclip.training.launching`'s processes."""

    def __init__(self, *_: int) -> None:
        self.over: dict[str, str] = {}

    def is_free(self) -> bool:
        return True

    def start(self, job: TrainJob) -> None:
        from modeclip.training.trainer import train

        train(job)
        self.over[job.name] = ""

    def ended(self) -> dict[str, str]:
        over, self.over = self.over, {}
        return over

    def stop(self) -> None:
        pass


@contextmanager
def training_here() -> Iterator[None]:
    """Train jobs in this process, which saves the imports of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeclip.training.launching._Here", InThisProcess)
        yield


LARGE_LIBRARIES = ("open_clip", "transformers.models.auto.modeling_auto", "pyarrow.dataset", "sklearn.cluster", "yaml")
"""What takes seconds to import, and can be imported before a process forks (Lance cannot)."""


class Python:
    """Python in a process of its own, like ``subprocess.Popen``, that has `LARGE_LIBRARIES` behind it.

    A server of multiprocessing imports them once and forks each process. Where imports are what is tested, or another
    program starts the process, `subprocess` is the way.

    Args:
        words: ``-m MODULE WORDS...`` or ``-c CODE WORDS...``. Warnings are errors, unless
            PYTHONWARNINGS says otherwise.
        environment: Variables besides those of this process.
    """

    def __init__(self, *words: object, **environment: str) -> None:
        self._outputs = []
        for _ in range(2):
            number, name = tempfile.mkstemp()
            os.close(number)
            self._outputs.append(Path(name))
        work = (list(map(str, words)), os.environ | environment, str(Path.cwd()), self._outputs)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run_python, args=work)
        self._process.start()
        self._printed: list[str] = []
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 600) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        if not self._printed:
            self._printed = [path.read_text(errors="replace") for path in self._outputs]
            for path in self._outputs:
                path.unlink()
        return self._process.exitcode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end and return both outputs."""
        self.wait(timeout)
        output, errors = self._printed
        return output, errors


def python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, in a process of its own, as `Python` does."""
    process = Python(*words, **environment)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(words, process.wait(), output, errors)


def _run_python(words: list[str], environment: dict[str, str], folder: str, outputs: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), write_through=True) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    warnings.simplefilter(environment.get("PYTHONWARNINGS", "error"))  # type: ignore[arg-type]
    kind, what, *rest = words
    sys.argv = [what if kind == "-m" else "-c", *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


@dataclass
class Element:
    """One element of a parsed page."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).split())

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.walk()
            if (not tag or element.tag == tag) and wanted.items() <= element.attributes.items()
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def values(self, tag: str, name: str) -> list[str]:
        """Return this attribute of all elements that have it."""
        return [element.attributes[name] for element in self.all(tag) if name in element.attributes]

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()


class _Parser(HTMLParser):
    """Builds the tree of a page and fails where tags do not match."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse_page(path: Path) -> Element:
    """Return the root of a page's elements."""
    parser = _Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    (root,) = parser.open
    return root


def write_wordnet(folder: Path) -> Path:
    """Write a WordNet of nine synsets in the format of its own files, with counts and irregular forms."""
    licence = "  1 This is no licence, but lines of one begin like this  \n"
    files = {
        "data.noun": """\
00000100 05 n 02 dog 0 domestic_dog 0 001 @ 00000200 n 0000 | a member of the genus Canis; "the dog barked"
00000200 05 n 01 animal 0 000 | a living organism; "animals eat"; "it is an animal"
00000300 13 n 03 hot_dog 0 dog 1 Red_Hot 0 000 | a sausage on a bun (called a "dog" at fairs)
00000400 05 n 01 mouse 0 000 | a small rodent
00000500 13 n 01 U.S.A. 0 000 | a country
""",
        "index.noun": """\
animal n 1 1 @ 1 1 00000200
dog n 2 2 @ ~ 2 1 00000100 00000300
domestic_dog n 1 1 @ 1 0 00000100
hot_dog n 1 0 1 0 00000300
mouse n 1 0 1 1 00000400
red_hot n 1 0 1 0 00000300
u.s.a. n 1 0 1 0 00000500
""",
        "data.verb": '00000100 38 v 01 run 0 000 01 + 02 00 | move fast; "he ran"\n',
        "index.verb": "run v 1 0 1 1 00000100\n",
        "data.adj": """\
00000100 00 a 01 small 0 001 & 00000200 a 0000 | of little size
00000200 00 s 02 tiny 0 asleep(p) 0 001 & 00000100 a 0000 | very small
""",
        "index.adj": "asleep a 1 1 & 1 0 00000200\nsmall a 1 1 & 1 1 00000100\ntiny a 1 1 & 1 1 00000200\n",
        "data.adv": "00000100 02 r 01 fast 0 000 | quickly\n",
        "index.adv": "fast r 1 0 1 0 00000100\n",
        "noun.exc": "mice mouse\n",
        "cntlist.rev": "dog%1:05:00:: 1 42\ndog%1:13:01:: 2 3\ntiny%5:00:00:small:00 1 7\n",
    }
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(licence + text if "." in name and name[0] in "di" else text, encoding="utf-8")
    return folder


SMALL_VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
SMALL_TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 600, "width": 32, "heads": 2, "layers": 3}
SMALL_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 600,
}
CUSTOM_TEXT = {"custom_text": True}
CLIP_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "custom text": CUSTOM_TEXT,
    "average, norm behind": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "attention pool": {"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}},
    "class token": CUSTOM_TEXT | {"text_cfg": {"embed_cls": True}},
    "sees all": CUSTOM_TEXT | {"text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
    "end by id": {"text_cfg": {"pool_type": "eos", "eos_id": 599}},
    "no projection": CUSTOM_TEXT | {"text_cfg": {"proj_type": "none"}},
    "timm": {"vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False}},
    "timm, pooled by attention": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    },
    "BERT": CUSTOM_TEXT | {"text_cfg": {"hf": "bert", "hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"}},
    "RoBERTa": CUSTOM_TEXT | {"text_cfg": {"hf": "roberta", "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}},
}


def build_clip(kind: str, folder: Path) -> Any:
    """A model of one kind, with random weights in all of its parameters."""
    import open_clip
    import torch

    changes = CLIP_KINDS[kind]
    config = {"embed_dim": 32, "vision_cfg": SMALL_VISION | changes.get("vision_cfg", {})}
    config |= {"text_cfg": SMALL_TEXT | changes.get("text_cfg", {}), "custom_text": changes.get("custom_text", False)}
    if "timm_model_name" in config["vision_cfg"]:
        config |= {"embed_dim": 64, "vision_cfg": config["vision_cfg"] | {"image_size": 160}}
    if (hf := config["text_cfg"].pop("hf", None)) is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": hf, **SMALL_BERT}))
        config["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    (folder / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("small", pretrained_text=False).eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim == 1:
                    value.add_(torch.randn_like(value) * 0.1)
    return model
