"""Jupyter kernels as workers: started or attached to, asked over their ZeroMQ sockets, heard on their IOPub socket."""
