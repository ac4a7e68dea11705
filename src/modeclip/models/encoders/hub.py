"""What encoders share: folders of saved models, the hub's cache, bfloat16 where it is safe, reproducible batches.

`in_batches` makes a vector depend on its own input alone. On a CPU every batch is computed by one thread, and several
batches run side by side; if the products of a batch were split between threads, its bytes would depend on their number.

Price: bfloat16 gives 2 to 3 times the rate of float32 on processors that multiply it. The check that a model tolerates
it encodes a few inputs twice, one by one. Rows that fill up a short batch cost as much as others.
"""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.errors import ModeclipError
from modeclip.models.clip import without_gradients
from modeclip.system.console import log
from modeclip.system.devices import choose_device
from modeclip.system.paths import home_path

if TYPE_CHECKING:
    import torch

LEAST_COSINE = 0.9995
"""A model runs in bfloat16 if its vectors of a few probes have at least this cosine with those of float32."""

OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "openvino/*")
"""Files of hub models that PyTorch does not read."""


def unit_rows(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Return float32 rows of norm 1; a row of zeros (a text without any known word) has no direction and stays."""
    x = np.array(x, np.float32)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    norm[norm == 0] = 1.0
    return np.asarray(x / norm, np.float32)


def check_vectors(name: str, vectors: Float[np.ndarray, "N D"], texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    """Return the vectors that an encoder made of texts, or of pairs with these captions.

    Raises:
        ModeclipError: One of them has NaN or infinity; it names the first text.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        text = texts[bad[0]]
        raise ModeclipError(
            f"encoder {name!r}: its vectors of {bad.size:,} of {len(vectors):,} texts have NaN or infinity, first that "
            f"of {text if len(text) <= 60 else text[:57] + '...'!r}; its weights are damaged or its precision too low"
        )
    return vectors


def in_batches(
    groups: Int[np.ndarray, " N"],
    rows: int,
    run: Callable[[Int[np.ndarray, " rows"]], Any],
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]]:
    """Run inputs through a model in batches of one group (such as one length) that all have the same number of rows.

    A short batch is filled up with repeats of its first input. Which kernels compute a vector then depends neither on
    how many inputs there are nor on what they are, and the vector is the same bit for bit.

    Args:
        groups: Group of each input.
        rows: Rows of every batch.
        run: Takes the positions of ``rows`` inputs and returns a (rows, D) tensor; called in several threads on a CPU.

    Yields:
        Positions of inputs, and their vectors.
    """
    import torch

    order = np.argsort(-groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    batches = [part[s : s + rows] for part in np.split(order, cuts) for s in range(0, len(part), rows)]

    def encode(batch: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        filled = np.concatenate([batch, np.repeat(batch[:1], rows - len(batch))])
        with without_gradients():
            vectors: Float[np.ndarray, "n D"] = run(filled)[: len(batch)].float().cpu().numpy()
        return vectors

    threads = torch.get_num_threads()
    if threads == 1 or choose_device().type != "cpu":
        for batch in batches:
            yield batch, encode(batch)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for start in range(0, len(batches), 8 * threads):  # results wait for a reader, a few at a time
                some = batches[start : start + 8 * threads]
                yield from zip(some, pool.map(encode, some), strict=True)
    finally:
        torch.set_num_threads(threads)


def in_bfloat16(module: torch.nn.Module, probe: Callable[[torch.nn.Module], Float[np.ndarray, "n D"]]) -> Any:
    """Return a model in bfloat16 if the processor multiplies it and the model's vectors tolerate it, else as it is.

    Args:
        module: A model in float32.
        probe: Takes a model and returns its unit vectors of a few inputs.
    """
    import torch

    if not _has_bfloat16():
        return module
    parameters = [value for value in module.parameters() if value.is_floating_point()]
    low_of = {id(value): torch.nn.Parameter(value.to(torch.bfloat16), requires_grad=False) for value in parameters}
    low = copy.deepcopy(module, low_of).to(torch.bfloat16)  # what has its copy already is not copied in float32 first
    try:
        cosine = (probe(module) * probe(low)).sum(axis=1)
    except RuntimeError:  # an operation that has no kernel for it
        return module
    return low if float(cosine.min()) >= LEAST_COSINE else module


def _has_bfloat16() -> bool:
    """Return whether products of bfloat16 are faster than those of float32."""
    import torch

    if choose_device().type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def need(package: str, encoder: str, install: str) -> None:
    """Check that a package is installed.

    Raises:
        ModeclipError: It is not; the message has the command that installs it.
    """
    if find_spec(package) is None:
        raise ModeclipError(f"encoder {encoder!r}: package {package} is not installed; pip install {install}")


def local_folder(path: str) -> Path:
    """Return an existing folder.

    Raises:
        ModeclipError: There is none at this path.
    """
    folder = home_path(path)
    if not folder.is_dir():
        raise ModeclipError(f"encoder: no folder {path!r}; give the path of a saved model")
    return folder


def cached_folder(hub_id: str) -> Path | None:
    """Return the folder of a hub model in the local cache, if it has the model's files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return folder if weights and (folder / "config.json").is_file() else None


def hub_folder(name: str, hub_id: str, option: str = "FOLDER") -> Path:
    """Return the folder of a hub model in the local cache, downloaded if it is not there.

    Args:
        name: Name of the encoder, for messages.
        hub_id: ORG/NAME.
        option: The name of an encoder whose model is in a local folder, for messages.

    Raises:
        ModeclipError: It is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        ignored = list(OTHER_WEIGHTS)
        return Path(snapshot_download(hub_id, ignore_patterns=ignored, local_files_only=local_files_only))

    try:
        return snapshot(local_files_only=True)
    except LocalEntryNotFoundError:
        log(f"encoder {name!r}: downloading {hub_id}, once")
    try:
        return snapshot(local_files_only=False)
    except (OSError, HfHubHTTPError) as error:
        raise ModeclipError(
            f"encoder {name!r}: {hub_id} is neither a local folder, nor in the local cache, nor "
            f"can it be downloaded ({first_line(error)}); with a copy of the model in a local "
            f"folder, give {option} as the encoder"
        ) from error


@contextmanager
def loading(name: str, folder: Path | str, *, with_transformers: bool = True) -> Iterator[None]:
    """Load a model without the libraries' bars and warnings, and with one clear line if it fails.

    Args:
        name: Name of the encoder, for messages.
        folder: Where it lies, for messages.
        with_transformers: Whether transformers takes part, so that its bars have to be switched off; importing it takes
            a good part of a second.

    Raises:
        ModeclipError: Anything went wrong.
    """
    try:
        with warnings.catch_warnings(), _quiet_transformers() if with_transformers else nullcontext():
            warnings.simplefilter("ignore")
            yield
    except ModeclipError:
        raise
    except pickle.UnpicklingError as error:  # torch's own words advise to run what is in the file
        raise ModeclipError(
            f"encoder {name!r}: its weights are damaged, or hold more than tensors and numbers, which is never loaded; "
            f"get them as safetensors into {folder}"
        ) from error
    except Exception as error:  # the libraries raise nearly anything on damaged or missing files
        raise ModeclipError(
            f"encoder {name!r}: cannot be loaded ({first_line(error)}); check {folder}, or delete it and get it again"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    transformers_logging = import_module("transformers.utils.logging")
    logger = logging.getLogger("sentence_transformers")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    has_bar = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()


def hash_weights(module: torch.nn.Module) -> str:
    """Return a hash over the names and values of a model's weights, as hexadecimal digits."""
    import torch

    weights = ((name, value.detach().cpu().contiguous()) for name, value in sorted(module.state_dict().items()))
    lines = (f"{k} {sha256(v.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()}" for k, v in weights)
    return sha256("\n".join(lines).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
