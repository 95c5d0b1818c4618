from importlib.util import find_spec

if find_spec("mmengine"):
    import dcn_plugin.mmengine  # noqa: F401  what custom_imports does
