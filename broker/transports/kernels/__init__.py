"""Jupyter's front ends: JupyterLab and others use kernels that workers serve as endpoints `kernels.ID`."""
