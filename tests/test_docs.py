"""What the documentation names exists."""

import importlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
METHOD = (ROOT / "docs" / "method.md").read_text()
SECTION = METHOD.split("## Equation, function, test")[1].split("\n## ")[0]
TABLE = [line for line in SECTION.splitlines() if line.startswith("| ")][1:]


def test_every_equation_has_a_function_and_a_test():
    assert len(TABLE) >= 11
    for line in TABLE:
        _, _, functions, tests = [cell.strip() for cell in line.strip("|").split("|")]
        assert re.search(r"`\w", functions) and "`test_" in tests, line


@pytest.mark.parametrize("name", sorted({name for line in TABLE for name in re.findall(r"`(\w+\.\w+)`", line)}))
def test_functions_exist(name):
    if name.endswith(".py"):
        assert (ROOT / "tests" / name).exists()
        return
    owner, attribute = name.split(".")
    modules = (
        "episodes",
        "scoring",
        "continuations",
        "proxy",
        "compression",
        "sharding",
        "advantages",
        "l2t_trainer",
    )
    if owner in modules:
        assert hasattr(importlib.import_module(f"l2t_trl.{owner}"), attribute)
    else:
        owners = [getattr(importlib.import_module(f"l2t_trl.{module}"), owner, None) for module in modules]
        assert any(hasattr(one, attribute) for one in owners if one is not None), name


def test_named_tests_exist():
    for line in TABLE:
        for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)", line):
            source = (ROOT / "tests" / file).read_text()
            for name in re.findall(r"`(test_\w+)`", names):
                assert f"def {name}(" in source, (file, name)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_and_commands_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_pages_hold_no_gaps():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(), page
