"""What the project wants of itself, on a CPU with two threads and on one H100 or H200, and what became of it.

Smaller is better everywhere.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    what: str
    goal: float | None
    at_most: float
    cases: tuple
    direction: str = "forward"
    operator: str = "deform_conv2d"
    # What our time is divided by: the time of a contender, or "floor" for the one that the case names; "3x3" takes the
    # ratio to the floor and divides it by that of the 3x3 convolution. "memory" is no ratio: it is MiB for each thread.
    # "bytes" are those of the inputs and outputs, and what is divided is peak memory.
    over: str = "floor"


BOTH = "forward+backward"
STAGES = ("c3", "c4", "c5")
LAST = tuple(f"{stage} channels_last" for stage in STAGES)
BFLOAT16 = tuple(f"{stage} bfloat16" for stage in (*STAGES, *LAST))
SMALL = ("small", "small channels_last")
DEPTHWISE = ("c4 depthwise", "c4 depthwise channels_last")
VARIANTS = tuple(f"c4 {v}" for v in ("deform_groups 4", "1x1", "5x5", "stride 2", "dilation 2"))
ROI = ("FPN sampling_ratio 2", "FPN sampling_ratio 0")
ROI_BFLOAT16 = ("FPN sampling_ratio 2 bfloat16", "FPN sampling_ratio 2 channels_last bfloat16")
ATTENTION = ("encoder", "decoder")
DETECTOR = ("Faster R-CNN R50-FPN, 2 images 320x320",)
CPU_GOALS = (
    Goal("v2 forward, float32, 3x3", 1.08, 1.12, STAGES),
    Goal("the same, channels_last", 1.08, 1.12, LAST),
    Goal("the same, (1, 64, 56, 56)", 1.5, 1.9, SMALL),
    Goal("forward + backward, float32", 1.5, 1.9, (*STAGES, *LAST), BOTH),
    Goal("the same, (1, 64, 56, 56)", 1.3, 1.5, SMALL, BOTH),
    Goal("forward, bfloat16, to bfloat16 dense", 1.15, 1.3, BFLOAT16),
    Goal("forward + backward, bfloat16, to bfloat16 dense", 1.3, 1.6, BFLOAT16, BOTH),
    Goal("depthwise forward, to dense depthwise", 1.5, 2.2, DEPTHWISE),
    Goal("depthwise forward + backward", 2, 2.8, DEPTHWISE, BOTH),
    *(Goal(f"1x1 {direction}", 1.15, 1.25, ("c4 1x1", "c4 1x1 channels_last"), direction)
      for direction in ("forward", BOTH)),
    Goal("variants' ratio to that of 3x3", None, 1.3, VARIANTS, over="3x3"),
    Goal("the same, channels_last", None, 1.3, tuple(f"{v} channels_last" for v in VARIANTS), over="3x3"),
    Goal("a tiny call, (1, 16, 8, 8)", 2, 2.5, ("tiny",)),
    Goal("RoI align forward, to mmcv's roi_align", 0.5, 1.0, ROI, "forward", "deform_roi_align", "mmcv"),
    Goal("RoI align forward + backward", 0.5, 1.0, ROI, BOTH, "deform_roi_align", "mmcv"),
    *(Goal(f"RoI align {direction}, bfloat16 to float32", 0.8, 1, ROI_BFLOAT16, direction, "deform_roi_align",
           "dcn_plugin, float32") for direction in ("forward", BOTH)),
    Goal("peak memory forward, MiB a thread", 8, 16, (*STAGES, *LAST), over="memory"),
    *(Goal(f"attention {direction}, to mmcv's PyTorch path", 1 / 8, 1 / 4, ATTENTION, direction, "ms_deform_attn",
           "mmcv") for direction in ("forward", BOTH)),
    Goal("attention forward, bfloat16 to float32", 0.7, 1, tuple(f"{case} bfloat16" for case in ATTENTION),
         "forward", "ms_deform_attn", "dcn_plugin, float32"),
    Goal("attention forward, peak memory to inputs and outputs", 0.05, 0.05, ATTENTION, "forward", "ms_deform_attn",
         "bytes"),
    *(Goal(f"forward, to {peer}'s", None, 1 / 5, STAGES, over=peer) for peer in ("mmcv", "torchvision")),
    *(Goal(f"with backward, to {peer}'s", None, 1 / 10, STAGES, BOTH, over=peer) for peer in ("mmcv", "torchvision")),
    Goal("forward, to openvino's", 0.85, 0.95, (*STAGES, "c4 1x1", "c4 5x5"), over="openvino"),
    Goal("forward, to onnxruntime's", None, 1, STAGES, over="onnxruntime"),
    Goal("Faster R-CNN training iteration, to the plain one's", 1.15, 1.3, DETECTOR, "training iteration", "detector"),
)  # fmt: skip
C3, C4, C5 = (tuple(f"{stage} channels_last {dtype}" for dtype in ("bfloat16", "float16")) for stage in STAGES)
TF32 = tuple(f"{stage} channels_last TF32" for stage in STAGES)
CUDA_GOALS = (
    Goal("v2 forward, bfloat16 and float16, 3x3", 1.5, 2.5, (*C4, *C5)),
    Goal("the same, c3", 1.8, 3, C3),
    Goal("forward, TF32", 1.5, 2.2, TF32),
    Goal("forward, strict float32", 1.25, 1.6, LAST),
    Goal("forward + backward, bfloat16 and float16", 2, 3.5, (*C3, *C4, *C5), BOTH),
    Goal("depthwise forward", 2, 5, ("c4 depthwise channels_last bfloat16",)),
    Goal("RoI align forward + backward, to torchvision's roi_align", 1.1, 1.5,
         ("FPN sampling_ratio 2 channels_last",), BOTH, "deform_roi_align", "torchvision"),
    Goal("forward, to torchvision's", 1 / 5, 1 / 3, LAST, over="torchvision"),
    Goal("with backward, to torchvision's", 1 / 6, 1 / 3, LAST, BOTH, over="torchvision"),
    *(Goal(f"attention {direction}, float32, to mmcv's kernel", None, 1, ("encoder", "decoder"), direction,
           "ms_deform_attn", "mmcv") for direction in ("forward", BOTH)),
    *(Goal(f"attention {direction}, bfloat16, to mmcv's in float32", None, 1 / 1.5, ("encoder bfloat16",), direction,
           "ms_deform_attn", "mmcv") for direction in ("forward", BOTH)),
)  # fmt: skip
GOALS = dict(cpu=CPU_GOALS, cuda=CUDA_GOALS)


def figure(goal, case, results):
    """What was measured of a goal's case, or None."""

    def ratio_over(over, case):
        keys = goal.operator, goal.direction, case
        rows = [row for row in results["times"] if (row["operator"], row["direction"], row["case"]) == keys]
        contenders = rows[0]["contenders"] if rows else {}
        ours = contenders.get("dcn_plugin", {})
        if over == "memory":
            return ours["peak_mib"] / rows[0]["threads"] if "peak_mib" in ours else None
        if over == "bytes":
            return ours["peak_mib"] * 2**20 / rows[0]["roofline"]["bytes"] if "peak_mib" in ours else None
        if over == "floor" or over == ours.get("floor"):
            return ours["ratio"][1] if "ratio" in ours else None
        to_ours = contenders.get(over, {}).get("to_ours")
        return 1 / to_ours[1] if to_ours else None

    if goal.over != "3x3":
        return ratio_over(goal.over, case)
    plain = ratio_over("floor", "c4 channels_last" if case.endswith("channels_last") else "c4")
    ratio = ratio_over("floor", case)
    return ratio / plain if ratio and plain else None


def judge(goal, results):
    """({case: figure} for those that were measured, the verdict on the worst of them)"""
    found = {case: figure(goal, case, results) for case in goal.cases}
    found = {case: value for case, value in found.items() if value is not None}
    if not found:
        return found, "not measured"
    worst = max(found.values())
    if worst > goal.at_most:
        return found, "short"
    return found, "pass" if goal.goal is None or worst <= goal.goal else "pass (limit)"
