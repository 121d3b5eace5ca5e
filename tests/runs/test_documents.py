"""What the documents show works: Python is run, files are put where they say, commands compose."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from prune_cli.config.compose import compose

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "scripts/README.md", "prune_cli/README.md"]
TINY = ("limit_batches=1", "dataset.fake=true", "latency=false", "device=cpu")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def files(document: str) -> dict[str, str]:
    """Name of a file, from a block's first comment -> its content."""
    named = {}
    for language in ("python", "yaml"):
        for block in blocks(document, language):
            if found := re.match(r"# (\S+\.(?:py|yaml))\n", block):
                named[found[1]] = block[found.end() :] if language == "yaml" else block
    return named


@pytest.fixture
def written(workplace):
    """Puts the files of a document into the working directory, and forgets their modules afterwards."""
    made = []

    def write(document: str) -> dict[str, str]:
        for name, content in files(document).items():
            path = workplace / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            made.append(path.stem)
        sys.path.insert(0, str(workplace))
        importlib.invalidate_caches()
        return files(document)

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_the_python_of_the_readme_keeps_its_promises(workplace):
    (block,) = [block for block in blocks("README.md", "python") if "load_pruned" in block]
    (workplace / "readme.py").write_text(block)
    names = runpy.run_path(str(workplace / "readme.py"))
    small, again, image = names["small"], names["again"], names["example_inputs"]
    assert torch.equal(small.eval()(image), again.eval()(image))
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in names["model"].parameters())


def test_the_criterion_of_the_readme_runs(prune, written):
    assert set(written("README.md")) == {"my_scores.py", "recipes/criterion/smallest.yaml"}
    result = prune("run", "recipe=quickstart", "criterion=smallest", *TINY)
    assert result.code == 0, result.err


EXTENSIONS = [
    (name, found[1]) for name, text in files("CONTRIBUTING.md").items() if (found := re.search(r"^# try: prune (.+)$", text, re.M))
]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), EXTENSIONS, ids=[name for name, _ in EXTENSIONS])
def test_every_extension_of_contributing_runs(prune, written, name, command):
    written("CONTRIBUTING.md")
    tiny = re.search(r"^# tiny: (.+)$", files("CONTRIBUTING.md")[name], re.M)
    result = prune(*shlex.split(command), *TINY, *(shlex.split(tiny[1]) if tiny else ()))
    assert result.code == 0, result.err


def test_contributing_shows_every_kind_of_extension():
    shown = {Path(name).parent.name for name, _ in EXTENSIONS}
    assert shown == {"criterion", "granularity", "schedule", "distillation", "recipe"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_compose(document, workplace):
    for line in "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] in (["prune", "run"], ["prune", "show"]) and "<time>" not in line and "..." not in line:
            given = [word for word in words[2:] if not word.startswith("-")]
            if "-m" in words:
                given = [word.split(",")[0] if "[" not in word else word for word in given]
            assert compose(given).config["stages"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
