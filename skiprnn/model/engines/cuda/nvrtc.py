"""Compiles CUDA C++ by NVRTC, the compiler that comes with torch, and launches it: neither nvcc nor headers needed."""

import ctypes
import functools
from collections.abc import Mapping, Sequence

import torch


@functools.cache
def _compiler() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise RuntimeError("NVRTC is not here: this torch is built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"  # which torch itself has loaded, or the system's
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"NVRTC is not here; install nvidia-cuda-nvrtc, or CUDA: {error}") from error


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"NVIDIA's driver is not here: {error}") from error


def missing() -> str | None:
    """Why there is no NVRTC or no driver; None if both are here."""
    try:
        _compiler()
        _driver()
    except RuntimeError as error:
        return str(error)
    return None


def _compile(result: int) -> None:
    """Check what a function of the compiler returned."""
    if result:
        describe = _compiler().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {describe(result).decode()}")


def _drive(result: int) -> None:
    """Check what a function of the driver returned."""
    if result:
        reason = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(reason))
        raise RuntimeError(f"CUDA: {(reason.value or b'error %d' % result).decode()}")


def cubin(source: str, defines: Mapping[str, int], arch: str) -> bytes:
    """The machine code of a CUDA C++ source with these macros, for an architecture (sm_90).

    Raises:
        RuntimeError: NVRTC is not here, or the source does not compile: its first error.
    """
    nvrtc, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"-arch={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _compile(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        if failed := nvrtc.nvrtcCompileProgram(program, len(options), flags):
            _compile(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _compile(nvrtc.nvrtcGetProgramLog(program, log))
            if errors := [line for line in log.value.decode(errors="replace").splitlines() if "error" in line]:
                raise RuntimeError(f"NVRTC, for {arch}: {errors[0]}")
            _compile(failed)
        _compile(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _compile(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel on one device, of one struct by value."""

    def __init__(self, function: ctypes.c_void_p, context: ctypes.c_void_p):
        self.function, self.context = function, context

    def __call__(self, grid: tuple[int, int], threads: int, arguments: ctypes.Structure) -> None:
        """Launch it in the current stream; the device must be the current one. May be captured in a CUDA graph.

        Raises:
            RuntimeError: it can't be launched.
        """
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _drive(_driver().cuCtxSetCurrent(self.context))  # a new thread, as autograd's, may have none yet
        _drive(_driver().cuLaunchKernel(self.function, *grid, 1, threads, 1, 1, 0, stream, parameters, None))


def load(source: str, defines: Mapping[str, int], names: Sequence[str]) -> dict[str, Kernel]:
    """These kernels of a CUDA C++ source, compiled for the current device, once per process, before any graph capture.

    Raises:
        RuntimeError: as cubin, or the driver does not load it.
    """
    device = torch.cuda.current_device()
    return _load(source, tuple(sorted(defines.items())), tuple(names), device)


@functools.cache
def _load(source: str, defines: tuple[tuple[str, int], ...], names: tuple[str, ...], device: int) -> dict[str, Kernel]:
    major, minor = torch.cuda.get_device_capability(device)
    code = cubin(source, dict(defines), f"sm_{major}{minor}")
    torch.cuda.synchronize(device)  # the device's context exists, and is this thread's
    driver, context, module = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _drive(driver.cuCtxGetCurrent(ctypes.byref(context)))
    _drive(driver.cuModuleLoadData(ctypes.byref(module), code))
    kernels = {}
    for name in names:
        function = ctypes.c_void_p()
        _drive(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        kernels[name] = Kernel(function, context)
    return kernels
