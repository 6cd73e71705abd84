"""The commands that need the exporter: export, check, kernels, build."""
