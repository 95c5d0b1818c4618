"""examples/cpp, built with CMake and run: its numbers are Python's."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dcn_plugin
from dcn_plugin.layers import ModulatedDeformConv2dPack

ROOT = Path(dcn_plugin.__file__).parents[1]


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_runs_a_package_without_python(tmp_path):
    build = tmp_path / "build"
    commands = [
        ["cmake", "-S", ROOT / "examples/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", build],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), ModulatedDeformConv2dPack(8, 4, 3, padding=1)).eval()
    nn.init.normal_(model[1].conv_offset.weight, std=0.1)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)  # RGB
    images = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    (tmp_path / "image.ppm").write_bytes(b"P6\n30 20\n255\n" + pixels.tobytes())

    library = Path(dcn_plugin.__file__).parent / "_cpu.so"
    command = [build / "detect", library, tmp_path / "model.pt2", tmp_path / "image.ppm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, mean, largest = re.fullmatch(r"output 0: shape \[(.*)\], mean (.*), largest (.*)\n", done.stdout).groups()
    assert tuple(map(int, shape.split(","))) == tuple(expected.shape)
    assert float(mean) == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-3)
    assert float(largest) == pytest.approx(float(expected.max()), rel=1e-3)

    done = subprocess.run([*command[:3], tmp_path / "nowhere.ppm"], capture_output=True, text=True)
    assert done.returncode == 1 and "nowhere.ppm is no PPM image" in done.stderr
