"""What cannot succeed is refused in one line before a model is built: each cause once, on real catalogs."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import Checkpoint, save_checkpoint
from modeclip.models.clip import load_clip, save_clip
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob
from modeclip.training.objectives.siglip import Sigmoid
from modeclip.training.preflight import check_negatives, preflight, share_without_negative
from support import make_job, plain_png, write_pairs

CONFIG = TrainConfig(samples=32 * 32, batch_size=32, engine=EngineConfig(precision="32-true"))


@pytest.fixture(scope="module")
def icons(icons_catalog: Path) -> Path:
    return icons_catalog


@pytest.fixture(scope="module")
def catalog(icons: Path) -> Catalog:
    return Catalog.open(icons)


@pytest.fixture
def job(icons: Path, tmp_path: Path) -> TrainJob:
    return make_job(icons, tmp_path / "expert-1", CONFIG)


def changed(job: TrainJob, engine: dict[str, Any] | None = None, **settings: Any) -> TrainJob:
    config = replace(job.config, engine=replace(job.config.engine, **(engine or {})), **settings)
    return replace(job, config=config)


def refused(job: TrainJob, catalog: Catalog, message: str, num_rows: int = 200, world_size: int = 1) -> None:
    with pytest.raises(ModeclipError, match=message) as raised:
        preflight(job, catalog, np.arange(num_rows), world_size)
    assert "\n" not in str(raised.value)


def test_good_job_passes_soon_and_leaves_nothing(job: TrainJob, catalog: Catalog) -> None:
    rows = np.arange(len(catalog))
    preflight(job, catalog, rows, 2)
    started = time.process_time()
    preflight(job, catalog, rows, 1)
    assert time.process_time() - started < 2  # about 0.1 s
    assert not Path(job.folder).exists()


class TestNegatives:
    """Captions of 12 pairs: all the same, or one that differs."""

    @pytest.fixture
    def same(self, tmp_path: Path) -> Catalog:
        pictures = [plain_png(grey) for grey in range(12)]
        index(DataConfig(source=str(write_pairs(tmp_path / "same", pictures, ["a cat"] * 12))), tmp_path / "s")
        return Catalog.open(tmp_path / "s")

    @pytest.fixture
    def nearly(self, tmp_path: Path) -> Catalog:
        pictures = [plain_png(grey) for grey in range(12)]
        index(
            DataConfig(source=str(write_pairs(tmp_path / "near", pictures, ["a cat"] * 11 + ["a dog"]))), tmp_path / "n"
        )
        return Catalog.open(tmp_path / "n")

    def test_one_caption_that_masks_itself(self, job: TrainJob, same: Catalog) -> None:
        masked = changed(job, mask_same_captions=True, batch_size=4)
        refused(masked, same, r"all 12 pairs have the same caption \('a cat'\).*nothing can be learned; add pairs", 12)

    def test_one_caption_without_the_mask_is_a_warning(self, job: TrainJob, same: Catalog) -> None:
        warning = check_negatives(changed(job, batch_size=4), same, np.arange(12))
        assert "all 12 pairs have the same caption ('a cat'), so that every negative is a false one" in warning

    def test_batches_that_mask_themselves_are_counted(self, job: TrainJob, nearly: Catalog) -> None:
        """A cat's batch of 4 has no dog among 3 of its 11 others with a chance of 8 / 11; so 8 / 12 of all pairs."""
        masked = changed(job, mask_same_captions=True, batch_size=4)
        assert "66.7 % of the pairs meet no pair with another caption in their batch of 4" in check_negatives(
            masked, nearly, np.arange(12)
        )
        assert check_negatives(changed(masked, batch_size=12), nearly, np.arange(12)) == ""
        assert check_negatives(changed(job, batch_size=4), nearly, np.arange(12)) == ""

    def test_groups(self, job: TrainJob, nearly: Catalog) -> None:
        facts = {"made by": "the test"}
        nearly.add_columns(
            {"one": np.arange(12), "pair": np.arange(12) // 2, "odd": np.minimum(np.arange(12), 9)}, facts
        )
        nearly.add_columns({"part": np.linspace(0, 1, 12), "few": pa.array([1, None] * 6)}, facts)
        refused(changed(job, groups="one", batch_size=4), nearly, r"each of the 12 pairs has a number of its own", 12)
        warning = check_negatives(changed(job, groups="odd", batch_size=4), nearly, np.arange(12))
        assert "75.0 % of the pairs are alone in their group (odd)" in warning
        assert check_negatives(changed(job, groups="pair", batch_size=4), nearly, np.arange(12)) == ""
        for name, message in (
            ("none", "column of .*'none'; known: .*pair"),
            ("part", "train.groups: column 'part' holds double, expected whole numbers"),
            ("few", "train.groups: column 'few' has no value for 6 of 12 pairs"),
        ):
            refused(changed(job, groups=name, batch_size=4), nearly, message, 12)

    @pytest.mark.parametrize(("counts", "batch"), [([3, 2, 1], 2), ([4, 1], 3), ([2, 2, 2], 3), ([5], 2), ([1, 1], 2)])
    def test_the_share_is_that_of_all_batches(self, counts: list[int], batch: int) -> None:
        pairs = [caption for caption, count in enumerate(counts) for _ in range(count)]
        batches = list(combinations(range(len(pairs)), batch))
        lonely = sum(batch for chosen in batches if len({pairs[pair] for pair in chosen}) == 1)
        assert share_without_negative(counts, batch) == pytest.approx(lonely / (len(batches) * batch))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_model_larger_than_memory(job: TrainJob, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B-32 has 151 million parameters: 605 MB of weights, four times that in training."""
    monkeypatch.setattr("modeclip.training.preflight.physical_memory", lambda: 10**9)
    refused(
        changed(job, model="ViT-B-32"), catalog, r"ViT-B-32 need 2\.4 GB, this machine has 1\.0 GB; choose a smaller"
    )


def test_batch(job: TrainJob, catalog: Catalog) -> None:
    refused(job, catalog, r"cannot be divided .* 5 processes; .*such as 35", 200, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_precision_that_needs_a_gpu(job: TrainJob, catalog: Catalog) -> None:
    refused(changed(job, {"precision": "16-mixed"}), catalog, "is 16-mixed, which needs a GPU")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-33", "unknown model 'ViT-B-33'; known: modeclip-icon"),
        ("ViT-B-32@laion3b", "tag of ViT-B-32 'laion3b'.*nearest: laion"),
        ("ViT-B-32@openai", "trained with QuickGELU.*write ViT-B-32-quickgelu@openai"),
        ("modeclip-icon@weights.pt", "there is no file weights.pt"),
    ],
)
def test_model(job: TrainJob, catalog: Catalog, model: str, message: str) -> None:
    refused(changed(job, model=model), catalog, message)


def test_columns(job: TrainJob, catalog: Catalog) -> None:
    refused(replace(job, where={"expert": 1}), catalog, "column .*expert-1 .*'expert'.*known: key")
    refused(replace(job, mask="good"), catalog, "'good'; known: key, caption")


def test_start_that_is_missing(job: TrainJob, catalog: Catalog, tmp_path: Path) -> None:
    refused(
        replace(job, start_from=str(tmp_path / "seed")),
        catalog,
        r"start_from \S+seed does not exist.*train that model first",
    )
    (tmp_path / "seed").mkdir()
    refused(replace(job, start_from=str(tmp_path / "seed")), catalog, "holds no checkpoint of the job that this one")
    refused(replace(job, start_from=str(tmp_path / "x.pt")), catalog, r"x\.pt does not exist")


def test_start_of_another_model(job: TrainJob, catalog: Catalog, tmp_path: Path) -> None:
    model = load_clip("modeclip-icon", seed=0).model.state_dict()
    seed = Checkpoint(step=3, digest="seed", model=model, optimizer={}, facts={})
    save_checkpoint(tmp_path / "seed", seed, keep=1)
    torch.save({"state_dict": model}, tmp_path / "epoch_3.pt")
    for start in (tmp_path / "seed", tmp_path / "epoch_3.pt"):
        good = replace(job, start_from=str(start))
        preflight(good, catalog, np.arange(200), 1)
        refused(changed(good, loss="siglip"), catalog, r"another model.*missing: logit_bias.*set train\.model")
        refused(
            changed(good, model="ViT-B-32"),
            catalog,
            r"missing: .* and 201 more; other shape: .* instead of \(512,.* and 94 more",
        )
    refused(
        replace(job, start_from=str(tmp_path / "seed"), start_digest="other"), catalog, "holds no checkpoint of the"
    )


def test_own_checkpoint_makes_the_start_needless(job: TrainJob, catalog: Catalog, tmp_path: Path) -> None:
    job = replace(job, start_from=str(tmp_path / "gone"))
    model = load_clip("modeclip-icon", seed=0).model.state_dict()
    own = Checkpoint(step=3, digest=job.digest, model=model, optimizer={}, facts={})
    path = save_checkpoint(Path(job.folder), own, keep=1)
    preflight(job, catalog, np.arange(200), 1)
    path.write_bytes(path.read_bytes()[:-100])
    refused(job, catalog, r"step-000000003\.safetensors is damaged")


def test_model_folder_of_ours_is_a_model(job: TrainJob, catalog: Catalog, tmp_path: Path) -> None:
    save_clip(load_clip("modeclip-icon", seed=0, logit_start=Sigmoid.logit_start), tmp_path / "model")
    preflight(changed(job, model=str(tmp_path / "model"), loss="siglip"), catalog, np.arange(200), 1)


def test_empty_captions(job: TrainJob, icons: Path, tmp_path: Path) -> None:
    import lance

    catalog = Catalog.open(icons)
    table = catalog.dataset.to_table()
    captions = [" " if row in {5, 7} else text.as_py() for row, text in enumerate(table["caption"])]
    table = table.set_column(table.schema.get_field_index("caption"), "caption", [captions])
    lance.write_dataset(table, tmp_path / "catalog.lance", schema=catalog.dataset.schema)
    key = catalog.read(["key"], np.array([5]))["key"][0]
    refused(
        job, Catalog.open(tmp_path / "catalog.lance"), rf"2 of 200 captions .*empty \({key}, .*leave these pairs out"
    )


def test_images_that_do_not_decode(job: TrainJob, catalog: Catalog, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pairs = catalog.read(["caption"], np.arange(40))["caption"]
    for row, (image, caption) in enumerate(zip(catalog.images(np.arange(40)), pairs, strict=True)):
        image.save(source / f"{row:02}.png")
        (source / f"{row:02}.txt").write_text(caption)
    index(DataConfig(source=str(source)), tmp_path / "out")
    own = Catalog.open(tmp_path / "out")
    preflight(job, own, np.arange(len(own)), 1)
    (source / "00.png").unlink()
    (source / "39.png").write_bytes((source / "39.png").read_bytes()[:60])
    refused(job, own, r"2 of 32 images .*cannot be read \(\S*00\S*, \S*39\S*\).*missing.*bring the file back", 40)


def test_disk_too_small_for_the_checkpoints(job: TrainJob, catalog: Catalog) -> None:
    many = changed(job, {"keep_checkpoints": 10**9})
    refused(many, catalog, r"checkpoints need \S+ GB in \S+expert-1.*keep_checkpoints")


def test_pairs_are_looked_at_only_in_part(job: TrainJob, catalog: Catalog) -> None:
    """However many rows there are, the same number is read (here rows repeat, to have a million)."""
    rows = np.sort(np.tile(np.arange(len(catalog)), 1_000_000 // len(catalog)))
    started = time.process_time()
    preflight(job, catalog, rows, 1)
    assert time.process_time() - started < 2
