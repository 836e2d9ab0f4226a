"""The parts of cc-proxyctl, the command people use by hand; `cc_proxy.cli.ctl` puts them together."""
