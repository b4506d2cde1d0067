"""The shape of the house: which folder may import which, comments, docstrings, sizes, start-up."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "run_tools")
MAX_LINES = 400


def python_files(*folders: str) -> list[str]:
    """Paths, relative to the repository, of the Python files below ``folders``."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


PUBLIC = ["train.py", *python_files(*PACKAGES)]
KERNELS = python_files("kernels")
TESTS = python_files("tests")
EVERYTHING = [*PUBLIC, *KERNELS, *TESTS]
CONF = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml"))


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def absolute(name: str, node: ast.ImportFrom) -> str:
    """Module that a ``from`` import names, with leading dots resolved against the file ``name``."""
    if not node.level:
        return node.module or ""
    package = Path(name).parent.parts
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports(name: str, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Dotted names that the file imports; ``from a import b`` gives ``a.b``.

    ``importlib.import_module("a.b")`` and ``__import__("a.b")`` count too.
    """
    found: set[str] = set()
    for node in nodes if nodes is not None else ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(name, node)
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", ""))
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return found


def at_top(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, no ``if TYPE_CHECKING``."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))


def below(names: set[str], *packages: str) -> set[str]:
    """Those of ``names`` that are one of ``packages`` or inside one."""
    return {name for name in names if any(f"{name}.".startswith(f"{p}.") for p in packages)}


# --- the arrows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", python_files("datamodules"))
def test_datamodules_do_not_know_the_modules(name):
    assert not below(imports(name), "lightning_modules", "callbacks", "train")


@pytest.mark.parametrize("name", python_files("lightning_modules"))
def test_modules_do_not_know_callbacks(name):
    assert not below(imports(name), "callbacks", "train")


@pytest.mark.parametrize("name", python_files("callbacks"))
def test_callbacks_know_only_pure_functions(name):
    found = below(imports(name), "lightning_modules")
    assert found == below(found, "lightning_modules.functional")


@pytest.mark.parametrize("name", [*python_files(*PACKAGES), *KERNELS])
def test_only_train_imports_hydra(name):
    assert not below(imports(name), "hydra")


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "lightning_modules/ops.py"])
def test_only_ops_loads_the_kernels(name):
    assert not below(imports(name), "kernels", "litpost_kernels")
    constants = {node.value for node in ast.walk(parse(name)) if isinstance(node, ast.Constant)}
    assert "litpost_kernels" not in constants, "load the kernels through lightning_modules.ops"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stand_alone(name):
    found = imports(name)
    own = below(found, "kernels")  # where a relative import resolves to
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "kernels", "import each other relatively"
    allowed = below(found, "torch", "triton", *sys.stdlib_module_names)
    assert found == allowed | own


def test_kernels_is_no_package():
    assert not list((ROOT / "kernels").rglob("__init__.py")), "it would hide Hugging Face's kernels"


@pytest.mark.parametrize("name", EVERYTHING)
def test_nothing_needs_torchvision(name):
    assert not below(imports(name), "torchvision", "torchaudio", "torchcodec")


@pytest.mark.parametrize("name", PUBLIC)
def test_heavy_packages_are_imported_in_functions(name):
    found = imports(name, at_top(parse(name)))
    assert not below(found, "vllm", "faiss", "triton", "wandb")


@pytest.mark.slow
def test_train_starts_light():
    """What ``import train`` loads beyond Lightning and transformers themselves."""
    heavy = ("datasets", "faiss", "vllm", "peft", "matplotlib", "wandb", "triton", "trl")
    show = f"import sys; print(*[m for m in {heavy} if m in sys.modules])"
    given, ours = (
        subprocess.run(
            [sys.executable, "-c", f"{first}; {show}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for first in ("import lightning, transformers", "import train")
    )
    assert set(ours) <= set(given), "import these inside the functions that use them"


# --- sizes, characters, docstrings ----------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_files_stay_small_and_ascii(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    strange = [number for number, line in enumerate(lines, start=1) if not line.isascii()]
    assert not strange, f"{name} holds characters that are not ASCII in lines {strange}"
    num_lines = len(lines)
    assert num_lines < MAX_LINES, f"{name} is too long: split it"


def undocumented(node: ast.AST, label: str) -> list[str]:
    """Labels of the public definitions in ``node``, itself included, without a docstring."""
    missing = [] if ast.get_docstring(node) else [label]
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") or is_setter_or_overload(child):
            continue
        here = f"{label}:{child.lineno} {child.name}"
        if isinstance(child, ast.ClassDef):
            missing += undocumented(child, here)
        elif not ast.get_docstring(child):
            missing.append(here)
    return missing


def is_setter_or_overload(node: ast.AST) -> bool:
    names = {getattr(d, "attr", getattr(d, "id", "")) for d in getattr(node, "decorator_list", [])}
    return bool(names & {"setter", "deleter", "overload"})


@pytest.mark.parametrize("name", [*PUBLIC, *KERNELS])
def test_public_names_have_docstrings(name):
    missing = undocumented(parse(name), name)
    assert not missing, "\n".join(missing)


# --- configuration and packaging ------------------------------------------------------------------


def keys(node: yaml.Node | None, *, top: bool = True) -> Iterator[yaml.Node]:
    """Key nodes of all block mappings below ``node``, except ``defaults`` and what it holds."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        for key, value in node.value:
            if top and key.value == "defaults":
                continue
            yield key
            yield from keys(value, top=False)
    elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
        for value in node.value:
            yield from keys(value, top=False)


@pytest.mark.parametrize("name", CONF)
def test_every_key_has_a_comment_above_it(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    bare = []
    for key in keys(yaml.compose(text)):
        number = key.start_mark.line
        above = lines[number - 1].strip() if number else ""
        if not above.startswith("#") or above.startswith("# @package"):
            bare.append(f"{name}:{number + 1} {key.value}")
    assert not bare, "\n".join(bare)


def test_packaged_folders_are_those_of_the_tree():
    """pyproject.toml lists the packages by hand: a new folder must be added there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    tree = {Path(name).parent.as_posix().replace("/", ".") for name in python_files(*PACKAGES)}
    assert listed == tree | {"conf", "litpost_kernels"}


def test_constraints_pin_every_core_dependency():
    """Each requirement of the core and of the extras dev and sweep has an exact, portable pin."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(v.startswith("==") and "+" not in v and "*" not in v for v in versions.values())
    for text in [*project["dependencies"], *extras["dev"], *extras["sweep"]]:
        wanted = Requirement(text)
        pin = versions.get(canonicalize_name(wanted.name))
        assert pin, f"constraints.txt has no pin for {wanted.name}"
        assert wanted.specifier.contains(pin.removeprefix("==")), f"{wanted} against {pin}"
