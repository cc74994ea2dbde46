"""The state of the computer for the header of the page: name of the processor or GPU, memory used and there."""

from __future__ import annotations

import importlib
import platform
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

_FRESH_SECONDS = 1.0


class DeviceMonitor:
    """Reads memory at most once a second; the GPU through nvidia-ml-py if that and a driver are there, never torch."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._read_at = float("-inf")
        self._status: dict[str, Any] = {}
        self._cpu = _cpu_name()
        self._library = _load_library()

    @property
    def has_gpu(self) -> bool:
        """Whether an NVIDIA GPU was found at the start."""
        return self._library is not None

    def status(self) -> dict[str, Any]:
        """kind (gpu, cpu), name, memory_used and memory_total in bytes (of the first GPU, else of the computer), gpus
        (how many), cpu, cpu_memory_used, cpu_memory_total."""
        with self._guard:
            if time.monotonic() - self._read_at >= _FRESH_SECONDS:
                self._status, self._read_at = self._read(), time.monotonic()
            return self._status

    def _read(self) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        used, total = memory.total - memory.available, memory.total
        computer = {"cpu": self._cpu, "cpu_memory_used": used, "cpu_memory_total": total}
        plain = {"kind": "cpu", "name": self._cpu, "memory_used": used, "memory_total": total, "gpus": 0}
        return plain | computer | (self._gpu() or {})

    def _gpu(self) -> dict[str, Any] | None:
        library = self._library
        if library is None:
            return None
        try:
            handle = library.nvmlDeviceGetHandleByIndex(0)
            memory = library.nvmlDeviceGetMemoryInfo(handle)
            name, count = library.nvmlDeviceGetName(handle), library.nvmlDeviceGetCount()
        except library.NVMLError:
            return None
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        used, total = int(memory.used), int(memory.total)
        return {"kind": "gpu", "name": name, "memory_used": used, "memory_total": total, "gpus": count}


def _load_library() -> ModuleType | None:
    """nvidia-ml-py, ready to be asked, if it is installed and finds a GPU."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        return library if library.nvmlDeviceGetCount() else None
    except library.NVMLError:
        return None


def _cpu_name() -> str:
    """The processor as its maker calls it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
