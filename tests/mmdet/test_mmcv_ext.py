"""MMDetection on mmcv-lite, in fresh interpreters where ``mmcv._ext`` is missing, whichever mmcv is installed."""

import os
import subprocess
import sys

import pytest
import torch

from ..test_import import ROOT, run

pytest.importorskip("mmdet")

from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext

needs_compiled = pytest.mark.skipif(provide_mmcv_ext(), reason="mmcv-lite: no compiled operators to compare with")


def run_on_lite(code):
    return run(code, missing=("mmcv._ext",))


@pytest.mark.parametrize("first", ["", "import dcn_plugin.mmengine", "import mmdet"])
def test_mmdet_runs_on_mmcv_lite(first):
    code = f"""
{first}
import dcn_plugin.mmdet
import mmcv._ext, mmcv.ops, mmdet.apis, mmdet.evaluation, mmdet.models
from mmdet.registry import MODELS
assert not hasattr(mmcv._ext, "__file__")
for kind in ("DCN", "DCNv2"):
    assert_ours(build(kind))
assert MODELS.get("carafe") is mmcv.ops.CARAFEPack
from dcn_plugin.layers import MultiScaleDeformableAttention
assert MODELS.get("MultiScaleDeformableAttention") is mmcv.ops.MultiScaleDeformableAttention
assert mmcv.ops.MultiScaleDeformableAttention is MultiScaleDeformableAttention
boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 12, 12]])
scores, labels = torch.tensor([0.8, 0.9, 0.1]), torch.tensor([0, 0, 1])
assert mmcv.ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.5))[1].tolist() == [1, 2]
assert mmcv.ops.batched_nms(boxes, scores, labels, dict(type="soft_nms", min_score=0.2))[1].tolist() == [1, 0]
assert mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)[0].tolist() == [1, 0]
"""
    run_on_lite(code)


def test_gradients_pass_through_mmcvs_functions():
    code = """
import dcn_plugin.mmdet, mmcv.ops
from dcn_plugin.mmdet import mmcv_ops
from torch.autograd import gradcheck
mmcv_ops.restore()
x = torch.randn(1, 4, 6, 7, dtype=torch.float64, requires_grad=True)
rois = torch.tensor([[0, 0.3, 0.7, 4.4, 5.6]], dtype=torch.float64)
for mode, aligned in (("avg", True), ("avg", False), ("max", True)):
    assert gradcheck(lambda x: mmcv.ops.roi_align(x, rois, 2, 1.0, 2, mode, aligned), [x])
assert gradcheck(lambda x: mmcv.ops.roi_pool(x, rois, 2, 1.0), [x])
masks = torch.randn(1, 9, 12, 14, dtype=torch.float64, requires_grad=True)
assert gradcheck(lambda x, masks: mmcv.ops.carafe(x, masks, 3, 1, 2), [x, masks])
target = torch.tensor([0, 2, 3])
scores = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
assert gradcheck(lambda s: mmcv.ops.sigmoid_focal_loss(s, target, 2.0, 0.25, None, "none"), [scores])
assert gradcheck(lambda s: mmcv.ops.softmax_focal_loss(s + 0, target % 3, 2.0, 0.25, None, "mean"), [scores])
attend = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
shapes, start = torch.tensor([[3, 4], [2, 2]]), torch.tensor([0, 12])
inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True)
          for shape in [(1, 16, 2, 3), (1, 5, 2, 2, 2, 2), (1, 5, 2, 2, 2)]]
assert gradcheck(lambda value, places, weights: attend(value, shapes, start, places, weights, 64), inputs)
"""
    run_on_lite(code)


def test_an_operator_that_is_not_provided_says_so_where_it_is_called():
    code = """
import dcn_plugin.mmdet, mmcv.ops
try:
    mmcv.ops.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))
except NotImplementedError as error:
    print(error)
"""
    assert run_on_lite(code).splitlines()[-1] == (
        "mmcv's operator box_iou_rotated is not among those that dcn_plugin provides for mmcv-lite: install mmcv with "
        "its compiled operators for it"
    )


def test_providing_again_changes_nothing():
    code = """
from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext
from mmengine.registry import MODELS
before = dict(sys.modules), dict(MODELS.module_dict)
assert provide_mmcv_ext() is True
assert before == (dict(sys.modules), dict(MODELS.module_dict))
"""
    run_on_lite(code)


@needs_compiled
def test_compiled_operators_stay_in_charge():
    code = """
from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext
assert provide_mmcv_ext() is False
import mmcv._ext
assert mmcv._ext.__file__
"""
    run(code)


def test_scripts_that_import_mmdets_models_before_a_config_is_read(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from mmdet.evaluation import CocoMetric\n"
        "import beside\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['config.py', '--work-dir', 'out']\n"
        "print('ran')\n"
    )
    (tmp_path / "beside.py").touch()
    code = f"""
import runpy
sys.argv = ["dcn_plugin.mmdet", {str(script)!r}, "config.py", "--work-dir", "out"]
runpy.run_module("dcn_plugin.mmdet", run_name="__main__")
"""
    assert run_on_lite(code).splitlines()[-1] == "ran"


def test_a_script_that_is_not_there_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "dcn_plugin.mmdet", str(tmp_path / "nope.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {command[-1]}: no such file, here or ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
def test_finds_the_tools_that_mmdet_was_installed_with(tool, tmp_path):
    command = [sys.executable, "-m", "dcn_plugin.mmdet", f"tools/{tool}"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {tool}" in done.stdout and "--work-dir" in done.stdout, done.stderr
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / tool).write_text("print('the one that is here')\n")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "the one that is here"


def test_help_names_the_tools():
    done = subprocess.run([sys.executable, "-m", "dcn_plugin.mmdet", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "tools/train.py CONFIG" in done.stdout


DETECTOR = """
import dcn_plugin.mmdet, mmdet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

init_default_scope("mmdet")
torch.set_num_threads(1)
config = Config.fromfile(mmdet.__path__[0] + "/.mim/configs/" + {name!r})
config.model.backbone.init_cfg = None
config.model.test_cfg.get("rcnn", config.model.test_cfg).score_thr = 0.0
torch.manual_seed(0)
model = MODELS.build(config.model)
model.init_weights()
torch.manual_seed(0)
images = demo_mm_inputs(2, [(3, 96, 128)] * 2, with_mask=True)
losses = model.train()(**model.data_preprocessor(images, True), mode="loss")
loss, _ = model.parse_losses(losses)
loss.backward()
gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
found = model.eval().test_step(demo_mm_inputs(1, [(3, 96, 128)]))[0].pred_instances
assert len(found) > 50
torch.save(dict(loss=loss.detach(), gradient=gradient, boxes=found.bboxes, scores=found.scores), {path!r})
"""


@needs_compiled
@pytest.mark.parametrize("name", ["mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "retinanet/retinanet_r18_fpn_1x_coco.py"])
def test_a_detector_computes_what_it_computes_on_compiled_mmcv(name, tmp_path):
    paths = [str(tmp_path / which) for which in ("lite", "compiled")]
    run_on_lite(DETECTOR.format(name=name, path=paths[0]))
    run(DETECTOR.format(name=name, path=paths[1]))
    actual, expected = map(torch.load, paths)
    for key, value in expected.items():
        # Gradients of a deep network amplify the rounding of float32; the operators' own tests compare in float64.
        scale = value.abs().max()
        torch.testing.assert_close(actual[key] / scale, value / scale, rtol=0, atol=1e-4 if key == "gradient" else 1e-5)
