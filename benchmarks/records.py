"""Reads the JSON of a benchmark, for the tables and the plots."""

# How columns and bars are ordered; what is not named comes last.
ORDER = (
    *("plain", "dcn_plugin", "dcn_plugin, columns", "dcn_plugin, straight bins", "dcn_plugin, float32"),
    *("mmcv", "torchvision", "openvino", "onnxruntime"),
)


def ordered(names):
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def title(operator, case, direction):
    """A run's name, which `--only` matches."""
    return f"{operator} {case} {direction}"


def milliseconds(contender):
    return f"{1e3 * contender['seconds'][1]:.4g}" if contender else ""


def select(results, operator, direction):
    """The rows that hold figures."""
    wanted = operator, direction
    return [row for row in results["times"] if row["contenders"] and (row["operator"], row["direction"]) == wanted]
