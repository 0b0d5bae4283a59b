"""The READMEs name only what exists."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from kontext_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path for path in ROOT.rglob("README.md") if not path.relative_to(ROOT).parts[0].startswith(".")
)
EXAMPLES = ("runs/", "models/", "data/", "my_folder", "icons", "DIR", "/mnt/")
"""How paths begin that the reader makes."""

pages = pytest.mark.parametrize("page", READMES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> list[list[str]]:
    """The kontext_jax commands of a page, as (module, arguments...)."""
    pattern = r"(?:python -m (kontext_jax[\w.]+)|\bkontext ([a-z]+)) +(--[^`#)]*)"
    found = []
    for match in re.finditer(pattern, page.read_text()):
        module = match[1] or COMMANDS[match[2]][0]
        found.append([module, *match[3].splitlines()[0].split()])
    return found


def test_there_is_a_page_beside_what_it_describes():
    folders = {str(page.parent.relative_to(ROOT)) for page in READMES}
    places = ("weights", "evaluation", "objectives")
    assert folders >= {".", "configs", "launch", *(f"kontext_jax/{place}" for place in places)}


@pages
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, target


@pages
def test_paths_exist(page):
    """Paths in code spans, relative to the repository, to the page, or by the file's name alone."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {Path(path).name for path in tracked}
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for span in re.findall(r"`([^`]+)`", text):
        path = span.split(":")[0].split("=")[-1]
        if not re.fullmatch(r"[\w./*-]+\.(py|sh|md)|[\w.-]+/[\w./-]*", path):
            continue
        if path.startswith(EXAMPLES) or "/SET/" in path or "X.py" in path:
            continue
        found = [*ROOT.glob(path), *page.parent.glob(path)] or path in names
        assert found, span


@pages
def test_modules_and_verbs_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m (kontext_jax(?:\.[a-z_]+)+)\b", text):
        assert importlib.util.find_spec(module), module
    for verb in re.findall(r"^kontext ([a-z]+)", text, re.M):
        assert verb in COMMANDS, verb


@pages
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections still uses it
def test_configs_and_their_settings_exist(page):
    for module, *arguments in commands(page):
        values = [argument for argument in arguments if argument.startswith("--config")]
        if values:
            holder = flags.FlagValues()
            config_flags.DEFINE_config_file("config", flag_values=holder)
            holder([module, *values])
            assert holder.config is not None


@pages
def test_flags_exist(page):
    for module, *arguments in commands(page):
        source = Path(importlib.util.find_spec(module).origin).read_text()
        for argument in arguments:
            name = argument.split("=")[0].strip("-")
            if argument.startswith("--") and not name.startswith("config"):
                assert re.search(rf'"{name.removeprefix("no")}"|"{name}"', source), (module, name)
