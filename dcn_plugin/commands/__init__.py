"""The commands of ``python -m dcn_plugin``, a file each."""
