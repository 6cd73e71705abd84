"""How the kernels are launched: tiles, plans, workspace, arguments. Needs the standard library only."""
