"""What the documents say of the repository: files, modules, the direction of imports, code that compiles, numbers."""

import ast
import re

import pytest

from jaxnets import summary

DOCUMENTS = ("README.md", "BUILD.md", "benchmarks/README.md")
# BUILD.md's "Imports go one way": each layer, and what none of it may import.
LAYERS = {
    "jaxnets/ops": ("models", "data", "augment", "optim", "state", "step", "settings", "plan", "loop"),
    "jaxnets/models": ("data", "augment", "optim", "state", "step", "settings", "plan", "loop"),
    "jaxnets/data.py": ("step", "settings", "checkpoint", "evaluator", "plan", "dispatch", "epochs", "loop"),
    "jaxnets/augment.py": ("data", "step", "settings", "checkpoint", "plan", "loop"),
    "jaxnets/optim.py": ("data", "step", "settings", "checkpoint", "plan", "loop"),
    "jaxnets/state.py": ("data", "step", "settings", "checkpoint", "plan", "loop"),
    "jaxnets/restore.py": ("evaluator", "trained_run", "plan", "dispatch", "epochs", "loop"),
    "jaxnets/trained_run.py": ("plan", "dispatch", "epochs", "loop"),
    "jaxnets/step.py": ("settings", "checkpoint", "evaluator", "plan", "dispatch", "epochs", "loop"),
    "jaxnets/checkpoint.py": ("evaluator", "plan", "dispatch", "epochs", "loop"),
    "jaxnets/evaluator.py": ("plan", "dispatch", "epochs", "loop"),
    "jaxnets/plan.py": ("dispatch", "epochs", "loop"),
    "jaxnets/dispatch.py": ("epochs", "loop"),
    "jaxnets/epochs.py": ("loop",),
    "jaxnets/torch_weights.py": ("data", "settings", "step", "plan", "loop"),
    "jaxnets/weights": ("data", "settings", "step", "plan", "loop", "torch_weights"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_linked_to_is_there(repository, name):
    document = repository / name
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.read_text())
    paths = [link.split("#")[0] for pair in links for link in pair if link and "://" not in link]
    missing = [path for path in paths if path and not (document.parent / path).exists()]
    assert paths and not missing


def test_every_link_within_readme_leads_to_a_heading(repository):
    text = (repository / "README.md").read_text()
    lines = re.findall(r"^#+ (.*)", text, re.M)
    headings = {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_code_in_readme_compiles(repository):
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        ast.parse(block)


def test_build_names_every_module(repository):
    """So that any piece is found from there."""
    text = (repository / "BUILD.md").read_text()
    files = [*(repository / "jaxnets").glob("*.py"), *(repository / "jaxnets/weights").glob("*.py")]
    modules = [path.name for path in files if path.name != "__init__.py"]
    assert len(modules) > 60
    assert not [name for name in modules if not re.search(rf"\b{re.escape(name)}\b", text)]


def imported(path):
    """The modules of jaxnets, by their first name, and the libraries that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("jaxnets.").split(".")[0] for name in names}
    return found


@pytest.mark.parametrize("place", LAYERS)
def test_imports_go_one_way(repository, place):
    path = repository / place
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & set(LAYERS[place]), file


def test_no_model_operator_or_step_reads_a_configuration(repository):
    files = [*(repository / "jaxnets/ops").rglob("*.py"), *(repository / "jaxnets/models").rglob("*.py")]
    for file in [*files, *(repository / f"jaxnets/{name}.py" for name in ("step", "state", "augment", "optim"))]:
        assert "ml_collections" not in imported(file), file


@pytest.mark.parametrize("name", ["mobilenet_v1_cifar", "mobilenet_v2_cifar", "squeezenet1_1_cifar"])
def test_readmes_table_has_the_nets_sizes(repository, name):
    row = re.search(rf"^\| {name} \| (\d+) \| ([\d,]+) \| (\d+) \|", (repository / "README.md").read_text(), re.M)
    ours = summary.summarize(name)
    assert (f"{ours.image_size}", f"{ours.parameters:,}", f"{ours.macs / 1e6:.0f}") == row.groups()
