"""The clustering itself: fine centres, which experts each of them belongs to, and the file that keeps them.

`group` makes K experts of M fine centres by balanced k-means. With ``overlap`` a fine cluster also belongs to the
experts with the next nearest coarse centres; the first of its experts is always the one that it was grouped into.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 (second step) and 5.5 (range). The paper names overlapping clusters as future
work; this way of making them is ours.

Price: a fraction of a second for 1024 centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.kmeans import kmeans
from modeclip.errors import ModeclipError
from modeclip.system.files import replacing

CLUSTERING_FILE = "clustering.safetensors"
FORMAT = "modeclip.clustering"
FORMAT_VERSION = "2"
"""Version 1 has ``expert_of_fine`` (M,) in place of ``experts_of_fine`` (M, overlap); it is still read."""
_TENSORS = ("fine_centers", "experts_of_fine", "coarse_centers")


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    """Fine clusters and the experts that they belong to."""

    fine_centers: Float[np.ndarray, "M D"]
    """Centres of the fine clusters, float32."""
    experts_of_fine: Int[np.ndarray, "M overlap"]
    """Experts of each fine cluster, int64: the one it was grouped into first, then the next nearest."""
    coarse_centers: Float[np.ndarray, "K D"]
    """Mean of each expert's own fine centres, float32."""

    @property
    def expert_of_fine(self) -> Int[np.ndarray, " M"]:
        """Expert that each fine cluster was grouped into, which is the one that routing uses."""
        return self.experts_of_fine[:, 0]

    @property
    def num_fine(self) -> int:
        """Fine clusters, M."""
        return len(self.fine_centers)

    @property
    def num_experts(self) -> int:
        """Experts, K."""
        return len(self.coarse_centers)

    @property
    def overlap(self) -> int:
        """Experts that each fine cluster belongs to."""
        return int(self.experts_of_fine.shape[1])

    @property
    def range_of_expert(self) -> Float[np.ndarray, " K"]:
        """Mean distance of each expert's fine centres to its coarse centre (MoDE Sec. 5.5)."""
        return _ranges(self.fine_centers, self.expert_of_fine, self.coarse_centers)

    @cached_property
    def digest(self) -> str:
        """Hash of all centres and of which experts the fine clusters belong to, as hexadecimal digits."""
        digest = sha256(FORMAT_VERSION.encode())
        for name in _TENSORS:
            tensor = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path | str) -> None:
        """Write ``clustering.safetensors`` into a folder, which is made. Readers see the old file or the new one."""
        from safetensors.numpy import save_file

        path = Path(folder) / CLUSTERING_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        with replacing(path) as part:
            save_file(tensors, part, metadata={FORMAT: FORMAT_VERSION})  # one entry: the order of two is random

    @classmethod
    def load(cls, folder: Path | str) -> Clustering:
        """Read what `save` wrote.

        Raises:
            ModeclipError: The file is not there, is damaged, or is of another format.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / CLUSTERING_FILE
        again = "cluster again (modeclip cluster)"
        if not path.is_file():
            raise ModeclipError(f"no clustering at {str(path)!r}: make one with modeclip cluster, or correct the path")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = sorted(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ModeclipError(f"clustering {str(path)!r} is damaged ({error}): {again}") from error
        if metadata.get(FORMAT) == "1" and names == ["coarse_centers", "expert_of_fine", "fine_centers"]:
            tensors["experts_of_fine"] = tensors.pop("expert_of_fine")[:, None]
        elif metadata.get(FORMAT) != FORMAT_VERSION or names != sorted(_TENSORS):
            raise ModeclipError(
                f"{str(path)!r} is not a clustering of format {FORMAT_VERSION}: expected {', '.join(_TENSORS)}, "
                f"got format {metadata.get(FORMAT, 'none')} with {', '.join(names) or 'nothing'}: {again}"
            )
        return cls(**tensors)


def group(
    fine_centers: Float[np.ndarray, "M D"],
    num_experts: int,
    *,
    overlap: int = 1,
    max_expert_ratio: float | None = 1.25,
    num_iterations: int = 25,
    seed: int = 0,
) -> Clustering:
    """Group fine centres into experts by balanced k-means.

    Experts are numbered by decreasing range (the order in which the paper trains them), and experts of the same range
    by their first fine cluster.

    Args:
        fine_centers: Centres of the fine clusters.
        num_experts: Experts K, 1 to M.
        overlap: Experts that each fine cluster belongs to, 1 to K.
        max_expert_ratio: Most fine clusters that are grouped into one expert, as a multiple of the mean, 1 or more;
            None: any number.
        num_iterations: Most iterations of k-means.
        seed: Seed of k-means.

    Raises:
        ModeclipError: There are fewer fine clusters than experts, or fewer experts than overlap.
    """
    num_fine = len(fine_centers)
    if not 1 <= num_experts <= num_fine:
        raise ModeclipError(
            f"num_experts: expected 1 to the number of fine clusters, which is {num_fine}, got {num_experts}"
        )
    if not 1 <= overlap <= num_experts:
        raise ModeclipError(f"overlap: expected 1 to num_experts, which is {num_experts}, got {overlap}")
    coarse = kmeans(
        fine_centers,
        num_experts,
        max_size_ratio=max_expert_ratio,
        num_iterations=num_iterations,
        seed=seed,
    )
    centers = coarse.centers.copy()  # k-means assigned rows to these; an expert without rows keeps its one
    for k in np.unique(coarse.assignment):
        centers[k] = fine_centers[coarse.assignment == k].mean(0, dtype=np.float64)
    first = np.full(num_experts, num_fine)
    np.minimum.at(first, coarse.assignment, np.arange(num_fine))
    order = np.lexsort((first, -_ranges(fine_centers, coarse.assignment, centers)))
    number = np.empty_like(order)
    number[order] = np.arange(num_experts)
    experts = _nearest_experts(fine_centers, number[coarse.assignment], centers[order], overlap)
    return Clustering(fine_centers=fine_centers, experts_of_fine=experts, coarse_centers=centers[order])


def _nearest_experts(
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    coarse_centers: Float[np.ndarray, "K D"],
    overlap: int,
) -> Int[np.ndarray, "M overlap"]:
    """Return the experts of each fine centre: its own, then the nearest ones, on a tie the lowest first."""
    experts = np.empty((len(fine_centers), overlap), np.int64)
    for index, (center, own) in enumerate(zip(fine_centers.astype(np.float64), expert_of_fine, strict=True)):
        squares = np.square(coarse_centers - center).sum(1)
        squares[own] = -1
        experts[index] = np.argsort(squares, kind="stable")[:overlap]
    return experts


def _ranges(
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    coarse_centers: Float[np.ndarray, "K D"],
) -> Float[np.ndarray, " K"]:
    """Return the mean distance of each expert's own fine centres to its coarse centre, 0 for an expert without any."""
    distance = np.linalg.norm(fine_centers.astype(np.float64) - coarse_centers[expert_of_fine], axis=1)
    sums = np.bincount(expert_of_fine, weights=distance, minlength=len(coarse_centers))
    return sums / np.maximum(np.bincount(expert_of_fine, minlength=len(coarse_centers)), 1)
