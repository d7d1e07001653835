"""The notebook: its text twin says the same, and it runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

COLAB = Path(__file__).parent.parent / "colab"

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")


def cells(name):
    return [(c.cell_type, c.source) for c in jupytext.read(COLAB / name).cells]


def test_the_text_twin_is_the_notebook():
    """After a change to the twin: jupytext --to ipynb colab/quickstart.py"""
    assert cells("quickstart.ipynb") == cells("quickstart.py")
    assert not any(c.get("outputs") for c in jupytext.read(COLAB / "quickstart.ipynb").cells)


def test_it_runs_from_top_to_bottom(smollm2_path):
    notebook = jupytext.read(COLAB / "quickstart.ipynb")
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3").execute()
    outputs = [out for c in notebook.cells for out in c.get("outputs", [])]
    text = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "Paris" in text
    assert "the same text: True" in text
    assert any("image/png" in out.get("data", {}) for out in outputs)
