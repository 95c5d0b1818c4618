from importlib.util import find_spec

if find_spec("mmdet"):
    import dcn_plugin.mmdet  # noqa: F401  what custom_imports does
