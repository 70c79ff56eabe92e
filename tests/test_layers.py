"""The layers that CONTRIBUTING.md promises: who may import whom, read from the source of every file."""

import ast
import graphlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "triton_kernels", "osdn_jax")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# Modules of one concern that any of the upper layers may use, and that know no layer.
SHARED = {"_errors", "_files", "_optional", "_versions", "command", "console", "hardware", "plotting", "progress"}
SHARED = {f"osdn_jax.{name}" for name in SHARED}
LAYERS = {
    "pallas_kernels": set(),
    "triton_kernels": {"pallas_kernels"},
    **dict.fromkeys(SHARED, SHARED),
    "osdn_jax.ops": {"pallas_kernels", "triton_kernels"},
    "osdn_jax.nn": {"osdn_jax.ops"},
    "osdn_jax.data": SHARED,
    "osdn_jax.interop": {"osdn_jax.nn", "osdn_jax.data", *SHARED},
    "osdn_jax.compare": {"osdn_jax.ops", *SHARED},
    "osdn_jax.regression": {"osdn_jax.ops", "osdn_jax.compare", *SHARED},
    "osdn_jax.generation": {"osdn_jax.ops", "osdn_jax.nn", "osdn_jax.interop", *SHARED},
    "osdn_jax.sampling": {"osdn_jax.nn", "osdn_jax.generation"},
    "osdn_jax.evaluation": {"osdn_jax.ops", "osdn_jax.nn", "osdn_jax.data", "osdn_jax.generation", *SHARED},
    "osdn_jax.training": {"osdn_jax.nn", "osdn_jax.data", "osdn_jax.interop", "osdn_jax.evaluation", *SHARED},
    "osdn_jax.planning": {"osdn_jax.nn", "osdn_jax.evaluation", "osdn_jax.training", "pallas_kernels", *SHARED},
    "osdn_jax.diagnose": {"osdn_jax.nn", "osdn_jax.evaluation", "osdn_jax.training", *SHARED},
    "osdn_jax.sweep": {"osdn_jax.nn", "osdn_jax.data", "osdn_jax.compare", "osdn_jax.training", *SHARED},
    "osdn_jax.convert": {"osdn_jax.nn", "osdn_jax.interop", "osdn_jax.training", *SHARED},
    "osdn_jax.generate": {"osdn_jax.generation", "osdn_jax.interop", "osdn_jax.training", *SHARED},
    "osdn_jax.evaluate": {
        "osdn_jax.nn",
        "osdn_jax.data",
        "osdn_jax.compare",
        "osdn_jax.evaluation",
        "osdn_jax.training",
        *SHARED,
    },
}
CORE = {"jax", "flax", "jaxtyping", "numpy"}
# Packages that have to be importable without an extra.
BASIC = ("pallas_kernels", "osdn_jax.ops", "osdn_jax.nn", "osdn_jax.interop", "osdn_jax.generation")


def layer(module):
    """Return the layer of a module: its package, or the module itself next to the packages."""
    return ".".join(module.split(".")[: 2 if module.startswith("osdn_jax.") else 1])


def imports(module, *, lazy=True):
    """Return the modules that a module imports: of this repository in full, of others the top-level name.

    lazy: count the imports inside functions and for type checkers, too.
    """
    found = set()
    pending = [ast.parse(FILES[module].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif lazy or not (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            pending += ast.iter_child_nodes(node)
    return {name if name.partition(".")[0] in PACKAGES else name.partition(".")[0] for name in found}


def test_every_module_has_a_layer():
    assert {layer(module) for module in FILES} - {"osdn_jax"} == LAYERS.keys()


@pytest.mark.parametrize("name", sorted(LAYERS))  # SHARED has no order, and pytest-xdist needs one
def test_imports_point_down(name):
    """`osdn_jax` itself knows no layer before it is asked for one, so importing it is free."""
    allowed = LAYERS[name] | {name, "osdn_jax"}
    modules = [module for module in FILES if layer(module) == name]
    upward = {
        (module, other)
        for module in modules
        for other in imports(module)
        if other.partition(".")[0] in PACKAGES and layer(other) not in allowed
    }
    assert upward == set()


def test_layers_have_no_circle():
    above = {name: {other for other in allowed if other not in SHARED} for name, allowed in LAYERS.items()}
    graphlib.TopologicalSorter(above).prepare()


def test_modules_have_no_circle():
    ours = {module: imports(module, lazy=False) & FILES.keys() - {module} for module in FILES}
    graphlib.TopologicalSorter(ours).prepare()


@pytest.mark.parametrize("name", BASIC)
def test_what_the_basic_packages_need(name):
    needed = set().union(*(imports(module) for module in FILES if layer(module) == name and ".aot" not in module))
    others = {module for module in needed if module.partition(".")[0] not in PACKAGES}
    assert others - sys.stdlib_module_names <= CORE


def test_every_library_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} == CORE
    declared = {
        re.match(r"[\w-]+", line)[0].lower().replace("_", "-")
        for line in [
            *project["dependencies"],
            *extras["train"],
            *extras["data"],
            *extras["tokenizers"],
            *extras["eval"],
            *extras["triton"],
        ]
    }
    used = set().union(*(imports(module) for module in FILES)) - sys.stdlib_module_names
    used = {name for name in used if name.partition(".")[0] not in PACKAGES} - {"jaxlib", "ml_dtypes"}  # of jax
    owners = metadata.packages_distributions()
    normal = lambda name: name.lower().replace("_", "-")
    undeclared = {name for name in used if not {normal(owner) for owner in owners.get(name, [name])} & declared}
    assert undeclared == set()


def test_only_kernels_have_parameters_without_types():
    """Mypy demands types everywhere else; of Triton's kernels it cannot."""
    missing = set()
    for module in FILES:
        if layer(module) != "triton_kernels":
            continue
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if not isinstance(node, ast.FunctionDef) or any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                continue
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            typed = [argument.annotation for argument in arguments if argument and argument.arg not in ("self", "cls")]
            if None in (*typed, node.returns):
                missing.add(f"{module}.{node.name}")
    assert missing == set()
