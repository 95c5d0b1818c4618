"""The command itself: what it reads, refuses, says and writes."""

import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import nn

from dcn_plugin.__main__ import main
from dcn_plugin.commands.convert_checkpoint import convert_checkpoint
from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack

from .conftest import assert_same, convert, randomised

PLAIN = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}


def saved(path, content):
    torch.save(content, path)
    return path.read_bytes()


def test_as_a_command(tmp_path, capsys):
    before = saved(tmp_path / "in.pth", PLAIN)
    main(["convert-checkpoint", f"{tmp_path}/in.pth", f"{tmp_path}/out.pth", "--prefix", "backbone.", "-v"])
    assert (tmp_path / "in.pth").read_bytes() == before
    said = capsys.readouterr().out
    assert "in.pth: torchvision, 3 tensors\n" in said
    assert "renamed, 2: \n  conv1.weight -> backbone.conv1.weight\n  layer1.0.conv1.weight -> " in said
    assert "left out, 1: \n  fc.bias" in said and "wrote 2 tensors to" in said
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written["state_dict"]) == ["backbone.conv1.weight", "backbone.layer1.0.conv1.weight"]
    assert written["meta"]["converted"]["format"] == "torchvision"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pth"]


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert-checkpoint", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("torchvision", "detectron2", "mmdet", "deform_conv2d"))


def test_never_touches_what_it_must_not(tmp_path):
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    before = saved(source, PLAIN)
    target.write_text("precious")
    with pytest.raises(ValueError, match="out.pth exists; --force overwrites it"):
        convert_checkpoint(source, target)
    for same in (source, tmp_path / "." / "in.pth"):
        with pytest.raises(ValueError, match="is the checkpoint to convert"):
            convert_checkpoint(source, same, force=True)
    assert target.read_text() == "precious" and source.read_bytes() == before
    convert_checkpoint(source, target, force=True)
    assert torch.load(target, weights_only=True)["state_dict"]


def test_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    saved(tmp_path / "in.pth", PLAIN)
    (tmp_path / "out.pth").write_text("precious")

    def breaks(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", force=True)
    assert (tmp_path / "out.pth").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pth"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="in.pth is not a file"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    saved(tmp_path / "in.pth", PLAIN)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "nowhere" / "out.pth")
    with pytest.raises(SystemExit, match="error: .* is not a file"):
        main(["convert-checkpoint", f"{tmp_path}/no.pth", f"{tmp_path}/out.pth"])


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["in.pth", "in.pkl"])
def test_runs_no_code(name, tmp_path):
    content, victim = dict(model=PLAIN, more=Malice(tmp_path / "ran")), tmp_path / "ran"
    if name == "in.pkl":
        arrays = {key: tensor.numpy() for key, tensor in PLAIN.items()}
        (tmp_path / name).write_bytes(pickle.dumps(content | dict(model=arrays)))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=r"could run code when it is read; .* --trust reads it"):
        convert_checkpoint(tmp_path / name, tmp_path / "out.pth")
    assert not victim.exists() and not (tmp_path / "out.pth").exists()
    said = convert_checkpoint(tmp_path / name, tmp_path / "out.pth", trust=True)
    assert victim.exists() and "left out beside the model, 1: more" in said


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "in.pth").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(ValueError, match="cannot read .*in.pth"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    for content, message in ((torch.zeros(3), "holds a Tensor"), (dict(epoch=3), "holds no tensors .* but epoch")):
        saved(tmp_path / "in.pth", content)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")


@pytest.mark.parametrize(
    "names, options, message",
    [
        (["encoder.layer1.0.conv1.weight"], {}, r"encoder\S+: the nearest is \w+'s \S*layer1\.0\.conv1"),
        (["res2_0_branch2a_w"], {}, "Caffe2"),
        (["backbone.body.conv1.weight", "rpn.head.conv.weight"], {}, "of no format known here"),  # torchvision's
        (["backbone.0.body.layer1.0.conv1.weight", "bbox_embed.layers.0.weight"], {}, "of no format known"),  # DETR
        (
            ["layer1.0.conv1.weight", "layer1.0.convl.weight"],
            {},
            "1 of 2 names.*\n.*convl.weight: the nearest is layer1.0",
        ),
        (
            ["backbone.bottom_up.res2.0.conv1.weight", "backbone.bottom_up.res2.0.conv1x.weight"],
            {},
            "1 of 2 names are not detectron2's",
        ),
        (["layer1.0.conv1.weight"], dict(format="detectron2"), "1 of 1 names are not detectron2's"),
        (["layer1.0.conv1.weight"], dict(strip="net."), r"no name starts with 'net\.'"),
        (["layer1.0.conv1.weight"], dict(rename=["x"]), "REGEX=TEXT"),
        (["layer1.0.conv1.weight"], dict(rename=["(=x"]), "--rename"),
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight"], dict(rename=[r"\.\d\.=."]), "would both become"),
        (["layer1.0.conv1.weight"], dict(rename=[], drop=["*"]), "the names are of no format"),
        (["fc.weight"], dict(format="torchvision"), "nothing is left"),
    ],
)
def test_refuses(names, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(None, tmp_path, state={name: torch.zeros(1) for name in names}, **options)
    assert not (tmp_path / "out.pth").exists()


def test_strip_and_drop(tmp_path):
    names = ["encoder.layer1.0.conv1.weight", "encoder.fc.bias", "decoder.weight"]
    state, text = convert(
        None, tmp_path, state={name: torch.zeros(1) for name in names}, strip="encoder.", drop=["decoder.*"]
    )
    assert list(state) == ["layer1.0.conv1.weight"]
    assert "left out, 2: decoder.weight, fc.bias" in text


def test_a_training_checkpoint_of_mmengines(tmp_path):
    history = HistoryBuffer()
    history.update(1.0)
    state = OrderedDict({"backbone.layer1.0.conv1.weight": torch.ones(1), "bbox_head.fc_cls.bias": torch.ones(1)})
    state._metadata = {"": dict(version=1)}
    checkpoint = dict(
        meta=dict(epoch=3, dataset_meta=dict(classes=("cat",))),
        state_dict=state,
        optimizer=dict(state={0: torch.ones(1)}),
        message_hub=dict(log_scalars=dict(loss=history)),
    )
    text = convert(None, tmp_path, state=checkpoint)[1]
    assert "kept, 2" in text and "left out beside the model, 2: optimizer, message_hub" in text
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["meta"]["dataset_meta"] == dict(classes=("cat",))
    assert written["state_dict"]._metadata == state._metadata


@pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_offsets_of_old_mmcvs(pack, tmp_path):
    def block():
        module = nn.Sequential()
        module.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        module.conv2 = pack(4, 4, 3, padding=1)
        return module

    source = randomised(block())
    old = {
        f"backbone.{name}".replace("conv2.conv_offset", "conv2_offset"): t for name, t in source.state_dict().items()
    }
    # Not offsets: of a shape that deforms nothing, and with nothing beside it.
    old |= {"neck.conv.weight": torch.ones(1, 1, 3, 3), "neck.conv_offset.weight": torch.ones(5, 1, 3, 3)}
    old |= {"head.reg_offset.weight": torch.ones(18, 1, 3, 3)}
    state, text = convert(None, tmp_path, state=old)
    assert "renamed, 2" in text and {"neck.conv_offset.weight", "head.reg_offset.weight"} < set(state)
    target = block().double()
    own = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}
    target.load_state_dict(own)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert_same([target(x)], [source(x)])


MODEL = dict(type="ResNet", depth=18, base_channels=8, stem_channels=8, dcn=None)


def resnet_18(prefix=""):
    from mmdet.models import ResNet

    state = ResNet(depth=18, base_channels=8, stem_channels=8).state_dict()
    return {prefix + name: tensor for name, tensor in state.items()}


def config_file(tmp_path, model):
    Config(dict(default_scope="mmdet", custom_imports=dict(imports=["dcn_plugin.mmdet"]), model=model)).dump(
        tmp_path / "c.py"
    )
    return str(tmp_path / "c.py")


def test_checks_a_config(tmp_path):
    config = config_file(tmp_path, MODEL)
    text = convert(None, tmp_path, state=resnet_18(), config=config)[1]
    assert "config: loads into the model; missing 0, unexpected 0" in text

    state = resnet_18()
    state["layer1.0.conv3.weight"] = state.pop("layer1.0.conv2.weight")
    text = convert(None, tmp_path, state=state, config=config)[1]
    assert "missing 1, unexpected 1" in text
    assert "unexpected: layer1.0.conv3.weight (nearest: layer1.0.conv2.weight)" in text

    (tmp_path / "out.pth").unlink()
    state = resnet_18() | {"conv1.weight": torch.zeros(8, 3, 3, 3)}
    with pytest.raises(ValueError, match="does not load into the model of the config(.|\n)*conv1.weight"):
        convert(None, tmp_path, state=state, config=config)
    assert not (tmp_path / "out.pth").exists()


def test_refuses_what_has_nothing_of_the_configs_model(tmp_path):
    config = config_file(tmp_path, MODEL)
    with pytest.raises(ValueError, match="none of the names is one of the model of the config: bakbone.conv1.weight"):
        convert(None, tmp_path, state=resnet_18(), prefix="bakbone.", config=config)


def test_options_are_merged_into_the_config(tmp_path):
    config = config_file(tmp_path, MODEL)
    options = {"model.deformable.targets": "layer4"}
    text = convert(None, tmp_path, state=resnet_18(), config=config, cfg_options=options)[1]
    assert "missing 0" in text  # the offsets are zero


def test_checks_the_backbone_of_a_detector(tmp_path):
    head = dict(type="FCOSHead", num_classes=2, in_channels=8, feat_channels=8, norm_cfg=None)
    model = dict(
        type="FCOS",
        backbone=MODEL | dict(deformable=dict(type="DCNv2", targets="layer4")),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        bbox_head=head,
    )
    config = config_file(tmp_path, model)
    text = convert(None, tmp_path, state=resnet_18(), config=config)[1]
    assert "config: loads into the backbone; missing 0, unexpected 0" in text
    text = convert(None, tmp_path, state=resnet_18(), prefix="backbone.", config=config)[1]
    assert "config: loads into the model; missing" in text and "unexpected 0" in text and "neck.lateral_convs" in text


def test_a_full_disk_is_one_sentence(tmp_path):
    """A file may not grow past a limit, which is what the system says of a full disk too."""
    code = f"""
import resource, signal, sys, torch
from dcn_plugin.__main__ import main
torch.save({{"conv.weight": torch.zeros(300_000)}}, {str(tmp_path / "in.pth")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main(["convert-checkpoint", {str(tmp_path / "in.pth")!r}, {str(tmp_path / "out.pth")!r}, "--format", "mmdet"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
