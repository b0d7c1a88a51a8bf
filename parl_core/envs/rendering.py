"""Pictures of MuJoCo scenes, drawn off screen, with or without a GPU."""

from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import importlib
import os
import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RenderingError, import_extra, unknown_name

_LIBRARIES = {
    "egl": "EGL",
    "osmesa": "OSMesa",
}  # what MUJOCO_GL calls it, and the library it needs; the first found is taken
_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}  # of Debian and Ubuntu
_ON, _OFF = ("", "enable", "enabled", "on", "true", "1"), ("disable", "disabled", "off", "false", "0")


class SceneCamera:
    """Takes pictures of one environment's scene. OpenGL is touched by the first picture, and released by `close`.

    Args:
        name: the environment's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._drawn: tuple[Any, int, int] | None = None  # the model and the size that what is below was made for
        self._gl_context: Any = None
        self._context: Any = None
        self._scene: Any = None

    def take(self, model: Any, data: Any, height: int, width: int, camera: int) -> npt.NDArray[np.uint8]:
        """The scene of `data` as (height, width, 3) RGB; `camera` is a number as of `camera_number`.

        Raises:
            RenderingError: OpenGL cannot be had; the message says which variable and package to try.
        """
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height} and {width}")
        mujoco = import_extra("mujoco", "dm-control", needed_for="a picture")
        if self._drawn is None or self._drawn[0] is not model or self._drawn[1:] != (height, width):
            self.close()
            self._open(mujoco, model, height, width)
        self._gl_context.make_current()
        for terrain in range(model.nhfield):  # drawn anew by some tasks at every reset
            mujoco.mjr_uploadHField(model, self._context, terrain)
        view = mujoco.MjvCamera()
        if camera >= 0:
            view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        else:
            mujoco.mjv_defaultFreeCamera(model, view)
        every_geom = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, every_geom, self._scene)
        # Without a GPU shadows take half to three quarters of the time.
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        picture = np.empty((height, width, 3), dtype=np.uint8)
        area = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(area, self._scene, self._context)
        mujoco.mjr_readPixels(picture, None, area, self._context)
        return picture[::-1]  # OpenGL's rows go upwards

    def close(self) -> None:
        """Release what OpenGL holds; the next picture begins anew."""
        atexit.unregister(self.close)
        if self._context is not None:
            self._gl_context.make_current()
            self._context.free()
        if self._gl_context is not None:
            self._gl_context.free()
        self._drawn = self._gl_context = self._context = self._scene = None

    def _open(self, mujoco: Any, model: Any, height: int, width: int) -> None:
        backend = _backend(self._name)
        with contextlib.suppress(ImportError):
            # Mesa makes its LLVM's symbols known to the whole process, and a Triton that is loaded after it, as by
            # torch.compile, takes them for its own and crashes. Loaded before, it does not.
            importlib.import_module("triton")
        screen = model.vis.global_
        screen.offwidth, screen.offheight = max(screen.offwidth, width), max(screen.offheight, height)
        try:
            # mujoco.Renderer is bound to what MUJOCO_GL was when mujoco was imported; these modules are not.
            module = mujoco.gl_context if backend is None else importlib.import_module(f"mujoco.{backend}")
            self._gl_context = module.GLContext(width, height)
            self._gl_context.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
            self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        except (
            Exception
        ) as error:  # each library has its own ways to fail, AttributeError and ctypes' errors among them
            self.close()
            raise RenderingError(
                f"{self._name} cannot be drawn by OpenGL through {backend or 'the system'} ({error}): {_advice(backend)}"
            ) from error
        # Freed before EGL shuts itself down at exit, which registered itself above, so comes later.
        atexit.register(self.close)
        self._drawn = (model, height, width)


def camera_number(model: Any, camera: str) -> int:
    """The number of the camera that the model calls so.

    Raises:
        UnknownNameError: it has no such camera; the message names those it has.
    """
    names = [model.camera(number).name for number in range(model.ncam)]
    if camera not in names:
        raise unknown_name("camera", camera, names)
    return names.index(camera)


def _backend(name: str) -> str | None:
    """What draws: as MUJOCO_GL says, else what is found; None where the system has one way only (macOS, Windows)."""
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in _OFF:
        raise RenderingError(
            f"{name} cannot be drawn while MUJOCO_GL={chosen} forbids it: unset MUJOCO_GL, or set it to egl or osmesa"
        )
    if platform.system() != "Linux":
        return None
    if chosen not in _ON:
        return "glfw" if chosen == "glx" else chosen
    found = [backend for backend, library in _LIBRARIES.items() if ctypes.util.find_library(library)]
    if not found:
        raise RenderingError(f"{name} cannot be drawn, since no OpenGL without a screen is found: {_advice(None)}")
    return found[0]


def _advice(backend: str | None) -> str:
    ways = [f"MUJOCO_GL={name} (Debian packages {_PACKAGES[name]})" for name in _PACKAGES if name != backend]
    mend = f"install {_PACKAGES[backend]} (Debian), or " if backend in _PACKAGES else ""
    return f"{mend}set {' or '.join(ways)} before starting"
