"""``python -m dcn_plugin inspect``: what the table says of a config."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

import dcn_plugin
from dcn_plugin import convert, describe
from dcn_plugin.__main__ import main
from dcn_plugin.layers import MultiScaleDeformableAttention


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        self.unused = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.body(self.stem(x))


def rows(table):
    return {line.split()[0]: line for line in table.split("\n\n")[0].splitlines()[1:]}


def test_counts_parameters_and_flops():
    model = convert(Net(), "DCNv2", "body")
    table = describe(model, (16, 32))
    lines = rows(table)
    assert "body.0" not in lines  # 1x1
    maps = 8 * 16  # positions of the stem's output
    assert lines["stem"].split()[1:] == ["3->4", "3x3", "stride", "2", f"{maps * 4 * 3 * 9 / 1e9:.2f}", "G"]
    row = lines["body.1"].split()
    offsets = 27 * 8 * 9 + 27
    assert row[1:6] == ["8->8", "3x3", "depthwise", "DCNv2", "body"] and row[6] == f"{offsets:,}"
    assert lines["unused"].endswith("-") and "-: not counted" in table
    assert "3 spatial convolutions, 1 of them deformable" in table
    extra = maps * (27 * 8 * 9 + 4 * 8 * 9)
    plain = maps * (4 * 3 * 9 + 8 * 4 + 8 * 9)
    assert f"{plain / 1e9:.2f} G plain, {(plain + extra) / 1e9:.2f} G as configured" in table
    parameters = sum(p.numel() for p in Net().parameters())
    assert f"{parameters / 1e6:.2f} M plain, {(parameters + offsets) / 1e6:.2f} M as configured" in table


def test_flops_are_multiply_adds_at_a_size_that_shows():
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ConvTranspose2d(64, 32, 2, stride=2))
    lines = rows(describe(net, (1000, 1000)))
    assert lines["0"].endswith(f"{64 * 3 * 9 / 1e3:.2f} G")
    assert lines["1"].endswith(f"{64 * 32 * 4 / 1e3:.2f} G") and "transposed" in lines["1"]


def test_shared_convolutions_are_counted_at_each_use():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    table = describe(convert(nn.Sequential(nn.Conv2d(3, 8, 1), conv, conv), "DCN", "1"), (400, 500))
    assert "1 and 1 more" in table
    assert f"{2 * 8 * 8 * 9 * 0.2e6 / 1e9:.2f} G" in rows(table)["1"]


def test_attention_has_a_table_of_its_own():
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(nn.Conv2d(3, 16, 3), MultiScaleDeformableAttention(16, 4, 2, 3, value_proj_ratio=0.5))
    _, table, _ = describe(net).split("\n\n")
    headings, row = table.splitlines()
    assert headings.startswith("attention  width  heads  levels  points")
    name, *sizes, parameters, of_query, of_pixel = row.replace(",", "").split()
    assert [name, *sizes] == ["1", "16", "4", "2", "3"]
    assert int(parameters) == sum(p.numel() for p in net[1].parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes = torch.tensor([(4, 5), (2, 3)])
        net[1](torch.rand(7, 2, 16), None, torch.rand(26, 2, 16), None, None, None, torch.rand(2, 7, 2, 2), shapes)
    assert counter.get_total_flops() == 2 * 2 * (7 * int(of_query) + 26 * int(of_pixel))


def test_attention_of_a_config(tmp_path, capsys):
    pytest.importorskip("mmdet")
    path = tmp_path / "config.py"
    path.write_text(
        "_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'\n"
        "custom_imports = dict(imports=['dcn_plugin.mmdet'])\n"
    )
    main(["inspect", str(path), "--shape", "64", "64"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "_attn " in line]
    names = [f"encoder.layers.{i}.self_attn" for i in range(6)] + [f"decoder.layers.{i}.cross_attn" for i in range(6)]
    assert [line[0] for line in lines] == names
    assert all(line[1:5] == ["256", "8", "4", "4"] for line in lines)


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("mmdet")
    path = tmp_path / "config.py"
    path.write_text(
        "model = dict(type='mmdet.ResNet', depth=18, base_channels=8, stem_channels=8,"
        " init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'))\n"
    )
    return str(path)


def test_the_command_in_a_fresh_process(config):
    options = ["model.deformable.type=DCN", "model.deformable.targets=['layer3','layer4.1']", "model.deformable.last=3"]
    options.append("model.frozen_stages=1")
    command = [sys.executable, "-m", "dcn_plugin", "inspect", config, "--shape", "64", "64", "--cfg-options", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = [line.split()[0] for line in done.stdout.splitlines() if re.search(r"DCN +layer", line)]
    assert chosen == ["layer3.1.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    assert "note: this config does not import dcn_plugin.mmdet" in done.stdout
    assert "frozen" in rows(done.stdout)["conv1"]


@pytest.mark.parametrize(
    "line", ["custom_imports = dict(imports=['dcn_plugin.mmdet'])", "runner_type = 'dcn_plugin.mmdet.Runner'"]
)
def test_a_config_that_imports_needs_no_note(config, line, capsys):
    with open(config, "a") as file:
        file.write(line + "\n")
    main(["inspect", config, "--shape", "64", "64", "--cfg-options", "model.deformable.targets=layer4"])
    assert "note:" not in capsys.readouterr().out


def test_prints_no_warnings_of_setuptools(tmp_path):
    """MMEngine looks for the package of such a base with pkg_resources, which warns that it is deprecated."""
    pytest.importorskip("mmdet")
    path = tmp_path / "config.py"
    path.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n")
    command = [sys.executable, "-m", "dcn_plugin", "inspect", path, "--shape", "64", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "backbone.conv1" in done.stdout, done.stderr
    assert "pkg_resources" not in done.stderr


@pytest.mark.parametrize(
    "normalize", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_weights_that_are_computed(normalize):
    net = Net()
    normalize(net.stem)
    net(torch.rand(1, 3, 8, 8))
    table = describe(convert(net, "DCNv2", "body"), (1000, 1000))
    assert rows(table)["stem"].endswith(f"{4 * 3 * 9 * 0.25e6 / 1e9:.2f} G")
    net(torch.rand(1, 3, 8, 8)).sum().backward()  # the model itself is as before


def test_says_when_nothing_could_be_traced():
    class Untraceable(Net):
        def forward(self, x):
            raise RuntimeError

    assert "not counted, since the model could not be traced" in describe(Untraceable())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "--cfg-options", "model.deformable.targets=stage3"], "nothing in ResNet; nearest: layer3"),
        (["nowhere.py"], "nowhere.py"),
        (["nopackage::x.py"], "no package 'nopackage'"),
        (["mmdet::nope.py"], "mmdet::nope.py: mmdet has no such config$"),
        (["mmdet::fcos/fcos_r50_fpn_gn-head_1x_coco.py"], "mmdet has no such config; nearest: fcos/fcos_r"),
        (["torch::x.py"], "torch has no such config"),
    ],
)
def test_errors_are_one_line(config, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        main(["inspect", *(argument.format(config) for argument in arguments)])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


def test_a_misspelt_import_is_one_line(config):
    with open(config, "a") as file:
        file.write("custom_imports = dict(imports=['dcn_plugin.mdet'])\n")
    with pytest.raises(SystemExit) as error:
        main(["inspect", config])
    reason = "Failed to import dcn_plugin.mdet (No module named 'dcn_plugin.mdet')"
    assert str(error.value) == f"error: {config}: custom_imports: {reason}"


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "inspect" in capsys.readouterr().out


def test_leaves_no_hooks_behind():
    net = Net()
    describe(net, (8, 8))
    assert not any(module._forward_hooks for module in net.modules())
    assert next(net.parameters()).device == torch.device("cpu")


def test_help_and_version_need_no_mmengine():
    code = "import sys; sys.modules['mmengine'] = None; from dcn_plugin.__main__ import main; main(sys.argv[1:])"
    for arguments in (["--help"], ["inspect", "--help"], ["convert-checkpoint", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"dcn_plugin {dcn_plugin.__version__}"


@pytest.mark.parametrize(
    ("pipeline", "size"),
    [
        ("[dict(type='Resize', scale=(1333, 800), keep_ratio=True)]", "800 x 1333"),
        ("[dict(type='mmdet.Resize', scale=(64, 96), keep_ratio=False)]", "96 x 64"),
        ("[dict(type='Resize', scale=(600, 600), keep_ratio=True), dict(type='Pad', size=(640, 640))]", "640 x 640"),
        ("[dict(type='LoadImageFromFile')]", "800 x 1216"),
    ],
)
def test_the_image_is_that_of_the_test_pipeline(config, pipeline, size, capsys):
    with open(config, "a") as file:
        file.write(f"test_dataloader = dict(dataset=dict(pipeline={pipeline}))\n")
    main(["inspect", config])
    assert f"for an image of {size}" in capsys.readouterr().out
