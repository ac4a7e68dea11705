"""Payloads at every place that opens a model: each would leave a mark if it ran, and each is refused in one line.

`test_the_payloads_work` opens the same folders with the libraries alone and their trust, so a payload that could not
run at all is noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import save_bundle
from modeclip.models.clip import load_clip
from modeclip.models.encoders import load_encoder
from support import noise_picture, unit_rows, write_pairs

MARK = "mark.txt"
EVIL = f"""
import os
from transformers import BertConfig, BertModel, BertTokenizerFast
open({MARK!r}, "w").close()
class Tokenizer(BertTokenizerFast):
    pass
class Config(BertConfig):
    model_type = "evil"
class Model(BertModel):
    config_class = Config
class Module:
    def __init__(self, *a, **k):
        pass
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "cat", "dog"]
TOWERS: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
Command = Callable[..., CompletedProcess[str]]


class Pickled:
    """Leaves the mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are left here; Python code of a folder is copied to a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def model_folder(folder: Path, *, seed: int = 0, text: dict[str, Any] | None = None) -> Path:
    """A real open_clip folder with random weights; ``text`` changes what its settings say of the text tower."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(open_clip.CLIP(**TOWERS).state_dict(), folder / "open_clip_model.safetensors")
    towers = TOWERS | {"text_cfg": TOWERS["text_cfg"] | (text or {})}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": {}}))
    return folder


def put_tokenizer(folder: Path, *, evil: bool = True) -> None:
    """A tokenizer of transformers, and code beside it that its settings name."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    named = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}} if evil else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | named))
    (folder / "evil.py").write_text(f"{EVIL}# {folder}")  # what was imported once does not run again


def trusting(folder: Path) -> Path:
    """The settings themselves ask for trust."""
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    put_tokenizer(model_folder(folder, text=text))
    return folder


def mapped(folder: Path) -> Path:
    """The tokenizer names code; transformers would ask on a terminal."""
    put_tokenizer(model_folder(folder, text={"hf_tokenizer_name": "x"}))
    return folder


def elsewhere(folder: Path) -> Path:
    """The text tower is another folder, whose settings name code."""
    put_bert(folder.parent / "tower")
    return model_folder(folder, text={"hf_model_name": str(folder.parent / "tower"), "hf_tokenizer_name": "x"})


def pickled(folder: Path) -> Path:
    """Weights that are a pickle of code."""
    model_folder(folder)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"a": Pickled()}, folder / "open_clip_pytorch_model.bin")
    return folder


def linked(folder: Path) -> Path:
    """Weights that are a link to a place outside of the folder."""
    model_folder(folder)
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "open_clip_model.safetensors", outside)
    (folder / "open_clip_model.safetensors").symlink_to(outside)
    return folder


def from_timm(folder: Path) -> Path:
    """An image tower that timm would build from another folder."""
    content = json.loads((model_folder(folder) / "open_clip_config.json").read_text())
    content["model_cfg"]["vision_cfg"] = {"timm_model_name": f"local-dir:{folder}", "image_size": 32}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def put_bert(folder: Path, *, evil: bool = True) -> Path:
    """A tiny BERT with its tokenizer; the settings of an evil one name code for the model."""
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(**shape, vocab_size=len(WORDS))).save_pretrained(folder)
    put_tokenizer(folder, evil=False)
    if evil:
        content = json.loads((folder / "config.json").read_text())
        content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def put_sentences(folder: Path, kind: str) -> Path:
    """A sentence-transformers folder with one payload."""
    put_bert(folder, evil=kind == "model")
    put_tokenizer(folder, evil=kind == "tokenizer")
    pooling = "evil.Module" if kind == "module" else "sentence_transformers.models.Pooling"
    types = {"": "sentence_transformers.models.Transformer", "1_Pooling": pooling}
    modules = [{"idx": k, "name": str(k), "path": path, "type": name} for k, (path, name) in enumerate(types.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8}))
    arguments = {"model_args": {"trust_remote_code": True}} if kind == "arguments" else {}
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16} | arguments))
    return folder


FOLDERS = [trusting, mapped, elsewhere, pickled, linked, from_timm]
SENTENCES = ["model", "tokenizer", "module", "arguments"]


def put_in_hub(folder: Path, hub_id: str) -> None:
    """Move a folder to where the Hub's download cache has it."""
    repository, commit = Path("hub") / f"models--{hub_id.replace('/', '--')}", "0" * 40
    (repository / "snapshots").mkdir(parents=True)
    shutil.move(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def pairs(folder: Path, command: Command) -> Path:
    """A small catalog."""
    from io import BytesIO

    images = []
    for seed in range(4):
        noise_picture(seed).save(buffer := BytesIO(), "PNG")
        images.append(buffer.getvalue())
    write_pairs(folder / "pairs", images, ["a cat", "a dog", "a cat and a dog", "no cat"])
    done = command("index", folder / "pairs", "--out", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


def is_refused(done: CompletedProcess[str]) -> str:
    assert not Path(MARK).exists(), "the payload ran"
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("modeclip: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_a_model_folder_is_refused_everywhere(
    make: Callable[[Path], Path], tmp_path: Path, modeclip_command: Command
) -> None:
    folder = make(tmp_path / "model")
    catalog = pairs(tmp_path, modeclip_command)
    noise_picture(0).save(tmp_path / "one.png")
    (tmp_path / "task" / "cat").mkdir(parents=True)
    noise_picture(1).save(tmp_path / "task" / "cat" / "1.png")
    other = model_folder(tmp_path / "other", seed=1)
    words: dict[str, list[object]] = {
        "evaluate": [folder, "--tasks", tmp_path / "task"],
        "finetune": [folder, catalog, "--out", tmp_path / "tuned"],
        "merge": [other, folder, "--out", tmp_path / "merged"],
        "train": [catalog, "--model", folder, "--out", tmp_path / "trained", "--samples", "8", "--batch-size", "4"],
        "embed": [catalog, "--encoder", f"clip:{folder}"],
    }
    for name, given in words.items():
        is_refused(modeclip_command(name, *given))
    put_in_hub(folder, "org/evil")
    is_refused(modeclip_command("evaluate", "hf-hub:org/evil", "--tasks", tmp_path / "task"))
    is_refused(modeclip_command("embed", catalog, "--encoder", "clip:hf-hub:org/evil"))


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_an_expert_of_a_bundle_is_refused(
    make: Callable[[Path], Path], tmp_path: Path, modeclip_command: Command
) -> None:
    """The hashes of the bundle match, since whoever makes a bundle makes its hashes."""
    model_folder(tmp_path / "good")
    save_bundle(
        tmp_path / "bundle",
        models={"seed": tmp_path / "good", "expert-0": tmp_path / "good"},
        fine_centers=unit_rows(2, 384),
        expert_of_fine=np.zeros(2, np.int64),
        cards={
            "fine": [{"index": k, "size": 1, "keywords": ["a"], "nearest_captions": ["a"]} for k in range(2)],
            "experts": [{"index": 0, "size": 2, "keywords": ["a"]}],
        },
        manifest={
            "name": "evil",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": {},
        },
    )
    noise_picture(0).save(tmp_path / "one.png")
    whole = modeclip_command("classify", tmp_path / "bundle", tmp_path / "one.png", "--classes", "cat,dog")
    assert whole.returncode == 0, whole.stderr
    shutil.rmtree(tmp_path / "bundle" / "expert-0")
    make(tmp_path / "bundle" / "expert-0")
    manifest = json.loads((tmp_path / "bundle" / "mode.json").read_text())
    from modeclip.system.files import hash_files

    files = sorted(path for path in (tmp_path / "bundle").rglob("*") if path.is_file() and path.name != "mode.json")
    manifest["sha256"] = hash_files(tmp_path / "bundle", files)
    (tmp_path / "bundle" / "mode.json").write_text(json.dumps(manifest))
    (tmp_path / "task" / "cat").mkdir(parents=True)
    noise_picture(1).save(tmp_path / "task" / "cat" / "1.png")
    is_refused(modeclip_command("classify", tmp_path / "bundle", tmp_path / "one.png", "--classes", "cat,dog"))
    is_refused(modeclip_command("evaluate", tmp_path / "bundle", "--tasks", tmp_path / "task"))
    is_refused(modeclip_command("merge", tmp_path / "bundle", "--out", tmp_path / "merged"))


@pytest.mark.parametrize("kind", SENTENCES)
def test_an_encoder_folder_is_refused(kind: str, tmp_path: Path, modeclip_command: Command) -> None:
    folder, catalog = put_sentences(tmp_path / "encoder", kind), pairs(tmp_path, modeclip_command)
    is_refused(modeclip_command("embed", catalog, "--encoder", folder))
    if kind in {"model", "tokenizer"}:
        is_refused(modeclip_command("embed", catalog, "--encoder", f"simcse:{folder}"))
    put_in_hub(folder, "org/evil")
    is_refused(modeclip_command("embed", catalog, "--encoder", "org/evil"))


def test_a_checkpoint_that_is_a_pickle_of_code_is_refused(tmp_path: Path, modeclip_command: Command) -> None:
    torch.save({"state_dict": {"a": Pickled()}}, tmp_path / "w.pt")
    (tmp_path / "task" / "cat").mkdir(parents=True)
    noise_picture(1).save(tmp_path / "task" / "cat" / "1.png")
    is_refused(modeclip_command("evaluate", f"modeclip-icon-xxxs@{tmp_path / 'w.pt'}", "--tasks", tmp_path / "task"))


def test_the_payloads_work(tmp_path: Path) -> None:
    """With the libraries' own trust each of them leaves its mark."""

    def leaves_mark(name: str, run: Callable[[], object]) -> None:
        with suppress(Exception):  # only that it ran is of interest
            run()
        assert Path(MARK).exists(), name
        Path(MARK).unlink()

    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    leaves_mark("settings", lambda: open_clip.get_tokenizer(f"local-dir:{trusting(tmp_path / 'a')}"))
    folder = mapped(tmp_path / "b")
    leaves_mark("tokenizer", lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    bert = put_bert(tmp_path / "c")
    leaves_mark("model", lambda: AutoModel.from_pretrained(bert, trust_remote_code=True))
    for kind in ("model", "tokenizer", "module"):
        sentences = put_sentences(tmp_path / kind, kind)
        leaves_mark(kind, lambda folder=sentences: SentenceTransformer(str(folder), trust_remote_code=True))  # type: ignore[misc]
    torch.save({"a": Pickled()}, tmp_path / "w.pt")
    leaves_mark("pickle", lambda: torch.load(tmp_path / "w.pt", weights_only=False))


def test_whole_folders_still_open(tmp_path: Path) -> None:
    """What the payloads are put into is a model that opens."""
    assert load_clip(model_folder(tmp_path / "plain")).tokens(["a"]).shape == (1, 16)
    put_tokenizer(model_folder(tmp_path / "named", text={"hf_tokenizer_name": "x"}), evil=False)
    assert load_clip(tmp_path / "named").tokens(["cat"])[0, 1] == WORDS.index("cat")
    assert load_encoder(str(put_sentences(tmp_path / "sentences", ""))).encode(["cat", "dog"]).shape == (2, 8)
    put_in_hub(tmp_path / "plain", "org/plain")
    assert load_clip("hf-hub:org/plain").tokens(["a"]).shape == (1, 16)


def test_a_text_tower_of_the_hub_is_checked_before_it_is_built(tmp_path: Path) -> None:
    """open_clip would fetch and build it by itself; the tokenizer is that of a third repository."""
    text = {
        "hf_model_name": "org/tower",
        "hf_tokenizer_name": "org/words",
        "context_length": 16,
        "hf_proj_type": "linear",
    }
    put_bert(tmp_path / "tower", evil=False)
    towers = TOWERS | {"text_cfg": text | {"hf_model_name": str(tmp_path / "tower"), "hf_model_pretrained": False}}
    model = open_clip.CustomTextCLIP(**towers)
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "open_clip_model.safetensors")
    config = {"model_cfg": TOWERS | {"text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "words").mkdir()
    put_tokenizer(tmp_path / "words", evil=False)
    for name in ("tower", "model", "words"):
        put_in_hub(tmp_path / name, f"org/{name}")
    clip = load_clip("hf-hub:org/model")
    assert clip.tokens(["cat"])[0, 1] == WORDS.index("cat")
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in clip.model.state_dict().items())
    for name, change in (("tower", put_bert), ("words", put_tokenizer)):
        folder = next((tmp_path / "hub" / f"models--org--{name}" / "snapshots").iterdir())
        shutil.copytree(folder, tmp_path / "before")
        change(folder)
        with pytest.raises(ModeclipError, match="auto_map would run code"):
            load_clip("hf-hub:org/model")
        shutil.rmtree(folder)
        shutil.move(tmp_path / "before", folder)
    assert not Path(MARK).exists()
