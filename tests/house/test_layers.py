"""Imports go one way, and the page never pays for torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.house.source_tree import PRODUCT, ROOT, imports, module_name, python_files, relative

BASE = ("backend.errors", "backend.files", "backend.config")
ENGINE = (*BASE, "backend.events")
WORKING = (*ENGINE, "backend.progress")

# Layer -> the project's own modules that it may import, besides itself. The longest matching name decides.
ALLOWED: dict[str, tuple[str, ...]] = {
    "backend.errors": (),
    "backend.files": ("backend.errors",),
    "backend.config": ("backend.errors", "backend.files"),
    "backend.events": BASE,
    "backend.progress": ENGINE,
    "backend.model": ENGINE,
    "backend.lora": (*ENGINE, "backend.model"),
    "backend.text": (*ENGINE, "backend.model"),
    "backend.vae": (*ENGINE, "backend.model"),
    "backend.data": (*ENGINE, "backend.model", "backend.text", "backend.vae"),
    "backend.caching": (*WORKING, "backend.model", "backend.text", "backend.vae", "backend.data"),
    "backend.sampling": (*WORKING, "backend.model", "backend.lora", "backend.text", "backend.vae", "backend.data"),
    "backend.training": (
        *WORKING,
        *("backend.model", "backend.lora", "backend.text", "backend.vae", "backend.data", "backend.sampling"),
    ),
    "backend.entry": WORKING,
    "backend.kandinsky5_": (
        *WORKING,
        "backend.entry",
        *("backend.model", "backend.lora", "backend.text", "backend.vae", "backend.data"),
        *("backend.caching", "backend.sampling", "backend.training"),
    ),
    "backend.lora_tool": (*WORKING, "backend.entry", "backend.model", "backend.lora"),
    "backend.demo": (
        *WORKING,
        *("backend.model", "backend.lora", "backend.text", "backend.vae", "backend.data"),
        *("backend.sampling", "backend.training"),
    ),
    "backend.jobs": ENGINE,
    # The page looks at datasets with the engine's own code, whose parts that look and decode need no torch.
    "k5ui": (*ENGINE, "backend.data", "backend.jobs"),
    "app": (*ENGINE, "backend.jobs", "k5ui"),
}

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "torchvision", "safetensors.torch")
WEB = ("gradio", "gradio_client", "fastapi", "starlette", "uvicorn")
LIGHT_LAYERS = ("backend.errors", "backend.files", "backend.config", "backend.events", "backend.jobs", "k5ui", "app")
STANDARD_LIBRARY_LAYERS = ("backend.errors", "backend.files", "backend.events")


def _layer(module: str) -> str | None:
    fitting = [name for name in ALLOWED if _inside(module, name)]
    return max(fitting, key=len, default=None)


def _inside(module: str, layer: str) -> bool:
    return module == layer or module.startswith(layer if layer.endswith("_") else f"{layer}.")


def _files():
    return [path for path in python_files(*PRODUCT) if module_name(path) != "backend"]


def test_every_file_belongs_to_a_layer() -> None:
    homeless = [relative(path) for path in _files() if _layer(module_name(path)) is None]
    assert not homeless, f"Add these to the table of layers: {homeless}"


def test_imports_go_one_way() -> None:
    wrong = []
    for path in _files():
        layer = _layer(module_name(path))
        assert layer is not None
        for line, target in imports(path):
            own = target.split(".")[0] in ("backend", "k5ui", "app") and target != "backend"
            if own and not any(_inside(target, allowed) for allowed in (*ALLOWED[layer], layer)):
                wrong.append(f"{relative(path)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_engine_packages_never_import_the_web_and_light_ones_never_import_the_engine() -> None:
    wrong = []
    for path in _files():
        layer = _layer(module_name(path))
        refused = () if layer in ("k5ui", "app") else WEB
        if layer in LIGHT_LAYERS:
            refused = (*refused, *HEAVY)
        wrong += [
            f"{relative(path)}:{line} imports {target}"
            for line, target in imports(path)
            if any(_inside(target, name) for name in refused)
        ]
    assert not wrong, "\n".join(wrong)


def test_the_lowest_layers_need_the_standard_library_only() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {target}"
        for path in _files()
        if _layer(module_name(path)) in STANDARD_LIBRARY_LAYERS
        for line, target in imports(path)
        if target.split(".")[0] not in (*sys.stdlib_module_names, "backend")
    ]
    assert not wrong, "\n".join(wrong)


def test_package_files_hold_no_code() -> None:
    wrong = [
        relative(path)
        for path in python_files(*PRODUCT)
        if path.name == "__init__.py" and any(True for _ in imports(path))
    ]
    assert not wrong, f"__init__.py imports something, so importing one module pays for others: {wrong}"


_PROBE = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def _loaded_by(*modules: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(modules)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout.strip().splitlines()
    assert len(output) == 1, f"Importing printed something: {output[:-1]}"
    return set(json.loads(output[0]))


@pytest.mark.parametrize("layer", ["backend.config", "backend.events", "backend.jobs", "k5ui"])
def test_importing_leaves_torch_unloaded(layer: str) -> None:
    """The page and the job machinery start in seconds because torch stays out, also indirectly."""
    modules = [module_name(path) for path in _files() if _inside(module_name(path), layer)]
    assert modules, f"{layer} is empty"
    if layer == "k5ui":
        assert "k5ui.ui" in modules
    loaded = _loaded_by(*modules)
    assert not loaded & set(HEAVY)
    if layer != "k5ui":
        assert not loaded & set(WEB)
