"""cc-proxy: shares each VM's two serial channels among the clients of one AF_UNIX socket."""

__version__ = "1.0.0"
