"""docs/configuration.md is what scripts/generate_config_docs.py writes."""

import importlib.util
from pathlib import Path

import pytest

from chatlearn.config.chatlearn_keys import UNSUPPORTED
from chatlearn.config.guards import GuardsConfig
from chatlearn.config.schema import AlgorithmConfig, GenerationConfig, ModelConfig, RuntimeConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "configuration.md"


@pytest.fixture
def generator():
    path = ROOT / "scripts" / "generate_config_docs.py"
    spec = importlib.util.spec_from_file_location("generate_config_docs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(generator):
    assert generator.main(["--check"]) == 0


def test_a_stale_page_fails_the_check_until_it_is_written(generator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "TARGET", tmp_path / "docs" / "configuration.md")
    assert generator.main(["--check"]) == 1
    assert "is not current: run python scripts/generate_config_docs.py" in capsys.readouterr().err
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    generator.TARGET.write_text("old", encoding="utf-8")
    assert generator.main(["--check"]) == 1


@pytest.mark.parametrize(
    "kind", [ModelConfig, GenerationConfig, RuntimeConfig, AlgorithmConfig, GuardsConfig]
)
def test_every_key_has_a_row_with_a_meaning(kind):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for key in kind.model_fields:
        rows = [line for line in lines if line.startswith(f"| `{key}` |")]
        assert rows, key
        assert all(row.split("|")[-2].strip() for row in rows), key


def test_every_refused_key_has_a_row():
    text = PAGE.read_text(encoding="utf-8")
    assert "| `rlhf` | the section is called runtime |" in text
    assert all(f"| `runtime.{key}` | " in text for key in UNSUPPORTED["runtime"])
    assert all(f"| `models.<name>.{key}` | " in text for key in UNSUPPORTED["models"])
