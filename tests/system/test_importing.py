"""Stand-ins for modules become the real ones at their first use, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modeclip.system.importing import without_loading


@pytest.fixture
def _heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("def double(x): return 2 * x\nclass Kind: least = 3\n")
    (tmp_path / "heavy" / "layers.py").write_text("def triple(x): return 3 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "heavy"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_heavy")
def test_is_loaded_at_its_first_use() -> None:
    with without_loading("heavy", "heavy.layers"):
        import heavy as whole  # type: ignore[import-not-found]
        from heavy import Kind
        from heavy.layers import triple  # type: ignore[import-not-found]
    assert "heavy" not in sys.modules
    assert whole.double(4) == 8
    assert triple(4) == 12
    assert Kind.least == 3
    assert isinstance(Kind(), Kind)
    assert isinstance(sys.modules["heavy"].Kind(), Kind)
    assert not isinstance(3, Kind)
    with pytest.raises(AttributeError, match="nothing"):
        whole.nothing()


@pytest.mark.usefixtures("_heavy")
def test_leaves_what_is_loaded_or_missing() -> None:
    import heavy as real  # type: ignore[import-not-found]

    with without_loading("heavy", "no_such_module_here"):
        import heavy as again

        with pytest.raises(ImportError):
            import no_such_module_here  # type: ignore[import-not-found]  # noqa: F401
    assert again is real


def test_open_clip_works_whole() -> None:
    """In a process of its own: nothing heavy is loaded with a plain CLIP, and what needs timm still gets it."""
    code = """
import sys
from modeclip.models.clip import load_clip
load_clip("modeclip-icon-xxs", seed=0)
print([name for name in ("timm", "transformers", "torch._dynamo") if name in sys.modules])
from open_clip.timm_model import TimmModel
print(type(TimmModel("resnet18", 8, image_size=32).trunk).__module__, "timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "timm.models.resnet True"]
