"""The Runner for detectors."""

from dcn_plugin.mmengine import runner


class Runner(runner.Runner):
    """As :class:`dcn_plugin.mmengine.Runner`, for ``--cfg-options runner_type=dcn_plugin.mmdet.Runner``; the config it
    writes lists ``dcn_plugin.mmdet``."""

    module = __package__
