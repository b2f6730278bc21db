"""The shape of the source tree: who may import whom, which modules may name vLLM and Ray, how long a file may be.

Read from the syntax trees, so imports inside functions count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 350


@dataclass(frozen=True)
class Layer:
    """Modules, with everything below them, and the libraries they may name. It imports itself and those before it."""

    name: str
    modules: tuple[str, ...]
    libraries: frozenset[str]


LAYERS = (
    Layer("kernels", ("ep.kernels",), frozenset({"torch", "triton", "numpy"})),
    Layer(
        "core",
        (
            "ep.errors",
            "ep.devices",
            "ep.config_keys",
            "ep.model",
            "ep.presets",
            "ep.placement",
            "ep.share",
            "ep.assign",
            "ep.planning",
            "ep.tensor_file",
            "ep.stored_tensors",
            "ep.made_values",
            "ep.made_tensors",
            "ep.made_slice",
            "ep.checkpoint",
            "ep.synthetic",
            "ep.synthetic_text",
            "ep.synthetic_weights",
            "ep.wire",
            "ep.link",
            "ep.load",
            "ep.migration",
            "ep.migration_layer",
            "ep.trace_codec",
            "ep.trace_header",
            "ep.trace",
            "ep.trace_parts",
        ),
        frozenset({"torch", "numpy", "scipy", "msgpack", "safetensors", "tokenizers", "tomli", "rich"}),
    ),
    Layer(
        "data plane",
        (
            "ep.transport",
            "ep.compute",
            "ep.link_stats",
            "ep.profile_marks",
            "ep.recorder",
            "ep.recovery",
            "ep.trace_log",
            "ep.router",
            "ep.under_way",
            "ep.graph_router",
            "ep.group_router",
            "ep.shard",
            "ep.far_shards",
            "ep.handover",
            "ep.ipc_jobs",
            "ep.ipc_launcher",
            "ep.ipc_stats",
            "ep.ipc_options",
            "ep.ipc_router",
            "ep.ipc_setup",
            "ep.ipc_shard",
            "ep.ipc_server",
            "ep.mover",
        ),
        frozenset({"torch", "numpy"}),
    ),
    Layer(
        "engine",
        ("ep.engine", "ep.plugin", "ep.metrics_file"),
        frozenset({"torch", "numpy", "vllm", "pydantic", "uvloop", "prometheus_client"}),
    ),
    Layer("cluster", ("ep.cluster",), frozenset({"torch", "numpy", "ray", "vllm"})),
    Layer(
        "commands",
        (
            "ep.cli",
            "ep.__main__",
            "ep.serve",
            "ep.serve_options",
            "ep.announce",
            "ep.status",
            "ep.instances",
            "ep.live",
            "ep.rebalance",
            "ep.synth",
            "ep.target",
            "ep.vllm_flags",
            "ep.options",
            "ep.sheet",
            "ep.report",
            "ep.explain",
            "ep.bench",
            "ep.tune",
            "ep.terminal",
            "ep.metrics",
            "ep.trace_path",
        ),
        frozenset(
            {
                "torch",
                "numpy",
                "click",
                "httpx",
                "matplotlib",
                "openai",
                "plotly",
                "prometheus_client",
                "psutil",
                "ray",
                "rich",
                "tomli",
                "triton",
                "uvloop",
                "vllm",
            }
        ),
    ),
)

# Within the layers that may: the only modules that name them. vLLM's internals change from version to version.
ONLY = {
    "vllm": (
        "ep.engine.*",
        "ep.plugin",
        "ep.cluster.executor",
        "ep.cluster.router_actor",
        "ep.cluster.scheduler",
        "ep.cluster.worker",
        "ep.bench.kernel_baselines",
        "ep.bench.native_server",
        "ep.bench.placement_baseline",
        "ep.bench.vllm_client",
    ),
    "ray": ("ep.cluster.*", "ep.status", "ep.instances", "ep.live", "ep.rebalance", "ep.bench.*", "ep.tune"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("kernels", "cluster"):
        parts = ("ep", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("ep", "kernels", "cluster")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not (folder == "ep" and path.relative_to(ROOT).parts[1] in ("kernels", "cluster", "configs"))
}


def imports(path: Path) -> set[str]:
    """Names of everything that the file imports, at any depth; relative imports are not used in this project."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> int | None:
    for depth, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in layer.modules):
            return depth
    return None


MODULES = sorted(name for name in SOURCES if name != "ep")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    depth = layer_of(module)
    assert depth is not None, f"{module} is in no layer: add it to LAYERS"
    for name in sorted(imports(SOURCES[module])):
        library = name.split(".")[0]
        if library in ("kernels", "cluster", "configs"):
            pytest.fail(f"{module} imports {name}: its only name is ep.{name}")
        if library == "ep":
            other = layer_of(name)
            assert other is None or other <= depth, (
                f"{module} ({LAYERS[depth].name}) imports {name} ({LAYERS[other].name})"
            )
        elif library not in sys.stdlib_module_names:
            assert library in LAYERS[depth].libraries, f"{module} ({LAYERS[depth].name}) imports {library}"
            allowed = ONLY.get(library)
            assert allowed is None or any(fnmatchcase(module, pattern) for pattern in allowed), (
                f"{module} names {library}; only these do: {', '.join(allowed or ())}"
            )


@pytest.mark.parametrize("module", MODULES)
def test_files_have_one_subject(module: str) -> None:
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize("folder", ["kernels", "cluster", "configs"])
def test_top_level_folders_are_reached_through_ep_only(folder: str) -> None:
    assert (ROOT / "ep" / folder).is_symlink()
    assert (ROOT / "ep" / folder).readlink() == Path("..") / folder
    assert not (ROOT / folder / "__init__.py").exists()


def imported_by(*modules: str) -> set[str]:
    """Top-level names in a fresh interpreter's sys.modules after importing; fails if that prints or starts a thread."""
    code = (
        "import importlib, os, sys, threading\n"
        "before = dict(os.environ)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}\n"
        "assert not {k for k in changed if not k.startswith(('KMP_', 'TORCHINDUCTOR_'))}, changed\n"
        "sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return set(done.stderr.split())


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    assert not imported_by("ep.cli") & {"torch", "ray", "vllm", "transformers"}


def test_everything_below_the_engine_imports_without_ray_and_vllm() -> None:
    engine = next(depth for depth, layer in enumerate(LAYERS) if layer.name == "engine")
    below = [name for name in MODULES if (layer_of(name) or 0) < engine]
    assert not imported_by(*below) & {"ray", "vllm", "transformers"}
