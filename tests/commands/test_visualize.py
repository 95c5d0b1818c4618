"""``python -m dcn_plugin visualize``."""

import pytest
import torch

pytest.importorskip("mmdet", reason="pictures of a detector")

from PIL import Image

from dcn_plugin.__main__ import main
from tests.visualize.conftest import DETR, TWO_STAGE, image, write_checkpoint, write_config  # noqa: F401


def visualize(*arguments):
    main(["visualize", *map(str, arguments)])


def test_all_pictures(write_config, write_checkpoint, image, tmp_path, capsys):  # noqa: F811
    config, out = write_config(TWO_STAGE), tmp_path / "new" / "pictures"
    visualize(config, write_checkpoint(config), image, "--out-dir", out, "--score-thr", 0, "--svg")
    names = ["points", "receptive_field", "rois", *(f"offsets_backbone.layer{k}.1.conv2" for k in (2, 3, 4))]
    expected = {f"scene_{name}.{suffix}" for name in names for suffix in ("png", "svg")} | {"table.txt"}
    assert {path.name for path in out.iterdir()} == expected
    printed = capsys.readouterr().out
    assert all(str(out / name) in printed for name in expected)
    table = (out / "table.txt").read_text()
    assert table in printed and "backbone.layer3.0.conv1" in table and "bbox_roi_extractor.roi_layers.0" in table
    with Image.open(out / "scene_points.png") as picture:
        assert min(picture.size) > 300


def test_attention(write_config, write_checkpoint, image, tmp_path, capsys):  # noqa: F811
    config = write_config(DETR)
    visualize(config, write_checkpoint(config), image, "--out-dir", tmp_path / "out", "--score-thr", 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scene_attention.png", "table.txt"}
    assert "decoder.layers.0.cross_attn" in capsys.readouterr().out


def test_animations(write_config, write_checkpoint, image, tmp_path):  # noqa: F811
    config = write_config()
    checkpoints = [write_checkpoint(config, f"epoch_{epoch}.pth", seed=epoch) for epoch in (1, 2, 10)]
    options = image, "--out-dir", tmp_path, "--what", "table", "--layers", "*.layer2.1.conv2", "--gif"
    visualize(config, checkpoints[0], *options, "--at", "5,5", "--at", "50,40", "--frames", 3)
    with Image.open(tmp_path / "scene_points.gif") as line:
        assert line.n_frames == 3
    visualize(config, checkpoints[-1], *options, "--at", "20,20", "--checkpoints", tmp_path / "epoch_*.pth")
    with Image.open(tmp_path / "scene_points.gif") as training:
        assert training.n_frames == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "neck.*"], r"'neck\.\*' matches none of the deformable layers that ran: backbone\.layer2"),
        (["--last", "0"], "--last must be at least 1"),
        (["--checkpoints", "x.pth"], "--checkpoints are for --gif"),
        (["missing.jpg"], "missing.jpg: no such file"),
    ],
)
def test_errors_are_one_line(write_config, write_checkpoint, image, tmp_path, options, message):  # noqa: F811
    config = write_config()
    with pytest.raises(SystemExit, match=message) as error:
        visualize(config, write_checkpoint(config), image, *options, "--out-dir", tmp_path)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


def test_what_is_no_checkpoint_of_the_model_is_one_line(write_config, image, tmp_path):  # noqa: F811
    config = write_config()
    text, other, tensor = (tmp_path / name for name in ("text.pth", "other.pth", "tensor.pth"))
    text.write_text("epoch 1\n")
    torch.save(dict(state_dict={"nothing.weight": torch.zeros(1)}), other)
    torch.save(torch.zeros(1), tensor)
    for checkpoint, message in [
        (text, r"text.pth is no checkpoint that torch.load reads \("),
        (other, "other.pth is a checkpoint of another model: it has no tensor of this config's model"),
        (tensor, "tensor.pth is no checkpoint: it holds a Tensor"),
        (tmp_path / "missing.pth", "missing.pth can not be found"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            visualize(config, checkpoint, image, "--out-dir", tmp_path / "out")
        assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*"))


def test_no_test_pipeline(write_config, write_checkpoint, image, tmp_path):  # noqa: F811
    config = write_config(extra="test_dataloader = None\n")
    with pytest.raises(SystemExit, match="test_dataloader has no pipeline"):
        visualize(config, write_checkpoint(config), image, "--out-dir", tmp_path)


def test_a_plain_model(write_config, write_checkpoint, image, tmp_path):  # noqa: F811
    config = write_config(extra="backbone.pop('deformable')\n")
    with pytest.raises(SystemExit, match="the model ran no deformable layer"):
        visualize(config, write_checkpoint(config), image, "--out-dir", tmp_path)


def test_a_position_that_is_none(capsys):
    with pytest.raises(SystemExit):
        visualize("config.py", "x.pth", "image.jpg", "--at", "5")
    assert "a position is X,Y in pixels, got '5'" in capsys.readouterr().err
