"""Pictures of the simulators' scenes: upright, of the present state, and without a trace in the simulation."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from parl_core.envs import make_env, rendering
from parl_core.errors import RenderingError, UnknownNameError
from tests.training.point_mass import PointMass

HEIGHT, WIDTH = 90, 120

needs_opengl = pytest.mark.skipif(
    not (ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")), reason="neither libEGL nor libOSMesa"
)


def _walk(env, count, draw=False):
    found = [env.reset()]
    for action in np.random.default_rng(1).uniform(-1.0, 1.0, size=(count, env.act_dim)):
        found.append(env.step(action).observation)
        if draw:
            assert env.render(HEIGHT, WIDTH).shape == (HEIGHT, WIDTH, 3)
    return np.array(found)


@needs_opengl
@pytest.mark.parametrize("name", ["dm_control/walker-walk", "metaworld/button-press"])
def test_drawing_shows_the_present_state_and_changes_nothing(name):
    env, undrawn = make_env(name, 3), make_env(name, 3)
    np.testing.assert_array_equal(_walk(env, 4, draw=True), _walk(undrawn, 4))
    picture = env.render(HEIGHT, WIDTH)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, undrawn.render(HEIGHT, WIDTH))  # two contexts at once, one state
    for _ in range(5):
        env.step(np.ones(env.act_dim))
    moved = env.render(HEIGHT, WIDTH)
    assert (moved != picture).any()
    np.testing.assert_array_equal(picture, undrawn.render(HEIGHT, WIDTH))
    assert env.render(700, 900).shape == (700, 900, 3)  # larger than the model's own off-screen buffer
    env.close()
    undrawn.close()


@needs_opengl
def test_after_close_a_picture_begins_anew():
    camera, env = rendering.SceneCamera("a scene"), make_env("dm_control/pendulum-swingup", 0)
    env.reset()
    model, data = env._environment.physics.model.ptr, env._environment.physics.data.ptr
    first = camera.take(model, data, HEIGHT, WIDTH, -1)
    camera.close()
    camera.close()
    np.testing.assert_array_equal(camera.take(model, data, HEIGHT, WIDTH, -1), first)
    assert (camera.take(model, data, HEIGHT, WIDTH, 0) != first).any()  # -1 is the free camera
    camera.close()


@needs_opengl
def test_metaworlds_cameras_are_upright_and_not_mirrored():
    """The goal, moved upwards and then to the camera's right, is seen to move up and to the right."""
    env = make_env("metaworld/door-open", 0)
    env.reset()
    model, data = env._environment.model, env._environment.data
    goal = model.site("goal").id

    def seen_at(camera, position):
        model.site_pos[goal] = position
        mujoco.mj_forward(model, data)
        picture = env.render(240, 320, camera).astype(int)
        rows, columns = np.nonzero(picture[..., 1] > 60 + picture[..., [0, 2]].max(-1))
        assert len(rows) > 10
        return rows.mean(), columns.mean()

    start, up = np.array([-0.1, 0.45, 0.2]), np.array([0.0, 0.0, 1.0])
    turned = 0
    for camera in ("corner", "corner2", "corner3", "corner4"):
        axes = model.cam_mat0[model.camera(camera).id].reshape(3, 3)
        turned += axes[2, 1] < 0
        right = np.cross(-axes[:, 2], up)
        row, column = seen_at(camera, start)
        assert seen_at(camera, start + 0.1 * up)[0] < row - 2
        assert seen_at(camera, start + 0.1 * right)[1] > column + 2
    assert turned  # else this shows nothing
    env.close()


@needs_opengl
def test_training_touches_no_opengl_and_a_forgotten_close_is_quiet():
    code = """
import sys
import numpy as np
from parl_core.envs import make_env
envs = [make_env(name, 0) for name in ("dm_control/walker-walk", "metaworld/button-press")]
for env in envs:
    env.reset()
    env.step(np.zeros(env.act_dim))
assert not {"mujoco.egl", "mujoco.osmesa", "OpenGL.GL"} & set(sys.modules)
print([env.render(32, 32).shape for env in envs])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[(32, 32, 3), (32, 32, 3)]\n"
    assert "Exception" not in done.stderr and "Error" not in done.stderr


def test_unknown_cameras_and_sizes_are_refused():
    env = make_env("dm_control/walker-walk", 0)
    env.reset()
    with pytest.raises(UnknownNameError, match="Unknown camera 'sides': did you mean side"):
        env.render(HEIGHT, WIDTH, "sides")
    with pytest.raises(ValueError, match="at least 1, got 0 and 120"):
        env.render(0, WIDTH)


def test_what_cannot_be_drawn_says_what_to_try(monkeypatch):
    env = make_env("dm_control/pendulum-swingup", 0)
    env.reset()
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(RenderingError, match="MUJOCO_GL=off forbids it"):
        env.render()
    monkeypatch.setattr(rendering.platform, "system", lambda: "Linux")
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(RenderingError, match=r"nonsense.*MUJOCO_GL=egl \(Debian packages libegl1 libgl1-mesa-dri\)"):
        env.render()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda _: None)
    with pytest.raises(RenderingError, match=r"MUJOCO_GL=egl .* or MUJOCO_GL=osmesa"):
        env.render()
    monkeypatch.setattr(rendering.ctypes.util, "find_library", lambda name: name == "OSMesa" or None)
    assert rendering._backend("a scene") == "osmesa"

    class Broken:
        def __init__(self, *_):
            raise RuntimeError("no display")

    monkeypatch.setitem(sys.modules, "mujoco.osmesa", type(sys)("mujoco.osmesa"))
    monkeypatch.setattr(sys.modules["mujoco.osmesa"], "GLContext", Broken, raising=False)
    with pytest.raises(RenderingError, match=r"osmesa \(no display\): install libosmesa6 .*MUJOCO_GL=egl"):
        env.render()


def test_an_environment_without_pictures_says_so():
    with pytest.raises(RenderingError, match="point-mass has no pictures"):
        PointMass("point-mass", 0).render()
