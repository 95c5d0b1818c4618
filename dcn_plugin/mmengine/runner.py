"""A runner whose name on a command line makes an unchanged config use this package."""

from mmengine.config import Config
from mmengine.runner import Runner as _Runner
from mmengine.utils import import_modules_from_strings


class Runner(_Runner):
    """MMEngine's Runner, for ``--cfg-options runner_type=dcn_plugin.mmengine.Runner``.

    MMEngine imports a config's ``custom_imports`` while it reads the file, which is before it sees ``--cfg-options``.
    Naming this class imports the package, and it imports what the command line added. The config that it writes to the
    work directory lists ``dcn_plugin.mmengine`` in ``custom_imports`` and works with every tool.
    """

    module = __package__

    @classmethod
    def from_cfg(cls, cfg: Config) -> "Runner":
        cfg = cfg.copy()
        imports = dict(cfg.get("custom_imports") or {})
        modules = imports.get("imports") or []
        modules = [modules] if isinstance(modules, str) else list(modules)
        imports["imports"] = modules if cls.module in modules else [*modules, cls.module]
        cfg["custom_imports"] = imports
        import_modules_from_strings(**imports)
        return super().from_cfg(cfg)
